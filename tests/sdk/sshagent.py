"""A real ssh-agent on this machine, and a client of /execute/ws that forwards it as LangSmith's own command line does."""

from __future__ import annotations

import base64
import json
import os
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

DEADLINE = 30.0  # seconds for the next message


class RealAgent:
    """ssh-agent with one key."""

    def __init__(self, folder: Path) -> None:
        self.socket = str(folder / "agent")
        self.key = folder / "key"
        self._process = subprocess.Popen(["ssh-agent", "-D", "-a", self.socket], stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        self._process.stdout.readline()  # it listens
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "held outside", "-f", str(self.key)], check=True)
        self.ask("ssh-add", "-q", str(self.key))

    def ask(self, *argv: str) -> str:
        """The output of a program that uses it."""
        env = {**os.environ, "SSH_AUTH_SOCK": self.socket}
        return subprocess.run(argv, env=env, check=True, capture_output=True, text=True).stdout

    def stop(self) -> None:
        """End it."""
        self._process.terminate()
        self._process.wait(10)
        assert self._process.stdout is not None
        self._process.stdout.close()


class Client:
    """One client of one command. Each channel is a connection to its agent, made by the first data of the channel."""

    def __init__(self, ws: Any, agent: str | None) -> None:
        self._ws = ws
        self._agent = agent  # path of the agent's socket; None: a test answers itself
        self._lock = threading.Lock()  # of sending, and of what is below
        self._channels: dict[str, socket.socket] = {}  # by channel id
        self._threads: list[threading.Thread] = []
        self.seen: list[dict[str, Any]] = []  # messages of channels
        self.output = ""  # of both streams
        self.command_id = ""  # set by the first message

    def send(self, **message: Any) -> None:
        """One message."""
        with self._lock:
            self._ws.send(json.dumps(message))

    def receive(self) -> dict[str, Any]:
        """The next message, acted on."""
        message: dict[str, Any] = json.loads(self._ws.recv(DEADLINE))
        if message["type"] == "started":
            self.command_id = message["command_id"]
        elif message["type"] in ("stdout", "stderr"):
            self.output += message["data"]
        elif message["type"].startswith("ssh_agent"):
            assert isinstance(message["channel_id"], str)
            self.seen.append(message)
            if self._agent is not None:
                self._forward(message)
        return message

    def until(self, kind: str) -> dict[str, Any]:
        """The next message of a type, acting on those before it."""
        while (message := self.receive())["type"] != kind:
            assert message["type"] not in ("exit", "error"), message
        return message

    def until_output(self, word: str) -> None:
        """Act on messages until the output has a word."""
        while word not in self.output:
            self.receive()

    def _forward(self, message: dict[str, Any]) -> None:
        channel_id = message["channel_id"]
        if message["type"] == "ssh_agent_close":
            with self._lock:
                sock = self._channels.pop(channel_id, None)
            if sock is not None:
                sock.shutdown(socket.SHUT_RDWR)
            return
        sock = self._channels.get(channel_id)
        if sock is None:
            sock = socket.socket(socket.AF_UNIX)
            sock.connect(str(self._agent))
            self._channels[channel_id] = sock
            self._threads.append(threading.Thread(target=self._answer, args=(channel_id, sock)))
            self._threads[-1].start()
        sock.sendall(base64.b64decode(message["data"], validate=True))

    def _answer(self, channel_id: str, sock: socket.socket) -> None:
        with sock:
            try:
                while data := sock.recv(16384):
                    self.send(type="ssh_agent_data", channel_id=channel_id, data=base64.b64encode(data).decode())
                self.send(type="ssh_agent_close", channel_id=channel_id)
            except ConnectionClosed:
                pass

    def finish(self) -> int:
        """The exit code, when the command ends."""
        return int(self.until("exit")["exit_code"])

    def close(self) -> None:
        """Hang up; every connection to the agent ends."""
        self._ws.close()
        with self._lock:
            for sock in self._channels.values():
                sock.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(10)
            assert not thread.is_alive()


@contextmanager
def attached(url: str, key: str, agent: str | None, **message: Any) -> Iterator[Client]:
    """Attach to a sandbox's /execute/ws with a first message."""
    with connect(url.replace("http", "ws", 1) + "/execute/ws", additional_headers={"X-Api-Key": key}) as ws:
        client = Client(ws, agent)
        client.send(**message)
        try:
            yield client
        finally:
            client.close()

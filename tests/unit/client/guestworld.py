"""A daemon whose sandboxes are this machine: op `guest` of connect.sock, relayed to a real guest process."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import psutil

from gatewayd.guest import wire

from .conftest import DEADLINE, PROJECT, Daemon

GUEST = PROJECT / "gatewayd" / "guest" / "guest.py"


class GuestWorld:
    """Serves `daemon`'s connect.sock; what breaks is up to the test."""

    def __init__(self, daemon: Daemon, root: Path) -> None:
        self.root = root
        self.env = {"HOME": str(root), "PATH": os.environ["PATH"]}
        self._file = root / "guest.py"  # a copy of its own content: no other guest on this machine is meant
        self._file.write_text(f"{GUEST.read_text()}\n# {root}\n")
        self.daemon = daemon
        self.links: list[socket.socket] = []  # the guest's ends of all connections so far
        self.connected = threading.Semaphore(0)  # released for every connection that was answered
        self.answers: list[dict[str, Any]] = []  # what the daemon says instead of connecting, the first one first
        self.passed = 0  # bytes that came out of the guest
        self.cut_after: list[int] = []  # values of `passed` at which the connection is cut
        self._lock = threading.Lock()
        self.start()
        daemon.script = self._serve

    def start(self) -> None:
        """Start a guest."""
        command = [sys.executable, str(self._file), "start"]
        done = subprocess.run(command, env=self.env, capture_output=True, text=True, timeout=DEADLINE, check=True)
        word, version, port, token, pid = done.stdout.split()
        assert (word, version) == ("GATEWAYD-GUEST", "1")
        self.port, self.token, self.pid = int(port), bytes.fromhex(token), int(pid)

    def stop(self) -> None:
        """Kill the guest and all it has started, as the end of a sandbox does. Idempotent."""
        with contextlib.suppress(psutil.NoSuchProcess):
            guest = psutil.Process(self.pid)
            for process in [guest, *guest.children(recursive=True)]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()

    def cut(self) -> None:
        """Break every connection, in the way a lost link does."""
        with self._lock:
            links, self.links = self.links, []
        for sock in links:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def _serve(self, request: dict[str, Any], client: socket.socket) -> None:
        if request["op"] != "guest":
            return
        with self._lock:
            answer = self.answers.pop(0) if self.answers else None
        if answer is not None:
            client.sendall(json.dumps(answer).encode() + b"\n")
            return
        try:
            guest = socket.create_connection(("127.0.0.1", self.port), timeout=DEADLINE)
            session = bytes.fromhex(request["session"])
            guest.sendall(wire.encode_preface(self.token, session, request["mode"], request["received"]))
            said = wire.decode_answer(_exactly(guest, wire.ANSWER_SIZE))
        except OSError:
            client.sendall(b'{"error":{"kind":"unavailable","message":"the guest does not answer","hint":""}}\n')
            return
        ok = {"status": said.status, "received": said.received, "base": said.base, "credit": said.credit}
        client.sendall(json.dumps({"ok": ok}).encode() + b"\n")
        with self._lock:
            self.links.append(guest)
        self.connected.release()
        client.settimeout(None)
        guest.settimeout(None)
        back = threading.Thread(target=self._copy, args=(guest, client, True), daemon=True)
        back.start()
        self._copy(client, guest, False)
        back.join(DEADLINE)
        guest.close()

    def _copy(self, source: socket.socket, sink: socket.socket, counted: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                if counted:
                    data = self._count(data)
                sink.sendall(data)
        for sock in (source, sink):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def _count(self, data: bytes) -> bytes:
        """Cut where the test wants it, in the middle of whatever is there. Raises OSError there."""
        self.passed += len(data)
        if self.cut_after and self.passed >= self.cut_after[0]:
            self.cut_after.pop(0)
            self.cut()
            raise OSError
        return data

    def close(self) -> None:
        """End everything."""
        self.cut()
        self.stop()
        digest = hashlib.sha256(self._file.read_bytes()).hexdigest()[:16]
        shutil.rmtree(f"/tmp/.gatewayd-guest-{os.geteuid()}-{digest}", ignore_errors=True)
        shutil.rmtree(self.root)


def _exactly(sock: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        more = sock.recv(size - len(data))
        if not more:
            raise ConnectionResetError("the guest closed the connection")
        data += more
    return data

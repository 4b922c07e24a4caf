"""tunnel as a process of its own."""

from __future__ import annotations

import json
import os
import pty
import signal
import socket
import subprocess
import threading
from typing import Any

import pytest

from .conftest import DEADLINE, Daemon, Spawn


class Forward:
    """Serves the forward op: answers, sends events, notices the client's end."""

    def __init__(self, daemon: Daemon, events: list[dict[str, str]] | None = None) -> None:
        self.ended = threading.Event()
        self._events = events or []
        daemon.script = self._serve

    def _serve(self, request: dict[str, Any], sock: socket.socket) -> None:
        port = request["local_port"] or 40000
        sock.sendall(json.dumps({"ok": {"address": request["address"], "port": port}}).encode() + b"\n")
        for event in self._events:
            sock.sendall(json.dumps(event).encode() + b"\n")
        if not self._events or self._events[-1]["event"] != "end":
            assert sock.recv(1) == b""
            self.ended.set()


@pytest.mark.parametrize(("args", "local"), [([], 5432), (["--local-port", "0"], 0), (["--local-port", "15432"], 15432)])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_until_it_is_ended(daemon: Daemon, spawn: Spawn, args: list[str], local: int, number: signal.Signals) -> None:
    forward = Forward(daemon)
    process = spawn("tunnel", "demo", "--remote-port", "5432", *args)
    assert process.stdout is not None
    line = json.loads(process.stdout.readline())
    assert line == {"address": "127.0.0.1", "port": local or 40000, "sandbox": "demo", "remote_port": 5432}
    process.send_signal(number)
    out, err = process.communicate(timeout=DEADLINE)
    assert (process.returncode, out, err) == (0, b"", b"")
    assert forward.ended.wait(DEADLINE)
    assert daemon.lines == [
        {"op": "forward", "sandbox": "demo", "remote_port": 5432, "local_port": local, "address": "127.0.0.1"}
    ]


def test_resumable(daemon: Daemon, spawn: Spawn) -> None:
    Forward(daemon)
    process = spawn("tunnel", "demo", "--remote-port", "5432", "--resumable")
    assert process.stdout is not None
    assert process.stdout.readline()
    process.send_signal(signal.SIGINT)
    assert process.wait(DEADLINE) == 0
    assert daemon.lines[0]["resumable"] is True
    assert spawn("tunnel", "demo", "--remote-port", "5432", "--resumable", "--stdio").wait(DEADLINE) == 2


EVENTS = [
    {"event": "opened", "peer": "127.0.0.1:5001", "message": ""},
    {"event": "failed", "peer": "127.0.0.1:5001", "message": "nothing listens on port 5432 \x1b[31minside"},
    {"event": "closed", "peer": "127.0.0.1:5001"},
    {"event": "end"},
]


@pytest.mark.parametrize(("level", "shown"), [("error", []), ("warn", ["failed"]), ("info", ["opened", "failed", "closed"])])
def test_events(daemon: Daemon, spawn: Spawn, level: str, shown: list[str]) -> None:
    Forward(daemon, EVENTS)
    process = spawn("tunnel", "demo", "--remote-port", "5432", "--log-level", level, "--format", "id")
    out, err = process.communicate(timeout=DEADLINE)
    lines = err.decode().splitlines()
    assert out == b"127.0.0.1:5432\n"
    assert [line.split()[2] for line in lines[:-1]] == shown
    assert lines[-1] == "sandbox: the tunnel has ended: the daemon closed it"
    assert process.returncode == 69
    if level == "warn":
        assert lines[0] == "sandbox: connection failed (127.0.0.1:5001): nothing listens on port 5432 inside"


def test_a_port_in_use(daemon: Daemon, spawn: Spawn) -> None:
    def serve(request: dict[str, Any], sock: socket.socket) -> None:
        sock.sendall(
            b'{"error":{"kind":"port_in_use","message":"port 5432 is taken by postgres (pid 7)","hint":"--local-port 0"}}\n'
        )

    daemon.script = serve
    process = spawn("tunnel", "demo", "--remote-port", "5432")
    out, err = process.communicate(timeout=DEADLINE)
    assert (process.returncode, out) == (73, b"")
    assert err == b"sandbox: port 5432 is taken by postgres (pid 7)\nhint: --local-port 0\n"


def test_a_sentence_on_a_terminal(daemon: Daemon, spawn: Spawn) -> None:
    Forward(daemon)
    leader, follower = pty.openpty()
    process = spawn("tunnel", "demo", "--remote-port", "80", stdin=follower, stdout=follower, stderr=follower)
    os.close(follower)
    shown = b""
    while b"\n" not in shown:
        shown += os.read(leader, 1000)
    assert shown == b"127.0.0.1:80 is port 80 of demo; Ctrl-C ends it\r\n"
    process.send_signal(signal.SIGINT)
    assert process.wait(DEADLINE) == 0
    os.close(leader)


def test_a_signal_before_it_listens(daemon: Daemon, spawn: Spawn) -> None:
    asked = threading.Event()
    released = threading.Event()

    def serve(request: dict[str, Any], sock: socket.socket) -> None:
        asked.set()
        released.wait(DEADLINE)

    daemon.script = serve
    process = spawn("tunnel", "demo", "--remote-port", "80")
    assert asked.wait(DEADLINE)
    process.send_signal(signal.SIGINT)
    assert process.wait(DEADLINE) == 130
    released.set()


def reverse(request: dict[str, Any], sock: socket.socket) -> None:
    """Answers only after the other end's EOF."""
    sock.sendall(b'{"ok":{}}\n')
    data = b""
    while chunk := sock.recv(65536):
        data += chunk
    sock.sendall(data[::-1])


def test_stdio_half_closes(daemon: Daemon, spawn: Spawn) -> None:
    daemon.script = reverse
    process = spawn("tunnel", "demo", "--remote-port", "80", "--stdio")
    data = os.urandom(1_000_000)
    out, err = process.communicate(data, timeout=DEADLINE)
    assert (process.returncode, err) == (0, b"")
    assert out == data[::-1]
    assert daemon.lines == [{"op": "connect", "sandbox": "demo", "port": 80}]


def test_stdio_over_a_unix_socket(daemon: Daemon, spawn: Spawn) -> None:
    """No descriptor is passed here: bytes are."""
    daemon.script = reverse
    ours, theirs = socket.socketpair()
    with ours:
        ours.settimeout(DEADLINE)
        process = spawn("tunnel", "demo", "--remote-port", "80", "--stdio", stdin=theirs.fileno(), stdout=theirs.fileno())
        theirs.close()
        ours.sendall(b"hello")
        ours.shutdown(socket.SHUT_WR)
        received = b""
        while chunk := ours.recv(65536):
            received += chunk
    assert received == b"olleh"
    assert process.wait(DEADLINE) == 0


def test_stdio_ends_quietly_when_nobody_reads(daemon: Daemon, spawn: Spawn) -> None:
    def serve(request: dict[str, Any], sock: socket.socket) -> None:
        sock.sendall(b'{"ok":{}}\n')
        try:
            while True:
                sock.sendall(b"x" * 65536)
        except OSError:
            pass

    daemon.script = serve
    process = spawn("tunnel", "demo", "--remote-port", "80", "--stdio")
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.read(1)
    process.stdout.close()
    assert process.wait(DEADLINE) == 141
    assert process.stderr.read() == b""


def test_stdio_goes_with_no_local_port(daemon: Daemon, spawn: Spawn) -> None:
    process = spawn("tunnel", "demo", "--remote-port", "80", "--stdio", "--local-port", "80", stdin=subprocess.DEVNULL)
    _, err = process.communicate(timeout=DEADLINE)
    assert process.returncode == 2
    assert b"leave out --local-port" in err

"""exec in a sandbox without a guest: a process of its own, against a daemon that speaks the frames of text."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from client import execute
from gatewayd import api
from gatewayd.api import Frame

from .conftest import DEADLINE, PROJECT, Daemon, Spawn

OK = b'{"ok":{"pid":7,"command_id":"c"}}\n'
NO_GUEST = b'{"error":{"kind":"unsupported","message":"there is no Python","hint":""}}\n'
NOTE = b"sandbox: there is no Python: input and output can be text only\n"  # where there is input


class Peer:
    """The daemon's end of one exec."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self._decoder = api.FrameDecoder()

    def send(self, kind: int, payload: bytes = b"") -> None:
        self.sock.sendall(api.encode_frame(kind, payload))

    def exit(self, code: int) -> None:
        self.send(Frame.EXIT, json.dumps({"exit_code": code}).encode())

    def frames(self) -> Iterator[tuple[int, bytes]]:
        """Frames until the client closes."""
        while data := self.sock.recv(65536):
            yield from self._decoder.feed(data)
        assert self._decoder.pending == 0


def served(daemon: Daemon, script: Callable[[Peer], None]) -> None:
    def serve(request: dict[str, Any], sock: socket.socket) -> None:
        if request["op"] == api.OP_GUEST:
            sock.sendall(NO_GUEST)
            return
        sock.sendall(OK)
        script(Peer(sock))

    daemon.script = serve


def cat(peer: Peer) -> None:
    """What `cat; exit 3` does."""
    for kind, payload in peer.frames():
        if kind == Frame.STDIN:
            peer.send(Frame.STDOUT, payload)
        elif kind == Frame.STDIN_EOF:
            peer.exit(3)
            return


def test_the_request(daemon: Daemon, spawn: Spawn, monkeypatch: pytest.MonkeyPatch) -> None:
    served(daemon, lambda peer: peer.exit(0))
    monkeypatch.setenv("INHERITED", "from here")
    words = ["--", "sh", "-c", "echo $X", "--", "--format", "", "é", "a\nb"]
    options = ["--env", "A=b=c", "--env", "INHERITED", "--cwd", "/tmp", "--shell", "/bin/dash", "--timeout", "1.5"]
    process = spawn("exec", "demo", *options, "--profile", "work", *words, stdin=subprocess.DEVNULL)
    out, err = process.communicate(timeout=DEADLINE)
    assert (process.returncode, out, err) == (0, b"", b"")
    guest = daemon.lines.pop(0)
    assert (guest["op"], guest["sandbox"], guest["mode"], guest["wake"], guest["profile"]) == ("guest", "demo", 0, True, "work")
    assert daemon.lines == [
        {
            "op": "exec",
            "sandbox": "demo",
            "argv": ["sh", "-c", "echo $X", "--", "--format", "", "é", "a\nb"],
            "env": {"A": "b=c", "INHERITED": "from here"},
            "cwd": "/tmp",
            "shell": "/bin/dash",
            "timeout": 1.5,
            "pty": False,
            "close_stdin": True,
            "profile": "work",
        }
    ]


def test_streams_and_exit_code(daemon: Daemon, spawn: Spawn) -> None:
    def script(peer: Peer) -> None:
        peer.send(Frame.STDERR, b"err\xff")
        peer.send(Frame.STDOUT, b"out\0\xff")
        peer.send(Frame.STDOUT, b"x" * api.FRAME_MAX)
        peer.exit(41)

    served(daemon, script)
    process = spawn("exec", "demo", "--", "x")
    out, err = process.communicate(timeout=DEADLINE)
    assert (process.returncode, out, err) == (41, b"out\0\xff" + b"x" * api.FRAME_MAX, NOTE + b"err\xff")


@pytest.mark.parametrize(("told", "code"), [(0, 0), (255, 255), (137, 137), (-9, 137), (256, 0), (-500, 255)])
def test_exit_codes(daemon: Daemon, spawn: Spawn, told: int, code: int) -> None:
    served(daemon, lambda peer: peer.exit(told))
    assert spawn("exec", "demo", "--", "x", stdin=subprocess.DEVNULL).wait(DEADLINE) == code


def test_more_input_than_any_buffer_holds(daemon: Daemon, spawn: Spawn) -> None:
    served(daemon, cat)
    data = os.urandom(5_000_000)
    process = spawn("exec", "demo", "--", "cat")
    out, err = process.communicate(data, timeout=DEADLINE)
    assert (process.returncode, err) == (3, NOTE)
    assert out == data


def test_input_from_a_file_and_from_nowhere(daemon: Daemon, spawn: Spawn, tmp_path: Any) -> None:
    served(daemon, cat)
    file = tmp_path / "input"
    file.write_bytes(b"from a file")
    with file.open("rb") as stdin:
        out, _ = spawn("exec", "demo", "--", "cat", stdin=stdin).communicate(timeout=DEADLINE)
    assert out == b"from a file"
    assert daemon.lines[-1]["close_stdin"] is False
    served(daemon, lambda peer: peer.exit(0))
    assert spawn("exec", "demo", "--", "true", stdin=subprocess.DEVNULL).wait(DEADLINE) == 0
    assert daemon.lines[-1]["close_stdin"] is True


def test_the_command_may_end_before_its_input(daemon: Daemon, spawn: Spawn) -> None:
    served(daemon, lambda peer: peer.exit(0))
    assert spawn("exec", "demo", "--", "true").wait(DEADLINE) == 0  # standard input is still open


@pytest.mark.parametrize("closed", ["<&-", ">&-", "<&- >&- 2>&-"])
def test_closed_standard_streams(daemon: Daemon, home: object, closed: str) -> None:
    """The connection must not take the number of a stream that is closed."""

    def script(peer: Peer) -> None:
        peer.send(Frame.STDOUT, b"out\n")
        peer.send(Frame.STDERR, b"err\n")
        peer.exit(5)

    served(daemon, script)
    line = f'"$@" {closed}'
    done = subprocess.run(
        ["sh", "-c", line, "sh", sys.executable, "-m", "client", "exec", "demo", "--", "x"],
        input=b"not read",
        capture_output=True,
        cwd=PROJECT,
        timeout=DEADLINE,
        check=False,
    )
    assert done.returncode == 5
    assert done.stdout == (b"" if ">&- 2" in closed or closed == ">&-" else b"out\n")
    assert daemon.lines[-1]["close_stdin"] is closed.startswith("<&-")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_signals_kill_the_command(daemon: Daemon, spawn: Spawn, number: signal.Signals, code: int) -> None:
    seen: list[tuple[int, bytes]] = []
    runs, closed = threading.Event(), threading.Event()

    def script(peer: Peer) -> None:
        peer.send(Frame.STDOUT, b"running\n")
        for kind, payload in peer.frames():
            seen.append((kind, payload))
            if kind == Frame.SIGNAL:
                peer.exit(137)
                break
        closed.set()

    served(daemon, script)
    process = spawn("exec", "demo", "--", "sleep", "100")
    assert process.stdout is not None
    assert process.stdout.readline() == b"running\n"
    runs.set()
    process.send_signal(number)
    assert process.wait(DEADLINE) == code
    assert closed.wait(DEADLINE)
    assert seen == [(Frame.SIGNAL, b'{"signal":"KILL"}')]


def test_a_signal_while_input_waits_to_be_sent(daemon: Daemon, spawn: Spawn) -> None:
    """A frame that is partly sent is completed: the kill must not land inside it."""
    full, killed = threading.Event(), threading.Event()
    kinds: list[int] = []

    def script(peer: Peer) -> None:
        assert full.wait(DEADLINE)  # reads nothing until the client's buffers are full and it was interrupted
        for kind, _ in peer.frames():
            kinds.append(kind)
            if kind == Frame.SIGNAL:
                killed.set()

    served(daemon, script)
    read, write = os.pipe()
    process = spawn("exec", "demo", "--", "sleep", "100", stdin=read)
    os.close(read)
    os.set_blocking(write, False)
    written = 0
    idle = 0
    while idle < 10:  # until the client has stopped reading
        try:
            written += os.write(write, b"x" * 65536)
            idle = 0
        except BlockingIOError:
            idle += 1
            killed.wait(0.05)
    process.send_signal(signal.SIGINT)
    full.set()
    assert process.wait(DEADLINE) == 130
    assert killed.wait(DEADLINE)
    os.close(write)
    assert written > 1 << 20
    assert set(kinds[:-1]) == {Frame.STDIN}


def test_a_broken_pipe_ends_it_quietly(daemon: Daemon, spawn: Spawn) -> None:
    ended = threading.Event()

    def script(peer: Peer) -> None:
        try:
            while True:
                peer.send(Frame.STDOUT, b"y\n" * 1000)
        except OSError:
            ended.set()

    served(daemon, script)
    process = spawn("exec", "demo", "--", "yes")
    assert process.stdout is not None
    process.stdout.read(1)
    process.stdout.close()
    assert process.wait(DEADLINE) == 141
    assert process.stderr is not None
    assert process.stderr.read() == NOTE
    assert ended.wait(DEADLINE)


@pytest.mark.parametrize(
    ("frame", "code", "says"),
    [
        (api.encode_json_frame(Frame.ERROR, {"kind": "timeout", "message": "it ran for 5 s"}), 75, b"sandbox: it ran for 5 s\n"),
        (
            api.encode_json_frame(Frame.ERROR, {"kind": "unsupported", "message": "byte 7 is not UTF-8", "hint": "h"}),
            69,
            b"hint: h\n",
        ),
        (api.encode_frame(Frame.ERROR, b"x"), 70, b"without saying which"),
        (api.encode_frame(Frame.EXIT, b"{}"), 70, b"makes no sense"),
        (b"\xff" * 100, 70, b"makes no sense"),
        (b"", 69, b"closed the connection before the command ended"),
        (b"\0\0", 69, b"closed the connection"),
    ],
)
def test_failures(daemon: Daemon, spawn: Spawn, frame: bytes, code: int, says: bytes) -> None:
    served(daemon, lambda peer: peer.sock.sendall(frame))
    process = spawn("exec", "demo", "--", "x", stdin=subprocess.DEVNULL)
    out, err = process.communicate(timeout=DEADLINE)
    assert (process.returncode, out) == (code, b"")
    assert says in err


def test_an_unknown_sandbox(daemon: Daemon, spawn: Spawn) -> None:
    def serve(request: dict[str, Any], sock: socket.socket) -> None:
        sock.sendall(b'{"error":{"kind":"not_found","message":"there is no sandbox \'dmeo\'","hint":""}}\n')

    daemon.script = serve
    daemon.answer("GET", "/sandboxes", {"sandboxes": [{"name": "demo"}]})
    process = spawn("exec", "dmeo", "--", "x")
    _, err = process.communicate(timeout=DEADLINE)
    assert [line["op"] for line in daemon.lines] == ["guest"]
    assert (process.returncode, err) == (68, b"sandbox: there is no sandbox 'dmeo'\nhint: did you mean 'demo'?\n")


@pytest.mark.parametrize("option", [["--user", "me"], ["--detach"], ["--pty"]])
def test_what_text_cannot_do(daemon: Daemon, spawn: Spawn, option: list[str]) -> None:
    served(daemon, lambda peer: peer.exit(0))
    process = spawn("exec", "demo", *option, "--", "x")
    out, err = process.communicate(timeout=DEADLINE)
    assert (process.returncode, out, err) == (69, b"", f"sandbox: {option[0]} cannot be had: there is no Python\n".encode())


def test_a_word_that_is_not_utf8(daemon: Daemon, spawn: Spawn) -> None:
    served(daemon, lambda peer: peer.exit(0))
    process = spawn("exec", "demo", "--", "a\udcff", stdin=subprocess.DEVNULL)
    _, err = process.communicate(timeout=DEADLINE)
    assert process.returncode == 2
    assert b"is not UTF-8" in err
    assert [line["op"] for line in daemon.lines] == ["guest"]


def test_an_interruption_that_python_drops_is_raised_again(monkeypatch: pytest.MonkeyPatch) -> None:
    dropped: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", dropped.append)

    class Swallows:
        def __del__(self) -> None:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0)  # the handler runs here, and what it raises goes nowhere

    def work() -> None:
        with execute.interruptible():
            Swallows()
            assert len(dropped) == 1
            time.sleep(20)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(execute.Interrupted) as caught:
        work()
    assert caught.value.number == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)

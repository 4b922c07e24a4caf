"""console and exec --pty on a real terminal, over a real guest."""

from __future__ import annotations

import fcntl
import hashlib
import os
import pty
import re
import select
import signal
import struct
import subprocess
import tempfile
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from gatewayd.api import Frame

from .conftest import DEADLINE, Daemon, Spawn
from .guestworld import GuestWorld
from .test_cli import _own_terminal
from .test_execute import Peer, served


@pytest.fixture
def world(daemon: Daemon) -> Iterator[GuestWorld]:
    started = GuestWorld(daemon, Path(tempfile.mkdtemp(prefix="gw-")))
    yield started
    started.close()


class Screen:
    """A terminal with a program on it."""

    def __init__(self, spawn: Spawn, *args: str, erase: bytes = b"\x7f") -> None:
        self.leader, follower = pty.openpty()
        self.resize(100, 30)
        attributes = termios.tcgetattr(follower)
        attributes[6][termios.VERASE] = erase
        termios.tcsetattr(follower, termios.TCSANOW, attributes)
        self.before = termios.tcgetattr(follower)
        self.follower = follower  # kept: the terminal outlives the program
        self.process = spawn(*args, stdin=follower, stdout=follower, stderr=follower, preexec_fn=_own_terminal)
        self.shown = b""  # since the last `until`

    def resize(self, columns: int, rows: int) -> None:
        fcntl.ioctl(self.leader, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def type(self, data: bytes) -> None:
        while data:
            data = data[os.write(self.leader, data[:1000]) :]

    def until(self, pattern: bytes) -> bytes:
        """Wait for a pattern to be shown; what it matched."""
        end = time.monotonic() + DEADLINE
        while (match := re.search(pattern, self.shown)) is None:
            assert time.monotonic() < end, f"not shown: {pattern!r} in {self.shown[-2000:]!r}"
            if select.select([self.leader], [], [], 0.1)[0]:
                self.shown += os.read(self.leader, 65536)
        self.shown = self.shown[match.end() :]
        return match[0]

    def ended(self, code: int) -> None:
        """The program ends with `code`, and the terminal is as it was."""
        end = time.monotonic() + DEADLINE
        while self.process.poll() is None:  # what is still shown must be taken
            assert time.monotonic() < end, f"it did not end: {self.shown[-2000:]!r}"
            if select.select([self.leader], [], [], 0.02)[0]:
                self.shown += os.read(self.leader, 65536)
        assert (self.process.returncode, self.shown[-2000:]) == (code, self.shown[-2000:])
        assert termios.tcgetattr(self.follower) == self.before

    def close(self) -> None:
        os.close(self.leader)
        os.close(self.follower)


@pytest.fixture
def console(world: GuestWorld, spawn: Spawn) -> Iterator[Screen]:
    screen = Screen(spawn, "console", "demo", "--shell", "/bin/sh", "--env", "PS1=READY> ", "--env", "ENV=")
    screen.until(b"READY> ")
    yield screen
    screen.close()


def test_type_and_exit(console: Screen) -> None:
    console.type("echo ü$((40 + 2))€; tty; stty size; echo $TERM\r".encode())
    console.until("ü42€\r\n/dev/pts/[0-9]+\r\n30 100\r\n".encode())
    console.type(b"exit 9\r")
    console.ended(9)


def test_the_window_changes(console: Screen) -> None:
    console.resize(132, 43)
    console.type(b"stty size\r")
    console.until(b"43 132\r\n")


def test_an_interrupt_is_typed(console: Screen) -> None:
    console.type(b"sh -c 'echo run; exec sleep 1000'\r")  # says so once it is in the foreground
    console.until(b"run\r\n")
    console.type(b"\x03")
    console.until(b"READY> ")
    console.type(b"echo still here\r")
    console.until(b"here\r\nREADY> ")


def test_leave(console: Screen) -> None:
    console.type(b"echo $$\r")
    pid = int(console.until(rb"\r\n\d+\r\n"))
    console.type(b"~?")
    console.until(b"end the session")
    console.type(b"~.")
    console.ended(129)
    end = time.monotonic() + DEADLINE
    while Path(f"/proc/{pid}").exists():
        assert time.monotonic() < end, "the shell is gone, too"
        time.sleep(0.02)


def test_detach_and_attach(console: Screen, spawn: Spawn) -> None:
    console.type(b"X=kept\r")
    console.until(b"READY> ")
    console.type(b"~d")
    console.ended(0)
    assert re.search(rb"sandbox: detached; `sandbox attach demo [0-9a-f]{8}` comes back\r\n", console.shown)
    again = Screen(spawn, "attach", "demo")
    again.type(b"echo value=$X\r")
    again.until(b"value=kept\r\n")
    again.type(b"exit 3\r")
    again.ended(3)
    again.close()


def test_a_paste(console: Screen) -> None:
    """100 KB, with lines that would be escapes if they were typed."""
    lines = b"".join(b"line %06d of what was pasted\r" % number for number in range(3400))
    console.type(b"stty -echo -icanon -icrnl; printf '\\033[?2004h'; echo go; head -c %d | sha256sum\r" % (len(lines) + 20))
    console.until(b"go\r\n")
    pasted = b"\x1b[200~" + lines + b"~.\r~d\r\r\r" + b"\x1b[201~"
    assert len(pasted) == len(lines) + 20
    console.type(pasted)
    console.until(hashlib.sha256(pasted).hexdigest().encode())


def test_the_shell_outlives_connections(console: Screen, world: GuestWorld) -> None:
    for number in range(5):
        world.cut()
        console.type(b"echo round %d of $$\r" % number)
        console.until(b"round %d of [0-9]+\r\n" % number)


def test_keys_while_nobody_answers(console: Screen, world: GuestWorld) -> None:
    world.answers = [{"error": {"kind": "unavailable", "message": "the link is down"}}] * 1000
    world.cut()
    console.until("sandbox: connection to sandbox 'demo' lost, reconnecting…\r\n".encode())
    console.type(b"\r~?")
    console.until(b"end the session")
    console.type(b"~.")
    console.ended(129)


def test_a_full_screen_program_that_is_left(console: Screen) -> None:
    """Its modes do not stay behind."""
    console.type(b"printf '\\033[?1049h\\033[?25l\\033[?1000h full'\r")
    console.until(b"\x1b\\[\\?1000h full")
    console.type(b"\r~.")
    console.ended(129)
    assert b"\x1b[?1000l\x1b[?1049l\x1b[?25h\x1b[0m" in console.shown


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM])
def test_the_terminal_is_closed(console: Screen, number: signal.Signals) -> None:
    console.type(b"echo $$\r")
    pid = int(console.until(rb"\r\n\d+\r\n"))
    console.process.send_signal(number)
    console.ended(128 + number)
    end = time.monotonic() + DEADLINE
    while Path(f"/proc/{pid}").exists():
        assert time.monotonic() < end, "the shell is gone, too"
        time.sleep(0.02)


def test_exec_with_a_terminal(world: GuestWorld, spawn: Spawn) -> None:
    screen = Screen(spawn, "exec", "demo", "--pty", "--", "sh", "-c", "stty -a; stty size; read x; echo got $x; exit 4")
    screen.until(b"30 100\r\n")
    screen.type(b"this\r")
    screen.until(b"got this\r\n")
    screen.ended(4)
    screen.close()


def test_modes_go_along(world: GuestWorld, spawn: Spawn) -> None:
    screen = Screen(spawn, "exec", "demo", "-t", "--", "stty", "-a", erase=b"\x08")
    screen.until(rb"erase = \^H")
    screen.ended(0)
    screen.close()


def test_without_a_terminal(world: GuestWorld, spawn: Spawn) -> None:
    process = spawn("console", "demo", "--shell", "/bin/sh")
    out, err = process.communicate(b"echo $((1 + 1)); exit 5\n", timeout=DEADLINE)
    assert (process.returncode, out, err) == (5, b"2\n", b"")


def test_agents_are_refused(daemon: Daemon, spawn: Spawn) -> None:
    process = spawn("console", "demo", "--forward-ssh-agent", stdin=subprocess.DEVNULL)
    _, err = process.communicate(timeout=DEADLINE)
    assert process.returncode == 2
    assert b"ssh -A sandbox-demo" in err
    assert daemon.lines == []


def test_where_there_is_no_guest(daemon: Daemon, spawn: Spawn) -> None:
    """The service's own protocol carries the terminal: keys, sizes, and ~. which kills the shell."""
    frames: list[tuple[int, bytes]] = []

    def shell(peer: Peer) -> None:
        peer.send(Frame.STDOUT, b"READY> ")
        for kind, payload in peer.frames():
            frames.append((kind, payload))
            if kind == Frame.STDIN:
                peer.send(Frame.STDOUT, b"<" + payload + b">")
            elif kind == Frame.RESIZE:
                peer.send(Frame.STDOUT, b"resized")
            elif kind == Frame.SIGNAL:
                peer.exit(137)
                return

    served(daemon, shell)
    screen = Screen(spawn, "console", "demo", "--env", "A=b")
    screen.until(b"a plain console, which ends with its connection\r\n")
    screen.until(b"READY> ")
    request = daemon.lines[-1]
    assert (request["op"], request["pty"], request["cols"], request["rows"]) == ("exec", True, 100, 30)
    assert request["env"]["A"] == "b"
    screen.type("ü\x03".encode())
    screen.until(b"\x03>")
    screen.resize(70, 20)
    screen.until(b"resized")
    assert (Frame.RESIZE, b'{"cols": 70, "rows": 20}') in frames
    screen.type(b"\r~?")
    screen.until(b"end the session")
    screen.type(b"~.")
    screen.ended(129)
    assert frames[-1] == (Frame.SIGNAL, b'{"signal":"KILL"}')
    screen.close()
    screen = Screen(spawn, "console", "demo")
    screen.until(b"READY> ")
    screen.type(b"~d")
    screen.ended(69)
    assert b"cannot be left running" in screen.shown
    screen.close()

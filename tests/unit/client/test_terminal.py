"""A terminal (a real pseudo-terminal), its modes, and what a program has done to its screen."""

from __future__ import annotations

import fcntl
import os
import pty
import struct
import termios
from collections.abc import Iterator

import pytest

from client.terminal import SIZE_DEFAULT, Screen, Terminal, environment


@pytest.fixture
def tty() -> Iterator[int]:
    leader, follower = pty.openpty()
    yield follower
    os.close(leader)
    os.close(follower)


def decoded(modes: bytes) -> dict[int, int]:
    """RFC 4254, section 8."""
    assert modes[-1] == 0
    return dict(struct.iter_unpack(">BI", modes[:-1]))


def test_raw_and_back(tty: int) -> None:
    before = termios.tcgetattr(tty)
    terminal = Terminal(tty)
    terminal.raw()
    terminal.raw()
    now = termios.tcgetattr(tty)
    assert terminal.is_raw
    assert not now[3] & (termios.ICANON | termios.ECHO | termios.ISIG | termios.IEXTEN)
    assert not now[1] & termios.OPOST
    assert not now[0] & (termios.IXON | termios.ICRNL)
    assert now[6][termios.VMIN] == 1 or now[6][termios.VMIN] == b"\x01"
    terminal.restore()
    terminal.restore()
    assert termios.tcgetattr(tty) == before
    assert not terminal.is_raw


def test_what_is_typed_early_stays(tty: int) -> None:
    leader, follower = pty.openpty()
    os.write(leader, b"early\n")
    Terminal(follower).raw()
    assert os.read(follower, 64) == b"early\n"
    os.close(leader)
    os.close(follower)


def test_size(tty: int) -> None:
    assert Terminal(tty).size() == SIZE_DEFAULT  # it has none yet
    fcntl.ioctl(tty, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 132, 1056, 800))
    assert Terminal(tty).size() == (132, 50, 1056, 800)
    read, write = os.pipe()
    assert Terminal(read).size() == SIZE_DEFAULT
    assert Terminal.found(read, tty) is not None
    assert Terminal.found(read, write) is None
    assert Terminal(read).modes() == b""
    Terminal(read).raw()  # says nothing, does nothing
    os.close(read)
    os.close(write)


def test_modes(tty: int) -> None:
    attributes = termios.tcgetattr(tty)
    attributes[6][termios.VERASE] = b"\x08"
    attributes[6][termios.VSUSP] = b"\x00"
    attributes[0] &= ~termios.IXON
    attributes[3] |= termios.TOSTOP
    termios.tcsetattr(tty, termios.TCSANOW, attributes)
    modes = decoded(Terminal(tty).modes())
    assert (modes[1], modes[3], modes[10]) == (3, 8, 255)  # VINTR, VERASE; VSUSP is off
    assert (modes[38], modes[36], modes[51], modes[53], modes[58], modes[70], modes[72]) == (0, 1, 1, 1, 1, 1, 1)
    assert modes[91] == 1  # CS8
    assert modes[128] == modes[129] == 38400


@pytest.mark.parametrize(
    ("output", "undo"),
    [
        (b"plain", b""),
        (b"\x1b[31mred\x1b[0m", b""),
        (b"\x1b[?1049h full screen \x1b[?1049l", b""),
        (b"\x1b[?1049h full screen", b"\x1b[?1049l\x1b[0m"),
        (b"\x1b[?25l", b"\x1b[?25h\x1b[0m"),
        (b"\x1b[?1000;1006h\x1b[?1000l", b"\x1b[?1006l\x1b[0m"),
        (b"\x1b[?2004h$ \x1b[?2004l\r\x1b[?2004h", b"\x1b[?2004l\x1b[0m"),
        (b"\x1b[?7h\x1b[?12h", b""),  # not ours to undo
        (b"\x1b[?" + b"1;" * 100 + b"h", b""),
    ],
)
def test_screen(output: bytes, undo: bytes) -> None:
    whole, pieces = Screen(), Screen()
    whole.follow(output)
    for byte in output:
        pieces.follow(bytes((byte,)))
    assert whole.undo() == undo
    assert pieces.undo() == undo
    assert whole.undo() == b""


def test_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        monkeypatch.delenv(name)
    shown = {"COLORTERM": "truecolor", "LANG": "C.UTF-8", "LC_TIME": "C", "NO_COLOR": "1", "FORCE_COLOR": "3", "CLICOLOR": "1"}
    for name, value in {**shown, "TERM": "xterm", "SECRET": "s", "LANGUAGE": "de", "PATH": "/bin"}.items():
        monkeypatch.setenv(name, value)
    assert dict(environment()) == shown

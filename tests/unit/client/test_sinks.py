"""Standard streams written without waiting: pipes, terminals, sockets, files."""

from __future__ import annotations

import fcntl
import os
import pty
import signal
import socket
import subprocess
import sys
import termios
import tracemalloc
from pathlib import Path

import pytest

from client.proxy import Failure
from client.sinks import Sink

from .conftest import DEADLINE, PROJECT

BIG = os.urandom(1 << 20)


def drained(sink: Sink, reader: int, size: int) -> bytes:
    """What comes out while the sink is flushed."""
    got = b""
    while len(got) < size:
        got += os.read(reader, 65536)
        sink.flush()
    return got


@pytest.mark.parametrize("kind", ["pipe", "socket"])
def test_it_never_waits_and_loses_nothing(kind: str) -> None:
    ends = os.pipe() if kind == "pipe" else [sock.detach() for sock in socket.socketpair()]
    reader, writer = ends
    flags = fcntl.fcntl(writer, fcntl.F_GETFL)
    sink = Sink(writer)
    taken = sink.write(BIG)
    assert 0 < taken < len(BIG)
    assert sink.size == len(BIG) - taken
    assert sink.write(b"more") == 0  # behind what waits
    assert fcntl.fcntl(writer, fcntl.F_GETFL) == flags  # which other programs share
    assert drained(sink, reader, len(BIG) + 4) == BIG + b"more"
    assert sink.size == 0
    sink.close()
    sink.close()
    os.close(reader)
    os.close(writer)


def test_small_pieces_take_hardly_more_than_their_bytes() -> None:
    """What a guest sends byte by byte, to a reader that waits."""
    reader, writer = os.pipe()
    sink = Sink(writer)
    sink.write(BIG)
    tail = os.urandom(150_000)
    tracemalloc.start()
    try:
        for byte in tail:
            assert sink.write(b"%c" % byte) == 0
        used, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert used < 2 * len(tail)
    sink.write(BIG[:5000])  # one that is not small, then again those that are
    assert sink.write(b"e") == sink.write(b"nd") == 0
    expected = BIG + tail + BIG[:5000] + b"end"
    assert drained(sink, reader, len(expected)) == expected
    assert sink.size == 0
    sink.close()
    os.close(reader)
    os.close(writer)


def test_a_piece_joined_to_one_that_is_partly_written() -> None:
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
    sink = Sink(writer)
    expected = b""
    got = b""
    for turn in range(200):
        piece = bytes([turn]) * (1 + 97 * turn % 4095)
        expected += piece
        sink.write(piece)
        if turn % 3 == 0:
            got += os.read(reader, 1000)
            sink.flush()
    got += drained(sink, reader, len(expected) - len(got))
    assert got == expected
    assert sink.size == 0
    sink.close()
    os.close(reader)
    os.close(writer)


def test_a_terminal_that_is_not_read() -> None:
    leader, follower = pty.openpty()
    attributes = termios.tcgetattr(follower)
    attributes[1] &= ~termios.OPOST
    termios.tcsetattr(follower, termios.TCSANOW, attributes)
    sink = Sink(follower)
    taken = sink.write(BIG)
    assert taken < len(BIG)
    assert not fcntl.fcntl(follower, fcntl.F_GETFL) & os.O_NONBLOCK
    assert drained(sink, leader, len(BIG)) == BIG
    sink.close()
    os.close(leader)
    os.close(follower)


def test_a_file(tmp_path: Path) -> None:
    with (tmp_path / "out").open("wb") as file:
        sink = Sink(file.fileno())
        assert sink.write(BIG) == len(BIG)
        sink.close()
    assert (tmp_path / "out").read_bytes() == BIG


def test_nobody_reads() -> None:
    reader, writer = os.pipe()
    sink = Sink(writer)
    sink.write(BIG)
    os.close(reader)
    with pytest.raises(BrokenPipeError):
        sink.flush()
    assert sink.size == 0
    sink.end()  # becomes the null device
    assert os.write(writer, b"x") == 1
    os.close(writer)


def test_nobody_has_read_from_the_beginning() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    sink = Sink(writer)
    with pytest.raises(BrokenPipeError):
        sink.write(b"x")
    os.close(writer)


def test_the_end_is_passed_on() -> None:
    reader, writer = os.pipe()
    sink = Sink(writer)
    sink.write(b"last")
    sink.end()
    assert os.read(reader, 64) == b"last"
    assert os.read(reader, 64) == b""
    os.close(reader)
    os.close(writer)


def test_a_full_disk() -> None:
    with Path("/dev/full").open("wb", buffering=0) as file, pytest.raises(Failure, match="No space left"):
        Sink(file.fileno()).write(b"x")


SIGNALS = """
import os, select, signal, sys
from client.signals import Signals, exit_code, name_of
signal.signal(signal.SIGHUP, signal.SIG_IGN)
with Signals((signal.SIGINT, signal.SIGTERM, signal.SIGHUP)) as signals:
    print("ready", flush=True)
    seen = 0
    while seen < 3:
        assert select.select([signals.fd], [], [], 20)[0]
        for number in signals.take():
            seen += 1
            print(name_of(number), flush=True)
    print(signals.take(), exit_code("INT"), exit_code("KILL"), exit_code("LOST"), flush=True)
assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
os.kill(os.getpid(), signal.SIGTERM)
"""


def test_signals() -> None:
    process = subprocess.Popen([sys.executable, "-c", SIGNALS], stdout=subprocess.PIPE, text=True, cwd=PROJECT)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGHUP)  # stays ignored
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGINT):
        process.send_signal(number)
        assert process.stdout.readline() == f"{number.name[3:]}\n"
    out = process.stdout.read()  # communicate() with a timeout would miss what came along with the last line
    process.stdout.close()
    assert out == "[] 130 137 255\n"
    assert process.wait(DEADLINE) == -signal.SIGTERM

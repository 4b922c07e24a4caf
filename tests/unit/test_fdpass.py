from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from gatewayd.fdpass import recv_fds, send_fds


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    left, right = socket.socketpair()
    with left, right:
        yield left, right


def open_fds() -> set[str]:
    return {path.name for path in Path("/proc/self/fd").iterdir()}


def test_a_descriptor_arrives_close_on_exec(pair: tuple[socket.socket, socket.socket]) -> None:
    read_end, write_end = os.pipe()
    send_fds(pair[0], [write_end])
    data, (fd,) = recv_fds(pair[1])
    assert data == b"\0"
    assert fcntl.fcntl(fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
    os.write(fd, b"through")
    assert os.read(read_end, 10) == b"through"
    for each in (read_end, write_end, fd):
        os.close(each)


def test_several_with_data(pair: tuple[socket.socket, socket.socket]) -> None:
    send_fds(pair[0], [0, 1, 2], b"three")
    data, fds = recv_fds(pair[1], size=16, max_fds=3)
    assert (data, len(fds)) == (b"three", 3)
    for fd in fds:
        os.close(fd)


def test_too_many_are_all_closed(pair: tuple[socket.socket, socket.socket]) -> None:
    before = open_fds()
    send_fds(pair[0], [0, 1, 2, 2, 2])
    with pytest.raises(OSError, match="more than 1"):
        recv_fds(pair[1], max_fds=1)
    assert open_fds() == before


def test_plain_data_and_the_end(pair: tuple[socket.socket, socket.socket]) -> None:
    pair[0].send(b"x")
    assert recv_fds(pair[1]) == (b"x", [])
    pair[0].close()
    assert recv_fds(pair[1]) == (b"", [])


def test_descriptors_need_a_byte(pair: tuple[socket.socket, socket.socket]) -> None:
    with pytest.raises(ValueError, match="one byte"):
        send_fds(pair[0], [0], b"")

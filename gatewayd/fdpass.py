"""Descriptors over a Unix socket (SCM_RIGHTS)."""

from __future__ import annotations

import array
import os
import socket

_FD_SIZE = array.array("i").itemsize


def send_fds(sock: socket.socket, fds: list[int], data: bytes = b"\0") -> None:
    """Send `fds` with `data`; the receiver gets duplicates, ours stay open.

    One byte is what OpenSSH expects of a ``ProxyUseFdpass`` command.

    Raises:
        ValueError: `data` is empty: descriptors travel only with at least one byte.
        OSError: the peer is gone, or not all of `data` was taken.
    """
    if not data:
        raise ValueError("descriptors travel only with at least one byte")
    sent = sock.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))])
    if sent != len(data):
        raise OSError(f"sent {sent} of {len(data)} bytes with the descriptors")


def recv_fds(sock: socket.socket, size: int = 1, max_fds: int = 1) -> tuple[bytes, list[int]]:
    """Receive up to `size` bytes and the descriptors that came with them, close-on-exec.

    Returns ``(b"", [])`` at the end of the stream. When anything is wrong, every descriptor received is closed again.

    Raises:
        OSError: more than `max_fds` descriptors were sent, or the socket failed.
    """
    data, ancillary, flags, _ = sock.recvmsg(size, socket.CMSG_SPACE(max_fds * _FD_SIZE), socket.MSG_CMSG_CLOEXEC)
    fds: list[int] = []
    for level, kind, payload in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            received = array.array("i")
            received.frombytes(payload[: len(payload) - len(payload) % _FD_SIZE])
            fds.extend(received)
    if flags & socket.MSG_CTRUNC or len(fds) > max_fds:
        for fd in fds:
            os.close(fd)
        raise OSError(f"more than {max_fds} descriptors were sent")
    return data, fds

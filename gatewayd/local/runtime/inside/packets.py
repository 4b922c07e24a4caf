"""The wire between the service and the programs beside a sandbox: one JSON object a packet, descriptors beside it.

The socket is AF_UNIX SOCK_SEQPACKET, so a packet arrives whole or not at all and its descriptors arrive with it.
"""

from __future__ import annotations

import array
import errno
import json
import os
import socket
from typing import Any, Protocol

MAX_PACKET = 192 * 1024  # bytes; stays below the kernel's default socket buffer (212,992)
MAX_FDS = 3  # a process's stdin, stdout, stderr


Request = dict[str, Any]  # what the service asks: ``op``, ``id`` and the operation's own fields


class Answer(Protocol):
    """Answers a request."""

    def __call__(self, request: Request, ok: dict[str, Any], fds: tuple[int, ...] = ()) -> None:
        """Say that it was done, with the results and copies of the descriptors. Raises OSError, ValueError."""


class PacketError(Exception):
    """The other side sent what is no packet: it cannot be trusted further."""


def encode(message: dict[str, Any]) -> bytes:
    """One packet. Raises ValueError when it would be larger than MAX_PACKET."""
    data = json.dumps(message, separators=(",", ":")).encode("utf-8", "surrogateescape")
    if len(data) > MAX_PACKET:
        raise ValueError(f"{len(data)} bytes, at most {MAX_PACKET}")
    return data


def send(sock: socket.socket, message: dict[str, Any], fds: tuple[int, ...] = ()) -> None:
    """Send one packet with its descriptors. Raises OSError, ValueError."""
    data = encode(message)
    if fds:
        socket.send_fds(sock, [data], list(fds))
    else:
        sock.send(data)


def receive(sock: socket.socket) -> tuple[dict[str, Any], list[int]] | None:
    """The next packet and its descriptors (close-on-exec), or None at the end.

    When descriptors did not fit, into the buffer or into this process's table, none is kept and the packet says EMFILE beside
    what it says: what was done to make them is done.

    Raises:
        PacketError: truncated, not JSON, or not an object; its descriptors are closed.
        OSError: as recvmsg(2), BlockingIOError included.
    """
    fds = array.array("i")
    size = socket.CMSG_SPACE(MAX_FDS * fds.itemsize)
    data, ancillary, flags, _ = sock.recvmsg(MAX_PACKET + 1, size, socket.MSG_CMSG_CLOEXEC)
    for level, kind, payload in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(payload[: len(payload) - len(payload) % fds.itemsize])
    if not data and not fds:
        return None
    try:
        if flags & socket.MSG_TRUNC:
            raise PacketError("a truncated packet")
        message = json.loads(data)
        if not isinstance(message, dict):
            raise PacketError("a packet that is no object")
    except (ValueError, RecursionError, PacketError) as exc:
        close_all(fds)
        raise exc if isinstance(exc, PacketError) else PacketError("a packet that is no JSON") from exc
    if flags & socket.MSG_CTRUNC:
        close_all(fds)
        return {**message, "errno": errno.EMFILE, "where": "descriptors"}, []
    return message, list(fds)


def close_all(fds: list[int] | array.array[int]) -> None:
    """Close descriptors that nobody wants."""
    for fd in fds:
        os.close(fd)

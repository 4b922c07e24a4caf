"""The first bytes of a connection: is it TLS, and for which name (RFC 8446 section 4.1.2, RFC 6066 section 3). Pure."""

from __future__ import annotations

import struct
from dataclasses import dataclass

MAX_HELLO = 64 * 1024  # bytes of a ClientHello that are waited for
_MAX_RECORDS = 16  # that it comes in: all are looked at again after each read
_HANDSHAKE, _CLIENT_HELLO, _SERVER_NAME, _HOST_NAME = 22, 1, 0, 0
_METHODS = (b"GET", b"HEAD", b"POST", b"PUT", b"DELETE", b"OPTIONS", b"PATCH", b"TRACE", b"CONNECT", b"PRI")


@dataclass(frozen=True)
class Hello:
    """A ClientHello."""

    name: str | None  # server_name; None: it has none


@dataclass(frozen=True)
class Plain:
    """Something else."""

    http: bool  # it begins as an HTTP request does


@dataclass(frozen=True)
class Endless:
    """A ClientHello that is longer, or in more pieces, than is waited for: nobody can say for which name."""


class _Short(Exception):
    """More bytes are needed."""


class _Pieces(Exception):
    """More records than are looked at."""


class _Bad(Exception):
    """Not a ClientHello."""


def classify(data: bytes) -> Hello | Plain | Endless | None:
    """What a client has begun; None when that cannot be said yet."""
    if not data:
        return None
    if data[0] != _HANDSHAKE:
        word = data[:8].partition(b" ")
        if word[1]:
            return Plain(http=word[0] in _METHODS)
        return None if len(data) < 8 and any(method.startswith(data) for method in _METHODS) else Plain(http=False)
    try:
        return Hello(_server_name(_Reader(_handshake(data))))
    except _Short:
        return None if len(data) < MAX_HELLO else Endless()
    except _Pieces:
        return Endless()
    except _Bad:
        return Plain(http=False)


def _handshake(data: bytes) -> bytes:
    """The ClientHello's body, out of as many records as it takes."""
    body, at, wanted, records = bytearray(), 0, 4, 0
    while len(body) < wanted:
        if records == _MAX_RECORDS:
            raise _Pieces
        records += 1
        if at + 5 > len(data):
            raise _Short
        kind, major, length = data[at], data[at + 1], struct.unpack_from(">H", data, at + 3)[0]
        if kind != _HANDSHAKE or major != 3 or not 0 < length <= 1 << 14:
            raise _Bad
        body += data[at + 5 : at + 5 + length]
        if len(body) >= 4:
            if body[0] != _CLIENT_HELLO:
                raise _Bad
            wanted = 4 + int.from_bytes(body[1:4], "big")
        if at + 5 + length > len(data) and len(body) < wanted:
            raise _Short
        at += 5 + length
    return bytes(body[4:wanted])


class _Reader:
    """Reads vectors of a message that is there as a whole."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def take(self, count: int) -> bytes:
        if count > len(self.data):
            raise _Bad
        taken, self.data = self.data[:count], self.data[count:]
        return taken

    def vector(self, width: int) -> bytes:
        return self.take(int.from_bytes(self.take(width), "big"))


def _server_name(hello: _Reader) -> str | None:
    hello.take(2 + 32)
    for width in (1, 2, 1):  # session id, cipher suites, compression methods
        hello.vector(width)
    if not hello.data:
        return None
    extensions = _Reader(hello.vector(2))
    while extensions.data:
        kind = int.from_bytes(extensions.take(2), "big")
        content = _Reader(extensions.vector(2))
        if kind == _SERVER_NAME:
            names = _Reader(content.vector(2))
            while names.data:
                name_type, name = names.take(1)[0], names.vector(2)
                if name_type == _HOST_NAME:
                    return name.decode("latin-1")
    return None

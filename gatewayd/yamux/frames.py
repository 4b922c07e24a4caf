"""yamux frames: the 12-byte header, its constants, and the reader that cuts a byte stream into frames.

Pure: bytes in, headers and payload pieces out. Layout and numbers as in hashicorp's specification, version 0:
https://github.com/hashicorp/yamux/blob/master/spec.md
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from enum import IntEnum
from typing import Final, NamedTuple

PROTOCOL_VERSION: Final = 0
HEADER_SIZE: Final = 12  # bytes
INITIAL_WINDOW: Final = 256 * 1024  # bytes each side may send on a fresh stream before any window update
MAX_U32: Final = 0xFFFF_FFFF  # largest stream id, length, window delta

_HEADER: Final = struct.Struct(">BBHII")  # version, type, flags, stream id, length; big-endian


class FrameType(IntEnum):
    """Header byte 1."""

    DATA = 0  # length bytes of payload follow
    WINDOW_UPDATE = 1  # length is the number of bytes the receiver may send in addition
    PING = 2  # length is an opaque value that the answer repeats
    GO_AWAY = 3  # length is a GoAwayCode


class Flag:
    """Bits of header bytes 2–3; unknown ones are ignored, as hashicorp's library does. Plain integers: tested per frame."""

    NONE: Final = 0
    SYN: Final = 1  # opens the stream, or asks for a ping answer
    ACK: Final = 2  # accepts the stream, or answers a ping
    FIN: Final = 4  # the sender will send no more data on this stream
    RST: Final = 8  # the stream is gone at once, in both directions


class GoAwayCode(IntEnum):
    """Length field of a GO_AWAY frame."""

    NORMAL = 0  # no new streams, the present ones go on
    PROTOCOL_ERROR = 1
    INTERNAL_ERROR = 2


class ProtocolViolation(Exception):
    """The peer's bytes break the protocol; caught by the session, never seen outside the package."""


class Header(NamedTuple):
    """One decoded header. `type` and `flags` are plain integers: comparing them with the enums above is cheap that way."""

    type: int
    flags: int
    stream_id: int
    length: int  # bytes, delta, opaque value or code, by type


def encode_header(frame_type: FrameType, flags: int, stream_id: int, length: int) -> bytes:
    """The 12 bytes of one header."""
    return _HEADER.pack(PROTOCOL_VERSION, frame_type, flags, stream_id, length)


class FrameReader:
    """Cuts an ordered byte stream into headers and pieces of payload, whatever the boundaries it arrives in.

    A DATA header with a length is followed by one or more `bytes` pieces of that length together: payload is handed on as
    it arrives, so a frame of any size needs no memory here.
    """

    def __init__(self) -> None:
        self._partial = bytearray()  # an incomplete header: 0–11 bytes
        self._payload_left = 0  # payload bytes of the present DATA frame that have not arrived

    @property
    def payload_left(self) -> int:
        """Bytes of the present frame's payload still to come; 0 between frames."""
        return self._payload_left

    @property
    def at_boundary(self) -> bool:
        """True when the bytes so far end exactly with a frame."""
        return not self._payload_left and not self._partial

    def feed(self, data: bytes | memoryview) -> Iterator[Header | bytes]:
        """Yield what `data` completes. Consume the iterator to its end before the next call.

        Raises:
            ProtocolViolation: unknown version or frame type; the reader is of no use afterwards.
        """
        pos, end = 0, len(data)
        while pos < end:
            if self._payload_left:
                take = min(self._payload_left, end - pos)
                self._payload_left -= take
                pos += take
                yield bytes(data[pos - take : pos])  # the only copy: a view would pin the whole message
                continue
            if self._partial or end - pos < HEADER_SIZE:
                take = min(HEADER_SIZE - len(self._partial), end - pos)
                self._partial += data[pos : pos + take]
                pos += take
                if len(self._partial) < HEADER_SIZE:
                    return
                version, frame_type, flags, stream_id, length = _HEADER.unpack(self._partial)
                self._partial.clear()
            else:
                version, frame_type, flags, stream_id, length = _HEADER.unpack_from(data, pos)
                pos += HEADER_SIZE
            if version != PROTOCOL_VERSION:
                raise ProtocolViolation(f"frame of unknown version {version}")
            if frame_type > FrameType.GO_AWAY:
                raise ProtocolViolation(f"frame of unknown type {frame_type}")
            if frame_type == FrameType.DATA:
                self._payload_left = length
            yield Header(frame_type, flags, stream_id, length)

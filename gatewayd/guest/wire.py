"""The bytes between a client and the guest: frames, fields, the first bytes of a connection (docs/guest-protocol.md).

Pure, and standard library only: the daemon and the command use it alike, so importing it must cost next to nothing. What comes
out of a sandbox is hostile: every decoder here checks sizes and types, and raises `GuestProtocolError` and nothing else.
"""

from __future__ import annotations

import struct

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

MAGIC = b"GWG1"
VERSION = 1
TOKEN_SIZE = 32  # bytes
ID_SIZE = 16  # bytes of a session id
PREFACE_SIZE = 61  # bytes a client begins with
ANSWER_SIZE = 21  # bytes the guest answers with
HEADER_SIZE = 5  # bytes before a payload
PAYLOAD_MAX = 262_144  # bytes of one payload
INPUT_WINDOW = 262_144  # bytes of input that may be under way before the first CREDIT
WINDOW = 1 << 20  # bytes of output of one stream before the first GRANT, and of input once opened, unless OPEN says otherwise
WINDOW_MAX = 16 << 20
ACK_BYTES = 65_536  # received bytes after which an acknowledgement is sent at the latest
ACK_DELAY = 1.0  # seconds after which one is sent at the latest
LINGER = 300  # seconds the guest keeps a session without a connection, unless OPEN says otherwise
LINGER_MAX = 604_800
NUMBERED_BELOW = 0x80  # types below are numbered, kept, and sent again after a resume
STDOUT, STDERR = 1, 2  # stream numbers

_HEADER = struct.Struct(">BI")  # type, length
_PREFACE = struct.Struct(">4s32s16sBQ")  # magic, token, session id, mode, received
_ANSWER = struct.Struct(">BQQI")  # status, received, base, credit
_FIELD = struct.Struct(">I")  # length of a value


class Kind:
    """Types of frames. Plain integers: compared for every frame."""

    OPEN = 0x01
    INPUT = 0x02
    INPUT_EOF = 0x03
    GRANT = 0x04
    SIGNAL = 0x05
    RESIZE = 0x06
    STOP_OUTPUT = 0x07
    CLOSE = 0x08
    OPENED = 0x41
    OUTPUT = 0x42
    ERROUT = 0x43
    OUTPUT_EOF = 0x44
    CREDIT = 0x45
    EXIT = 0x46
    ERROR = 0x47
    ACCEPTED = 0x48
    INPUT_STOP = 0x49
    ITEM = 0x4A
    ACK = 0x80
    DETACHED = 0x81


class Mode:
    """What a connection is for: byte 52 of the preface."""

    OPEN = 0
    RESUME = 1
    ATTACH = 2


class Status:
    """The first byte of the guest's answer."""

    OK = 0
    NO_SESSION = 1
    TOO_MANY = 2
    GONE = 3
    BAD_REQUEST = 4


STATUS_TEXT = {
    Status.NO_SESSION: "the sandbox has no such session",
    Status.TOO_MANY: "too many sessions in the sandbox",
    Status.GONE: "output that was asked for is gone",
    Status.BAD_REQUEST: "the guest does not understand the request",
}


class GuestProtocolError(ValueError):
    """The guest sent what the protocol does not allow; the session is of no use any more."""


class Answer:
    """What the guest says to a preface."""

    __slots__ = ("base", "credit", "received", "status")

    def __init__(self, status: int, received: int, base: int, credit: int) -> None:
        self.status = status  # one of Status
        self.received = received  # numbered bytes of the client's that the guest has
        self.base = base  # number of the first byte that the guest will send
        self.credit = credit  # bytes of input the client may send beyond those that the guest has

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Answer) and self._values() == other._values()

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return "Answer(status={}, received={}, base={}, credit={})".format(*self._values())

    def _values(self) -> tuple[int, int, int, int]:
        return self.status, self.received, self.base, self.credit


def encode_preface(token: bytes, session_id: bytes, mode: int, received: int) -> bytes:
    """The 61 bytes of a client. Raises ValueError for a token or an id of another size."""
    if len(token) != TOKEN_SIZE or len(session_id) != ID_SIZE:
        raise ValueError("a token has 32 bytes, a session id 16")
    return _PREFACE.pack(MAGIC, token, session_id, mode, received)


def decode_preface(data: bytes) -> tuple[bytes, bytes, int, int]:
    """Token, session id, mode and count of a client's first bytes (what a guest does). Raises GuestProtocolError."""
    if len(data) != PREFACE_SIZE or not data.startswith(MAGIC):
        raise GuestProtocolError("the connection does not begin as a client's")
    _, token, session_id, mode, received = _PREFACE.unpack(data)
    return token, session_id, mode, received


def encode_answer(answer: Answer) -> bytes:
    """The 21 bytes of a guest."""
    return _ANSWER.pack(answer.status, answer.received, answer.base, answer.credit)


def decode_answer(data: bytes) -> Answer:
    """Raises GuestProtocolError."""
    if len(data) != ANSWER_SIZE:
        raise GuestProtocolError(f"the guest answered with {len(data)} bytes")
    answer = Answer(*_ANSWER.unpack(data))
    if answer.status > Status.BAD_REQUEST:
        raise GuestProtocolError(f"the guest answered with the unknown status {answer.status}")
    return answer


def encode_frame(kind: int, payload: bytes = b"") -> bytes:
    """One frame. Raises ValueError for a payload above `PAYLOAD_MAX`."""
    if len(payload) > PAYLOAD_MAX:
        raise ValueError(f"a frame of {len(payload)} bytes, the limit is {PAYLOAD_MAX}")
    return _HEADER.pack(kind, len(payload)) + payload


class FrameDecoder:
    """Cuts an ordered byte stream into frames, whatever the boundaries it arrives in. Holds less than one frame."""

    def __init__(self) -> None:
        self._head = b""  # an incomplete header: 0-4 bytes
        self._kind = 0  # type of the present frame, once its header is whole
        self._missing = -1  # bytes of its payload that have not arrived; -1 before the header is whole
        self._parts: list[bytes | memoryview] = []  # of its payload

    def feed(self, data: bytes) -> list[tuple[int, bytes]]:
        """The frames (type, payload) that `data` completes.

        Raises:
            GuestProtocolError: a frame is too long; the decoder is of no use afterwards.
        """
        frames: list[tuple[int, bytes]] = []
        pos, end = 0, len(data)
        while True:
            if self._missing < 0:
                if self._head or end - pos < HEADER_SIZE:
                    step = HEADER_SIZE - len(self._head)
                    self._head += data[pos : pos + step]
                    if len(self._head) < HEADER_SIZE:
                        return frames
                    self._kind, length = _HEADER.unpack(self._head)
                    self._head = b""
                    pos += step
                else:
                    self._kind, length = _HEADER.unpack_from(data, pos)
                    pos += HEADER_SIZE
                if length > PAYLOAD_MAX:
                    raise GuestProtocolError(f"a frame of {length} bytes, the limit is {PAYLOAD_MAX}")
                self._missing = length
            if end - pos < self._missing:
                if pos < end:
                    # A small piece is copied: a view would keep the whole of `data`.
                    rest = memoryview(data)[pos:]
                    self._parts.append(rest if len(rest) * 2 >= end else bytes(rest))
                    self._missing -= end - pos
                return frames
            piece = data[pos : pos + self._missing]
            pos += self._missing
            self._missing = -1
            if self._parts:
                self._parts.append(piece)
                piece = b"".join(self._parts)
                self._parts.clear()
            frames.append((self._kind, piece))
            if pos == end:
                return frames


def encode_fields(fields: Iterable[tuple[str, bytes]]) -> bytes:
    """A sequence of keys and values. Raises ValueError for a key that is not 1 to 255 ASCII characters."""
    parts: list[bytes] = []
    for key, value in fields:
        name = key.encode("ascii")
        if not 0 < len(name) < 256:
            raise ValueError(f"a field called {key!r}")
        parts += (bytes((len(name),)), name, _FIELD.pack(len(value)), value)
    return b"".join(parts)


def decode_fields(payload: bytes) -> list[tuple[str, bytes]]:
    """Keys and values in their order. Raises GuestProtocolError when the payload does not end with a value."""
    fields: list[tuple[str, bytes]] = []
    pos, end = 0, len(payload)
    while pos < end:
        start = pos + 1
        pos = start + payload[pos]
        if pos + 4 > end:
            raise GuestProtocolError("a field is cut off")
        key = payload[start:pos]
        if not key or not key.isascii():
            raise GuestProtocolError("a field whose key is not ASCII")
        (length,) = _FIELD.unpack_from(payload, pos)
        pos += 4 + length
        if pos > end:
            raise GuestProtocolError("a field is cut off")
        fields.append((key.decode("ascii"), payload[pos - length : pos]))
    return fields


def number(value: bytes, largest: int) -> int:
    """A decimal number from a field. Raises GuestProtocolError when it is none, or above `largest`."""
    if not value.isdigit() or len(value) > 20 or int(value) > largest:
        raise GuestProtocolError(f"the number {value[:24]!r} in a field")
    return int(value)


def text(value: bytes, limit: int = 500) -> str:
    """Text from a field, fit for a message: one line without control characters, at most `limit` characters."""
    line = value[: 4 * limit + 4].decode("utf-8", "replace")
    line = "".join(char if char.isprintable() else " " for char in line)
    return line if len(line) <= limit else line[: limit - 1] + "…"

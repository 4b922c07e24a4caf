"""The two formats inside a hijacked exec connection, without I/O.

Docker's frames carry stdout and stderr of a process without a terminal: one byte of stream number (1, 2), three of zeroes, four
of length (Engine API, "Attach to a container", stream format). Our own records travel inside the streams themselves, so their
place among the output is exact: ``1E FF token SPACE text 1E``. The token is random, and known to the process that is run; by
forging a record it can only lie about itself.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from dataclasses import dataclass

STDOUT = 1
STDERR = 2
_HEADER = 8  # bytes before each frame
_MARK = b"\x1e\xff"  # rarely the last bytes of anything: what may begin a record is held back for a moment
_END = b"\x1e"
_MAX_RECORD = 16384  # bytes of one record's text; what is longer is output


class WireError(Exception):
    """The daemon sent what is no frame."""


@dataclass(frozen=True)
class Record:
    """What our script in the sandbox says."""

    text: str


def new_token() -> str:
    """What tells one process's records from its output."""
    return secrets.token_hex(16)


class Frames:
    """Cuts a connection's bytes into pieces of the streams; a frame may come out in several pieces."""

    def __init__(self) -> None:
        self._head = b""  # an unfinished header
        self._stream = 0  # of the frame under way
        self._left = 0  # bytes of it still to come

    def feed(self, data: bytes) -> Iterator[tuple[int, bytes]]:
        """(stream, bytes) of what `data` completes. Raises WireError."""
        at = 0
        while at < len(data):
            if self._left:
                piece = data[at : at + self._left]
                self._left -= len(piece)
                at += len(piece)
                yield self._stream, piece
                continue
            wanted = _HEADER - len(self._head)
            self._head += data[at : at + wanted]
            at += wanted
            if len(self._head) == _HEADER:
                self._stream = self._head[0]
                if self._stream > STDERR or self._head[1:4] != bytes(3):
                    raise WireError("Docker sent no stream frame")
                self._left = int.from_bytes(self._head[4:], "big")
                self._head = b""


class Records:
    """Takes the records out of one stream; everything else passes through, as early as it can."""

    def __init__(self, token: str) -> None:
        self._start = _MARK + token.encode("ascii") + b" "  # how a record begins
        self._held = b""  # bytes that may turn out to be a record

    def feed(self, data: bytes) -> Iterator[bytes | Record]:
        """Output and records of the stream in their order."""
        data = self._held + data
        self._held = b""
        while data:
            begin = data.find(self._start)
            if begin < 0:
                keep = self._partial(data)
                self._held = data[len(data) - keep :]
                data = data[: len(data) - keep]
                if data:
                    yield data
                return
            if begin:
                yield data[:begin]
            end = data.find(_END, begin + len(self._start))
            text = data[begin + len(self._start) : end if end >= 0 else None]
            if len(text) > _MAX_RECORD:
                yield data[begin : begin + len(self._start)]
                data = text if end < 0 else data[begin + len(self._start) :]
            elif end < 0:
                self._held = data[begin:]
                return
            else:
                yield Record(text.decode("utf-8", "surrogateescape"))
                data = data[end + 1 :]

    @property
    def holding(self) -> bool:
        """Whether bytes are held back that may begin a record."""
        return bool(self._held)

    def flush(self) -> bytes:
        """What was held back: nothing more comes, or not soon enough."""
        held, self._held = self._held, b""
        return held

    def _partial(self, data: bytes) -> int:
        """How many of the last bytes may begin a record."""
        at = data.rfind(_MARK[:1], max(0, len(data) - len(self._start)))
        return len(data) - at if at >= 0 and self._start.startswith(data[at:]) else 0

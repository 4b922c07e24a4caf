"""The kept output of a command: the last bytes of a stream, each at its exact offset, and text out of them.

Pure: no I/O, no clock.
"""

from __future__ import annotations

import codecs

RING_CAPACITY = 4 * 1024 * 1024  # bytes kept of each stream


class Ring:
    """The tail of a byte stream. Offset 0 is the first byte ever appended; the oldest bytes go when the capacity is reached."""

    def __init__(self, capacity: int = RING_CAPACITY) -> None:
        self.capacity = capacity  # bytes kept at most
        self.start = 0  # offset of the oldest byte kept
        self._data = bytearray()  # the bytes from start to end

    @property
    def end(self) -> int:
        """Offset just past the newest byte."""
        return self.start + len(self._data)

    def __len__(self) -> int:
        return len(self._data)

    def append(self, data: bytes) -> None:
        """Add bytes at the end, dropping the oldest beyond the capacity."""
        self._data += data
        excess = len(self._data) - self.capacity
        if excess > 0:
            del self._data[:excess]
            self.start += excess

    def clamp(self, offset: int) -> int:
        """The nearest offset that can be read from: never before the oldest byte kept, never past the end."""
        return min(max(offset, self.start), self.end)

    def read(self, offset: int, limit: int) -> bytes:
        """At most `limit` bytes from `offset`, which must lie in start..end."""
        index = offset - self.start
        with memoryview(self._data) as view:
            return bytes(view[index : index + limit])


def decode_held(data: bytes, final: bool) -> tuple[str, int]:
    """Decode UTF-8 and say how many bytes that took.

    A character cut off at the end is left for the next call unless `final`; invalid bytes become U+FFFD.
    """
    return codecs.utf_8_decode(data, "replace", final)

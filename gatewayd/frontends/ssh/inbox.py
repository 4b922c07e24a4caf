"""What a client has sent on a channel and nobody has taken yet: bounded by pausing the channel."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Protocol

HIGH = 256 * 1024  # bytes at which the channel is told to wait: it keeps at most its window then
LOW = 64 * 1024  # bytes at which it may go on


class Pausable(Protocol):
    """The part of a channel that is needed here."""

    def pause_reading(self) -> None:
        """Deliver nothing more, and grant the client no more window."""

    def resume_reading(self) -> None:
        """Deliver again."""


class Inbox:
    """Bytes from a channel's callbacks to one reader that waits."""

    def __init__(self) -> None:
        self._channel: Pausable | None = None  # set by attach
        self._chunks: deque[bytes] = deque()
        self._size = 0  # bytes in _chunks
        self._paused = False  # the channel was told to wait
        self._reader: asyncio.Future[None] | None = None  # get() waits
        self.ended = False  # the client's direction has ended, maybe with bytes still here
        self._cut = False  # the channel is gone: what is here is all there will be
        self._closed = False  # nobody wants any more

    def attach(self, channel: Pausable) -> None:
        """Where the bytes come from."""
        self._channel = channel

    def put(self, data: bytes) -> None:
        """Bytes came."""
        if self._closed:
            return
        self._chunks.append(data)
        self._size += len(data)
        if self._size > HIGH and not self._paused and self._channel is not None:
            self._paused = True
            self._channel.pause_reading()
        self._wake()

    def end(self) -> None:
        """No more will come; idempotent."""
        self.ended = True
        self._wake()

    def cut(self) -> None:
        """The channel is gone; what is here can still be taken. Idempotent."""
        self._cut = True
        self._wake()

    def close(self) -> None:
        """Drop what is here and what comes; `get` returns b"". Idempotent."""
        self._closed = True
        self._chunks.clear()
        self._size = 0
        self._resume()
        self._wake()

    async def get(self, limit: int) -> bytes:
        """1 to `limit` bytes; b"" at the end of the client's direction (`ended` is set then), or of everything."""
        while not self._chunks:
            if self.ended or self._cut or self._closed:
                return b""
            self._reader = asyncio.get_running_loop().create_future()
            try:
                await self._reader
            finally:
                self._reader = None
        data = self._chunks.popleft()
        if len(data) > limit:
            self._chunks.appendleft(data[limit:])
            data = data[:limit]
        elif self._chunks:  # small packets go on together: every write downstream has its cost
            parts, size = [data], len(data)
            while self._chunks and size + len(self._chunks[0]) <= limit:
                parts.append(self._chunks.popleft())
                size += len(parts[-1])
            data = b"".join(parts)
        self._size -= len(data)
        if self._size <= LOW:
            self._resume()
        return data

    def _resume(self) -> None:
        if self._paused and self._channel is not None:
            self._paused = False
            self._channel.resume_reading()

    def _wake(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

"""One stream of a `Mux` as coroutines: read, write, half-close, abort. Created by `aio.Mux`, exported from there."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING, Final

from gatewayd.errors import MuxClosed, StreamClosed, StreamReset
from gatewayd.yamux.stream import Signal, Stream

if TYPE_CHECKING:
    from gatewayd.yamux.aio import Mux

_SMALL: Final = 4096  # bytes; smaller pieces are joined on arrival, so that tiny frames cannot cost a Python object each
_LATE_LIMIT: Final = 1 << 20  # bytes drained after aclose before the stream is reset: the peer evidently does not want to end


class MuxStream:
    """A byte stream inside a `Mux`; implements `relay.ByteStream`.

    One reader and one writer at a time. The peer's window is credited when `read` hands bytes out, not when they arrive.
    """

    def __init__(self, mux: Mux, core: Stream) -> None:
        self.id = core.id  # yamux stream id
        self._mux = mux
        self._core = core  # state and windows; read only here, moved by the session
        self._chunks: deque[bytes | bytearray] = deque()  # received, not yet read
        self._offset = 0  # bytes of the first chunk that were read
        self._eof = False  # FIN received; reads return b"" once _chunks is empty
        self._error: MuxClosed | StreamReset | None = None  # set once: reset either way, or the session ended
        self._reading = True  # False after aclose and abort: what still arrives is dropped and credited
        self._late = 0  # bytes dropped since
        self._readable = asyncio.Event()  # something for read() to look at
        self._writable = asyncio.Event()  # something for write() to look at: window or error
        self._broken: asyncio.Future[None] | None = None  # handed out by broken()

    def __repr__(self) -> str:
        return f"<MuxStream {self.id} of {self._mux.name} {self._core.state.name}>"

    async def read(self, limit: int = 262144) -> bytes:
        """The next 1 to `limit` bytes; b"" when the peer has closed its direction.

        What arrived before a reset or the session's end is delivered first, as a TCP socket does.

        Raises:
            StreamReset: the stream was reset, by the peer or by `abort`.
            MuxClosed: the session ended.
            StreamClosed: `aclose` was called.
        """
        while not self._chunks:
            if self._eof:
                return b""
            self._raise_error()
            if not self._reading:
                raise StreamClosed(f"cannot read from stream {self.id}: it is closed")
            self._readable.clear()
            await self._readable.wait()
        chunk = self._chunks[0]
        data = bytes(chunk[self._offset : self._offset + limit])
        self._offset += len(data)
        if self._offset == len(chunk):
            self._chunks.popleft()
            self._offset = 0
        self._mux.consumed(self.id, len(data))
        return data

    async def write(self, data: bytes) -> None:
        """Send all of `data`; returns when the last byte is queued, not when it is delivered.

        Raises:
            StreamReset: the stream was reset, by the peer or by `abort`.
            MuxClosed: the session ended.
            StreamClosed: after `write_eof` or `aclose`.
        """
        view = memoryview(data)
        while view:
            self._check_writable()
            if not self._core.send_window:
                self._writable.clear()
                await self._writable.wait()
                continue
            async with self._mux.turn:  # first come, first served: the streams take turns, one frame each
                await self._mux.wait_room()
                self._check_writable()
                view = view[self._mux.send(self.id, view) :]

    async def write_eof(self) -> None:
        """Close our direction behind what was written; idempotent.

        Raises:
            StreamReset: the stream was reset before.
            MuxClosed: the session ended before.
        """
        self._raise_error()
        self._finish_writing()

    def abort(self) -> None:
        """Drop the stream: RST to the peer unless both directions are closed; what was not read is lost. Idempotent."""
        self._reading = False
        self._discard()
        if self._error is None:
            self.fail(StreamReset(f"stream {self.id} was reset: aborted here"))
            self._mux.reset(self.id)

    async def aclose(self) -> None:
        """Close our direction if it is open, and stop reading: what still arrives is dropped. Idempotent.

        A peer that goes on sending (more than 1 MiB) is told with a reset that nobody listens.
        """
        self._reading = False
        if self._error is None:
            self._finish_writing()
            self._mux.abandoned(self.id)
        if unread := self._discard():
            self._drop(unread)
        self._readable.set()
        self._writable.set()

    def broken(self) -> asyncio.Future[None]:
        """A future that is done once the stream was reset or its session ended; for waiting, not for results."""
        if self._broken is None:
            self._broken = asyncio.get_running_loop().create_future()
            if self._error is not None:
                self._broken.set_result(None)
        return self._broken

    # -- called by the Mux --------------------------------------------------------------------------------------------

    def feed(self, data: bytes) -> None:
        """Bytes have arrived."""
        if not self._reading:
            self._drop(len(data))
            return
        tail = self._chunks[-1] if self._chunks else None
        if len(data) >= _SMALL or tail is None or len(tail) >= _SMALL:
            self._chunks.append(data)
        elif isinstance(tail, bytearray):
            tail += data
        else:
            self._chunks[-1] = bytearray(tail) + data
        self._readable.set()

    def feed_eof(self) -> None:
        """FIN has arrived."""
        self._eof = True
        self._readable.set()

    def window_opened(self) -> None:
        """The peer granted bytes on a window of 0."""
        self._writable.set()

    def fail(self, error: MuxClosed | StreamReset) -> None:
        """The stream is gone: wake everybody who waits. The first error stays."""
        if self._error is None:
            self._error = error
        self._readable.set()
        self._writable.set()
        if self._broken is not None and not self._broken.done():
            self._broken.set_result(None)

    # -- inside -------------------------------------------------------------------------------------------------------

    def _discard(self) -> int:
        """Empty the receive buffer; how many bytes were in it."""
        unread = sum(map(len, self._chunks)) - self._offset
        self._chunks.clear()
        self._offset = 0
        return unread

    def _finish_writing(self) -> None:
        if self._core.allows(Signal.SEND_FIN):
            self._mux.send_eof(self.id)
            self._writable.set()

    def _drop(self, size: int) -> None:
        self._late += size
        if self._late > _LATE_LIMIT:
            self.abort()
        else:
            self._mux.consumed(self.id, size)

    def _check_writable(self) -> None:
        self._raise_error()
        if not self._core.allows(Signal.SEND_DATA):
            raise StreamClosed(f"cannot write to stream {self.id}: our direction is closed")

    def _raise_error(self) -> None:
        if self._error is not None:
            # A fresh object each time: a shared one would gather the traceback of everybody who raised it.
            raise type(self._error)(self._error.message)

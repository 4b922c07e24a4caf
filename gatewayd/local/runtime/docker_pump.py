"""Bytes between a hijacked exec connection and descriptors: bounded both ways, half-close kept, records taken out.

One connection carries both streams of a process, so a reader that leaves more than `LIMIT` bytes of one stream unread in the end
stops the other one too. That is Docker's protocol, not a choice.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections import deque
from collections.abc import Callable

from gatewayd.local.runtime.docker_wire import STDERR, STDOUT, Frames, Record, Records, WireError

LIMIT = 1024 * 1024  # bytes of one stream that wait for its reader beyond what the pipe holds
_CHUNK = 64 * 1024  # bytes a read: what a pipe holds
_MAX_EARLY = 64  # pieces of stderr that may come before the first of stdout
_PATIENCE = 0.1  # seconds that bytes which may begin a record are held back


class Outlet:
    """Writes to one of our own non-blocking descriptors as fast as its reader reads. Owns it, unless told otherwise."""

    def __init__(self, fd: int, on_end: Callable[[], None] | None = None) -> None:
        self._fd = fd  # -1 once closed
        self._on_end = on_end  # called at the end of the stream instead of closing: the descriptor has another owner
        self._loop = asyncio.get_running_loop()
        self._buffer = bytearray()  # not taken yet
        self._fed = 0  # bytes ever queued
        self._written = 0  # bytes ever taken, or dropped because nobody reads any more
        self._marks: deque[tuple[int, Callable[[], None]]] = deque()  # called once so many bytes are taken
        self._room = asyncio.Event()  # set while the buffer is within its limit
        self._room.set()
        self._watching = False  # the loop watches the descriptor
        self._ending = False  # end() was called
        self.broken = False  # its reader closed it before the end

    @property
    def closed(self) -> bool:
        """Whether the stream has ended and everything queued is with the reader, or dropped."""
        return self._fd < 0

    @property
    def waiting(self) -> int:
        """Bytes queued and not yet with the reader."""
        return len(self._buffer)

    async def feed(self, data: bytes) -> None:
        """Queue bytes; waits while more than the limit is queued."""
        self.queue(data)
        await self._room.wait()

    def queue(self, data: bytes) -> None:
        """Queue bytes, limit or not."""
        self._fed += len(data)
        if self._fd < 0:
            self._written = self._fed  # nobody reads: dropped, so that the process does not block for ever
        else:
            self._buffer += data
        self._flush()

    def mark(self, callback: Callable[[], None]) -> None:
        """Call back when everything queued so far is with the reader."""
        self._marks.append((self._fed, callback))
        self._flush()

    def end(self) -> None:
        """End the stream after what is queued; idempotent."""
        self._ending = True
        self._flush()

    def close(self) -> None:
        """Drop what is queued and end the stream; idempotent."""
        if self._watching:
            self._watching = False
            self._loop.remove_writer(self._fd)
        self._buffer.clear()
        self._written = self._fed
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            if self._on_end is not None:
                self._on_end()
            else:
                os.close(fd)
        self._notify()

    def _flush(self) -> None:
        while self._buffer:
            try:
                with memoryview(self._buffer) as view:
                    written = os.write(self._fd, view[:_CHUNK])
            except (BlockingIOError, InterruptedError):
                break
            except OSError:  # EPIPE: its reader has closed it
                self.broken = True
                self.close()
                return
            del self._buffer[:written]
            self._written += written
        if self._ending and not self._buffer:
            self.close()
            return
        if bool(self._buffer) != self._watching:
            self._watching = not self._watching
            if self._watching:
                self._loop.add_writer(self._fd, self._flush)
            else:
                self._loop.remove_writer(self._fd)
        self._notify()

    def _notify(self) -> None:
        if len(self._buffer) <= LIMIT:
            self._room.set()
        else:
            self._room.clear()
        while self._marks and self._marks[0][0] <= self._written:
            self._marks.popleft()[1]()


class Pump:
    """One process's connection, between `start` of its exec and its end."""

    def __init__(self, sock: socket.socket, early: bytes, token: str, *, framed: bool) -> None:
        self._sock = sock  # the hijacked connection; owned
        self._early = early  # arrived with the head of the answer
        self._frames = Frames() if framed else None  # None with a terminal: the bytes are the stream
        self._records: dict[int, Records | None] = {STDOUT: Records(token), STDERR: Records(token) if framed else None}
        self._loop = asyncio.get_running_loop()
        self._hold_back: asyncio.TimerHandle | None = None  # set while bytes are held back
        self._queue: deque[tuple[int, bytes | Record]] = deque()  # pieces of streams not yet passed on
        self.error: str | None = None  # why the connection was given up

    async def first(self) -> Record | bytes:
        """The first record of stdout; what came in its place when there is none.

        stderr may be ahead of it: Docker copies the two one by one. Messages of the daemon, which tell that the process could not
        be started, come on either and then end the connection.
        """
        seen = 0  # pieces looked at
        while True:
            for at in range(seen, len(self._queue)):
                stream, piece = self._queue[at]
                if stream == STDOUT:
                    del self._queue[at]
                    return piece
            seen = len(self._queue)
            if seen > _MAX_EARLY or not await self._fill():
                return b"".join(piece for _, piece in self._queue if isinstance(piece, bytes))

    def plain(self) -> None:
        """No more records from here on: a terminal's bytes are passed on as they are."""
        for stream, records in self._records.items():
            if records is not None and records.holding:
                self._queue.append((stream, records.flush()))
        self._records = {}

    async def _fill(self) -> bool:
        """Read once; False at the end."""
        data, self._early = self._early, b""
        try:
            data = data or await self._loop.sock_recv(self._sock, _CHUNK)
            pieces = [(STDOUT, data)] if self._frames is None else list(self._frames.feed(data))
        except (OSError, WireError) as exc:
            self.error = str(exc)
            return False
        for stream, piece in pieces:
            records = self._records.get(stream)
            self._queue.extend((stream, part) for part in ([piece] if records is None else records.feed(piece)))
        return bool(data)

    async def outward(self, outlets: dict[int, Outlet], on_record: Callable[[int, Record], None]) -> None:
        """Pass the streams on to `outlets` until the connection ends, then end the outlets. Never raises for I/O."""
        try:
            while True:
                while self._queue:
                    stream, piece = self._queue.popleft()
                    outlet = outlets.get(stream)
                    if isinstance(piece, Record):
                        on_record(stream, piece)
                    elif outlet is not None:
                        await outlet.feed(piece)
                self._watch_held(outlets)
                if not await self._fill():
                    break
        finally:
            if self._hold_back is not None:
                self._hold_back.cancel()
            self._release(outlets)
            for outlet in outlets.values():
                outlet.end()

    def _watch_held(self, outlets: dict[int, Outlet]) -> None:
        if self._hold_back is None and any(records is not None and records.holding for records in self._records.values()):
            self._hold_back = self._loop.call_later(_PATIENCE, self._release, outlets)

    def _release(self, outlets: dict[int, Outlet]) -> None:
        """What is held back is no record, or it would have been complete by now."""
        self._hold_back = None
        for stream, records in self._records.items():
            if records is not None and records.holding and (outlet := outlets.get(stream)) is not None:
                outlet.queue(records.flush())

    async def inward(self, fd: int) -> None:
        """Pass what is written to us on to the connection, until its end; then half-close the connection. `fd` is not owned."""
        try:
            while True:
                try:
                    data = os.read(fd, _CHUNK)
                except BlockingIOError:
                    await self._readable(fd)
                    continue
                if not data:
                    break
                await self._loop.sock_sendall(self._sock, data)
        except OSError:
            pass  # either end is gone: as end of file
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_WR)

    async def _readable(self, fd: int) -> None:
        ready: asyncio.Future[None] = self._loop.create_future()

        def wake() -> None:
            if not ready.done():
                ready.set_result(None)

        self._loop.add_reader(fd, wake)
        try:
            await ready
        finally:
            self._loop.remove_reader(fd)

    def close(self) -> None:
        """Let the connection go; idempotent."""
        self._sock.close()

"""A command's descriptors on the event loop: output into rings, input out of a bounded buffer, leftovers into the void.

Readiness callbacks only: no thread and no task per command.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
from collections import OrderedDict
from collections.abc import Callable

from gatewayd.local.ring import Ring

READ_SIZE = 65536  # bytes per read: what a pipe holds
BULK_SIZE = 262144  # the same of a command that had filled its pipe: one turn of a busy event loop then moves that much
BULK_PIPE = 524288  # bytes that such a pipe holds from then on, if the kernel allows that
STDIN_LIMIT = 1024 * 1024  # bytes of input that wait for the command before its sender has to
MAX_DRAINS = 256  # descriptors kept open for background processes of finished commands, per sandbox


class OutputPipe:
    """Reads one descriptor into a ring until its end. Owns the reading, not the descriptor."""

    def __init__(self, fd: int, ring: Ring, on_change: Callable[[], None]) -> None:
        self.ring = ring
        self.eof = False  # no more bytes will come: end of file, or stop() was called
        self._fd = fd
        self._on_change = on_change  # called after every read and at the end; it calls allow() again
        self._loop = asyncio.get_running_loop()
        self._reading = False  # the loop watches the descriptor
        self._size = READ_SIZE  # bytes per read; BULK_SIZE once the pipe was found full
        self._room: int | None = None  # bytes that may be read; None: any number
        self.allow(None)

    @property
    def paused(self) -> bool:
        """Bytes may be waiting that are not read, for back-pressure."""
        return not self.eof and not self._reading

    def allow(self, room: int | None) -> None:
        """Read at most that many bytes from now on, or None: without limit. At 0 the command blocks when its pipe is full."""
        self._room = room
        if room is not None and room <= 0:
            self._pause()
        elif not self._reading and not self.eof:
            self._reading = True
            self._loop.add_reader(self._fd, self._readable)

    def stop(self) -> None:
        """Read no more; idempotent."""
        self._pause()
        self.eof = True

    def _pause(self) -> None:
        if self._reading:
            self._reading = False
            self._loop.remove_reader(self._fd)

    def _readable(self) -> None:
        try:
            data = os.read(self._fd, self._size if self._room is None else min(self._size, self._room))
        except (BlockingIOError, InterruptedError):
            return
        except OSError:  # EIO: the last process closed the terminal
            data = b""
        if data:
            self.ring.append(data)
            if len(data) == READ_SIZE == self._size:
                self._widen()
        else:
            self.stop()
        self._on_change()

    def _widen(self) -> None:
        """The command writes faster than this is called. Not before: a user's pipes may hold 64 MiB together (pipe(7))."""
        self._size = BULK_SIZE
        with contextlib.suppress(OSError):  # a terminal; a full account
            fcntl.fcntl(self._fd, fcntl.F_SETPIPE_SZ, BULK_PIPE)


class InputPipe:
    """Writes to a command's stdin, as fast as it reads. Owns the writing, not the descriptor."""

    def __init__(self, fd: int, on_closed: Callable[[], None], limit: int = STDIN_LIMIT) -> None:
        self._fd = fd
        self._on_closed = on_closed  # called once, when everything is written after end(), or nobody reads any more
        self._limit = limit  # bytes waiting above which feed() waits
        self._buffer = bytearray()  # bytes the command has not taken yet
        self._ending = False  # end() was called
        self._closed = False  # nothing is written any more
        self._writing = False  # the loop watches the descriptor
        self._room = asyncio.Event()  # set while the buffer is at or below the limit
        self._room.set()
        self._loop = asyncio.get_running_loop()

    async def feed(self, data: bytes) -> None:
        """Queue input and wait until it fits the limit. What comes after the end is dropped, as a shell would drop it."""
        if self._ending or self._closed:
            return
        self._buffer += data
        self._flush()
        await self._room.wait()

    def end(self) -> None:
        """Close stdin once all queued input is written; idempotent."""
        if not self._ending and not self._closed:
            self._ending = True
            self._flush()

    def stop(self) -> None:
        """Drop what is queued and write no more; idempotent."""
        if self._writing:
            self._writing = False
            self._loop.remove_writer(self._fd)
        self._buffer.clear()
        self._room.set()
        self._closed = True

    def _flush(self) -> None:
        while self._buffer and not self._closed:
            try:
                with memoryview(self._buffer) as view:
                    written = os.write(self._fd, view[:READ_SIZE])
            except (BlockingIOError, InterruptedError):
                break
            except OSError:  # EPIPE, EIO: nobody reads
                self._finish()
                return
            del self._buffer[:written]
        if len(self._buffer) <= self._limit:
            self._room.set()
        else:
            self._room.clear()
        if self._ending and not self._buffer:
            self._finish()
        elif bool(self._buffer) != self._writing:
            self._writing = not self._writing
            if self._writing:
                self._loop.add_writer(self._fd, self._flush)
            else:
                self._loop.remove_writer(self._fd)

    def _finish(self) -> None:
        if not self._closed:
            self.stop()
            self._on_closed()


class Drains:
    """Keeps pipes of finished commands readable while background processes hold them.

    ``server &`` leaves the server with the command's pipes. Closing our ends would kill it at its next line of log (SIGPIPE);
    leaving them unread would block it. So they are read and forgotten until the last holder is gone.
    """

    def __init__(self, limit: int = MAX_DRAINS) -> None:
        self._limit = limit  # descriptors kept; above it the oldest is closed
        self._fds: OrderedDict[int, None] = OrderedDict()  # watched descriptors, oldest first; owned
        self._loop = asyncio.get_running_loop()

    def __len__(self) -> int:
        return len(self._fds)

    def add(self, fd: int) -> None:
        """Take over a non-blocking descriptor that nothing watches."""
        while len(self._fds) >= self._limit:
            self._drop(next(iter(self._fds)))
        self._fds[fd] = None
        self._loop.add_reader(fd, self._readable, fd)

    def _readable(self, fd: int) -> None:
        try:
            if os.read(fd, READ_SIZE):
                return
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            pass  # as its end
        self._drop(fd)

    def _drop(self, fd: int) -> None:
        del self._fds[fd]
        self._loop.remove_reader(fd)
        close_fd(fd)

    def close(self) -> None:
        """Close every descriptor; idempotent."""
        for fd in list(self._fds):
            self._drop(fd)


def close_fd(fd: int) -> None:
    """Close a descriptor; a deferred error of the close has nobody to hear it."""
    with contextlib.suppress(OSError):
        os.close(fd)

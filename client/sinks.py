"""Standard output and standard error, written without ever waiting, and without a change that another program could see."""

from __future__ import annotations

import errno
import os
import select
import stat
from collections import deque
from contextlib import suppress

from client.proxy import Failure
from gatewayd.api import ErrorKind

_CHUNK = 65536  # bytes per write
_SMALL = 4096  # bytes below which pieces that wait are joined: what keeps one apart takes some 200 bytes more than the piece
_SAFE_CHUNK = select.PIPE_BUF  # bytes that a pipe which polls as writable takes without waiting
_GONE = (errno.EPIPE, errno.ECONNRESET, errno.EIO, errno.ENXIO)  # nobody reads: a pipe, a socket, a terminal that was closed


class Sink:
    """One standard stream, with what it has not taken yet.

    O_NONBLOCK belongs to the open file, which is shared with every other program that has it: a pipe or terminal is therefore
    opened anew. Where that cannot be done (a socket, another user's terminal) only so much is written as does not wait.
    """

    def __init__(self, fd: int) -> None:
        """`fd` stays the caller's."""
        self._given = fd
        self.fd, self._chunk = _open_anew(fd)  # to poll for POLLOUT while `size` is not 0
        self._pending: deque[bytes | bytearray] = deque()  # bytearrays grow up to about _CHUNK
        self._written = 0  # bytes of the first that are written
        self.size = 0  # bytes in `_pending` that are not

    def write(self, data: bytes) -> int:
        """Queue `data` and write what can be; how many bytes (of this call or earlier ones) the stream took.

        Raises:
            BrokenPipeError: nobody reads it any more. What was queued is dropped.
            Failure: it cannot be written for another reason.
        """
        idle = not self._pending
        if len(data) >= _SMALL:
            self._pending.append(data)
        elif not idle and isinstance(last := self._pending[-1], bytearray) and len(last) < _CHUNK:
            last += data
        else:
            self._pending.append(bytearray(data))
        self.size += len(data)
        return self.flush() if idle else 0

    def flush(self) -> int:
        """Write what the stream takes now, as `write` does."""
        taken = 0
        try:
            while self._pending and self._ready():
                first = self._pending[0]
                with memoryview(first) as view, view[self._written : self._written + self._chunk] as part:
                    count = os.write(self.fd, part)
                taken += count
                self.size -= count
                self._written += count
                if self._written == len(first):
                    self._pending.popleft()
                    self._written = 0
        except BlockingIOError:
            pass
        except OSError as exc:
            self.drop()
            if exc.errno in _GONE:
                raise BrokenPipeError(exc.errno, "nobody reads the output") from exc
            raise Failure(ErrorKind.FAILED, f"cannot write the output: {exc.strerror or exc}") from exc
        return taken

    def _ready(self) -> bool:
        if self._chunk == _CHUNK:
            return True
        poll = select.poll()
        poll.register(self.fd, select.POLLOUT)
        return bool(poll.poll(0))

    def drop(self) -> None:
        """Forget what was not written."""
        self._pending.clear()
        self._written = 0
        self.size = 0

    def end(self) -> None:
        """Nothing more comes: whoever reads may know (the descriptor becomes the null device); idempotent."""
        self.close()
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self._given)
        os.close(null)

    def close(self) -> None:
        """Release what was opened anew; idempotent."""
        if self.fd != self._given:
            os.close(self.fd)
            self.fd = self._given
            self._chunk = _SAFE_CHUNK


def _open_anew(fd: int) -> tuple[int, int]:
    """A descriptor for `fd`'s file that does not wait, or `fd` itself, and how many bytes to write at once."""
    with suppress(OSError):
        mode = os.fstat(fd).st_mode
        if stat.S_ISREG(mode):
            return fd, _CHUNK
        if stat.S_ISFIFO(mode) or os.isatty(fd):
            flags = os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
            return os.open(f"/proc/self/fd/{fd}", flags), _CHUNK
    return fd, _SAFE_CHUNK

"""One connection to a forwarded SSH agent, made by a process inside a sandbox. Readiness callbacks only, everything bounded."""

from __future__ import annotations

import asyncio
import select
import socket
from collections.abc import Callable

from gatewayd.local.pipes import READ_SIZE

CHUNK = 16 * 1024  # bytes read at once, and under way to the client at most
QUEUED = 1024 * 1024  # bytes from the client that wait for a process inside; an agent's longest answer has a quarter of that
ANSWER_DEADLINE = 120.0  # seconds for the client to answer: its user may be asked for a passphrase first
LINGER = 10.0  # seconds for a process inside to take the last bytes of a channel that the client has closed


class Channel:
    """A connection; its bytes go to the client one piece after the other.

    A process inside that has said all it wants to (half-close) still gets its answer: the channel lives until it closes the
    connection, or the client does.
    """

    def __init__(
        self, number: str, sock: socket.socket, on_data: Callable[[Channel, bytes], None], on_closed: Callable[[Channel], None]
    ) -> None:
        self.number = number  # the protocol's channel_id
        self._sock = sock  # non-blocking; owned
        self._on_data = on_data  # takes a piece; the next one comes after `resume`
        self._on_closed = on_closed  # called once, when the connection is closed, whoever did it
        self._loop = asyncio.get_running_loop()
        self._buffer = bytearray()  # from the client, not yet taken inside
        self._reading = False  # the loop watches for bytes
        self._writing = False  # the loop watches for room
        self._ended = False  # the process inside sends no more
        self._finishing = False  # closed once the buffer is empty
        self._hangup: select.epoll | None = None  # after a half-close: readable when the other end is closed altogether
        self._deadline: asyncio.TimerHandle | None = None  # for the client's answer, or the buffer's end
        self.closed = False  # the connection is closed
        self.resume()

    def resume(self) -> None:
        """Read the next piece."""
        if not (self.closed or self._reading or self._ended or self._finishing):
            self._reading = True
            self._loop.add_reader(self._sock.fileno(), self._readable)

    def _pause(self) -> None:
        if self._reading:
            self._reading = False
            self._loop.remove_reader(self._sock.fileno())

    def _readable(self) -> None:
        try:
            data = self._sock.recv(CHUNK)  # descriptors that come with it are dropped by the kernel
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            self.close()
            return
        self._pause()
        if data:
            if self._deadline is None:
                self._deadline = self._loop.call_later(ANSWER_DEADLINE, self.close)
            self._on_data(self, data)
        else:
            self._ended = True
            self._watch_hangup()

    def _watch_hangup(self) -> None:
        """Wait for the other end's close without reading, which at the end of file would never wait."""
        self._hangup = select.epoll(1)
        self._hangup.register(self._sock.fileno(), 0)  # EPOLLHUP and EPOLLERR are always reported
        if self._hangup.poll(0):
            self.close()
        else:
            self._loop.add_reader(self._hangup.fileno(), self.close)

    def feed(self, data: bytes) -> bool:
        """Queue bytes for the process inside; False, and closed, when it leaves too many of them."""
        if self.closed or self._finishing:
            return True
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
        self._buffer += data
        self._flush()
        if len(self._buffer) > QUEUED:
            self.close()
            return False
        return True

    def finish(self) -> None:
        """The client has closed it: close the connection when what it sent before is taken, or after a while; idempotent."""
        if self.closed or self._finishing:
            return
        self._finishing = True
        self._pause()
        if self._deadline is not None:
            self._deadline.cancel()
        self._deadline = self._loop.call_later(LINGER, self.close)
        self._flush()

    def _flush(self) -> None:
        while self._buffer:
            try:
                with memoryview(self._buffer) as view:
                    sent = self._sock.send(view[:READ_SIZE])
            except (BlockingIOError, InterruptedError):
                break
            except OSError:  # EPIPE, ECONNRESET: nobody reads
                self.close()
                return
            del self._buffer[:sent]
        if self._finishing and not self._buffer:
            self.close()
        elif bool(self._buffer) != self._writing:
            self._writing = not self._writing
            if self._writing:
                self._loop.add_writer(self._sock.fileno(), self._flush)
            else:
                self._loop.remove_writer(self._sock.fileno())

    def close(self) -> None:
        """Close the connection at once; idempotent."""
        if self.closed:
            return
        self.closed = True
        self._pause()
        if self._writing:
            self._loop.remove_writer(self._sock.fileno())
        if self._hangup is not None:
            self._loop.remove_reader(self._hangup.fileno())
            self._hangup.close()
        if self._deadline is not None:
            self._deadline.cancel()
        self._buffer.clear()
        self._sock.close()
        self._on_closed(self)

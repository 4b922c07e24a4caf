"""The only copy loop: two byte streams, both directions, until both have ended.

EOF ends one direction only; a slow receiver slows the sender; a failure or reset on one side resets the other.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from dataclasses import dataclass
from typing import Any, Final, Protocol, runtime_checkable

from gatewayd.errors import GatewayError, StreamClosed, StreamReset
from gatewayd.tasks import TaskOwner

_READ_SIZE: Final = 256 * 1024  # bytes asked for at once
_TURN_SIZE: Final = 1 << 20  # bytes a socket may move without waiting before other tasks get their turn
_DRAIN_DEADLINE: Final = 5.0  # seconds to deliver what had arrived on a stream before it was reset
_LINGER_RESET: Final = struct.pack("ii", 1, 0)  # SO_LINGER on, 0 s: close() sends RST


class ByteStream(Protocol):
    """A two-way byte stream whose directions end one by one. Failures are OSError or GatewayError."""

    async def read(self, limit: int = ..., /) -> bytes:
        """1 to `limit` bytes, b"" at the end of the peer's direction."""
        ...

    async def write(self, data: bytes, /) -> None:
        """All of `data`; waits while the receiver is slow."""

    async def write_eof(self) -> None:
        """End our direction; idempotent."""

    def abort(self) -> None:
        """End both directions at once, and let the peer see that it was no orderly end; idempotent."""

    async def aclose(self) -> None:
        """Release everything, orderly; idempotent."""


@runtime_checkable
class Breakable(Protocol):
    """A byte stream that notices a reset while nobody reads or writes it."""

    def broken(self) -> asyncio.Future[Any]:
        """Done when the stream is gone; its result is the reason (an exception), or None."""
        ...


@dataclass(frozen=True, slots=True)
class RelayResult:
    """How a relay went."""

    a_to_b: int  # bytes read from a and taken by b
    b_to_a: int  # bytes read from b and taken by a
    error: Exception | None  # the first failure, after which both were aborted; None: both directions ended with EOF


async def relay(a: ByteStream, b: ByteStream) -> RelayResult:
    """Copy both ways until both directions have ended; then both streams are closed, or aborted after a failure.

    There is no time limit of its own: a half-closed connection may idle as long as its ends like. Cancelled, it aborts both.
    """
    owner = TaskOwner("relay")
    ways = (_Way(a, b), _Way(b, a))
    tasks = {owner.start(way.run(), name) for way, name in zip(ways, ("a-b", "b-a"), strict=True)}
    error: Exception | None = None
    clean = False
    try:
        error = await _settle(tasks, [stream.broken() for stream in (a, b) if isinstance(stream, Breakable)])
        if error is None:
            await a.aclose()
            await b.aclose()
            clean = True
    finally:
        if not clean:
            a.abort()
            b.abort()
        await owner.aclose()
    return RelayResult(ways[0].count, ways[1].count, error)


async def _settle(tasks: set[asyncio.Task[Exception | None]], watched: list[asyncio.Future[Any]]) -> Exception | None:
    """Wait until both ways have ended, one has failed, or a stream broke; the error or None."""
    pending: set[asyncio.Future[Any]] = {*tasks, *watched}
    while True:
        _, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            if task.done() and (error := task.result()) is not None:
                return error
        if all(task.done() for task in tasks):
            return None
        if any(future.done() for future in watched):
            # What came before the reset is still delivered, as far as the receiver takes it in time.
            await asyncio.wait(tasks, timeout=_DRAIN_DEADLINE, return_when=asyncio.FIRST_COMPLETED)
            errors = [error for task in tasks if task.done() and (error := task.result()) is not None]
            errors += [future.result() for future in watched if future.done() and future.result() is not None]
            return errors[0] if errors else StreamReset("a relayed stream was reset")


class _Way:
    """One direction of a relay."""

    def __init__(self, source: ByteStream, sink: ByteStream) -> None:
        self._source = source
        self._sink = sink
        self.count = 0  # bytes moved

    async def run(self) -> Exception | None:
        """Copy until EOF, then pass the EOF on; the error that stopped it, or None."""
        try:
            while data := await self._source.read(_READ_SIZE):
                await self._sink.write(data)
                self.count += len(data)
            await self._sink.write_eof()
        except (OSError, GatewayError) as exc:
            return exc
        return None


class SocketStream:
    """`ByteStream` over a connected stream socket, TCP or Unix. One reader and one writer at a time.

    Works on the bare descriptor: no buffer of ours stands between the kernel's and the caller's, so a connection that is
    idle holds no memory, and back-pressure is the kernel's own.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._loop = asyncio.get_running_loop()
        self._reader: asyncio.Future[None] | None = None  # read() waits for the descriptor
        self._writer: asyncio.Future[None] | None = None  # write() waits for the descriptor
        self._gone: str = ""  # why the socket is closed: completes «cannot …: »; "" while it is open
        self._eof_sent = False  # SHUT_WR was done
        self._moved = 0  # bytes moved since this stream last waited

    @classmethod
    def from_socket(cls, sock: socket.socket) -> SocketStream:
        """Take over a connected socket; it becomes non-blocking. Call inside the event loop."""
        sock.setblocking(False)
        if sock.family in (socket.AF_INET, socket.AF_INET6):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return cls(sock)

    def __repr__(self) -> str:
        return f"<SocketStream fd={self._sock.fileno()}>"

    async def read(self, limit: int = _READ_SIZE) -> bytes:
        """1 to `limit` bytes, b"" at EOF.

        Raises:
            OSError: the connection failed.
            StreamClosed: after `abort` or `aclose`, also when it happens during the wait.
        """
        await self._yield_turn()
        while True:
            self._check("read")
            try:
                data = self._sock.recv(limit)
            except BlockingIOError:
                await self._wait_readable()
            else:
                self._moved += len(data)
                return data

    async def write(self, data: bytes) -> None:
        """All of `data`; waits for the kernel's send buffer.

        Raises:
            OSError: the connection failed.
            StreamClosed: after `write_eof`, `abort` or `aclose`, also when it happens during the wait.
        """
        view = memoryview(data)
        while view:
            await self._yield_turn()
            self._check("write")
            if self._eof_sent:
                raise StreamClosed("cannot write to a socket: its direction is closed")
            try:
                sent = self._sock.send(view)
            except BlockingIOError:
                await self._wait_writable()
            else:
                self._moved += sent
                view = view[sent:]

    async def write_eof(self) -> None:
        """SHUT_WR; idempotent.

        Raises:
            OSError: the connection is gone.
            StreamClosed: after `abort` or `aclose`.
        """
        self._check("end")
        if not self._eof_sent:
            self._eof_sent = True
            self._sock.shutdown(socket.SHUT_WR)

    def abort(self) -> None:
        """Close at once; a TCP peer sees a reset. Idempotent."""
        if not self._gone and self._sock.family in (socket.AF_INET, socket.AF_INET6):
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_RESET)
        self._close("it was aborted")

    async def aclose(self) -> None:
        """Close; what was written is still delivered by the kernel. Idempotent."""
        self._close("it is closed")

    def _check(self, what: str) -> None:
        if self._gone:
            raise StreamClosed(f"cannot {what} a socket stream: {self._gone}")

    def _close(self, why: str) -> None:
        if self._gone:
            return
        self._gone = why
        fd = self._sock.fileno()
        for waiter, remove in ((self._reader, self._loop.remove_reader), (self._writer, self._loop.remove_writer)):
            if waiter is not None:
                remove(fd)
                if not waiter.done():
                    waiter.set_result(None)  # its owner looks again and finds `_gone`
        self._sock.close()

    async def _wait_readable(self) -> None:
        if self._reader is not None:
            raise StreamClosed("cannot read from a socket: another task is reading")
        self._moved = 0
        self._reader = self._loop.create_future()
        self._loop.add_reader(self._sock.fileno(), _wake, self._reader)
        try:
            await self._reader
        finally:
            self._reader = None
            if not self._gone:
                self._loop.remove_reader(self._sock.fileno())

    async def _wait_writable(self) -> None:
        if self._writer is not None:
            raise StreamClosed("cannot write to a socket: another task is writing")
        self._moved = 0
        self._writer = self._loop.create_future()
        self._loop.add_writer(self._sock.fileno(), _wake, self._writer)
        try:
            await self._writer
        finally:
            self._writer = None
            if not self._gone:
                self._loop.remove_writer(self._sock.fileno())

    async def _yield_turn(self) -> None:
        """Two sockets that are always ready would keep the event loop to themselves."""
        if self._moved >= _TURN_SIZE:
            self._moved = 0
            await asyncio.sleep(0)


def _wake(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)

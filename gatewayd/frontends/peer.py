"""Clients on Unix sockets: who they are, what they say, and whether they are still there."""

from __future__ import annotations

import asyncio
import os
import select
import socket
import struct
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from gatewayd.api import LINE_MAX, ErrorKind, encode_line
from gatewayd.errors import GatewayError
from gatewayd.relay import SocketStream

_UCRED = struct.Struct("3i")  # pid, uid, gid
BACKLOG_MAX = 65536  # bytes of lines that a client has not taken yet


class HungUp(Exception):
    """The client is gone; nobody is left to be told."""


def peer_is_self(sock: socket.socket) -> bool:
    """Whether the other end of a Unix socket is a process of this user."""
    try:
        credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    except OSError:
        return False
    _, uid, _ = _UCRED.unpack(credentials)
    return bool(uid == os.getuid())


def _hangup_watch(sock: socket.socket) -> select.epoll:
    """A descriptor that is readable once the peer has shut both directions: data and a half-close do not wake it."""
    watch = select.epoll()
    watch.register(sock.fileno(), 0)  # EPOLLHUP and EPOLLERR are always reported
    return watch


class CancelOnHangup:
    """Cancels the task inside when the client closes its connection; leaving raises `HungUp` then.

    A client that only ended its own direction is still there: the poll reports a hang-up when both directions are shut.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._epoll: select.epoll | None = None  # see _hangup_watch
        self._task: asyncio.Task[Any] | None = None  # the one to cancel
        self._requests = 0  # cancellations of that task that were not ours
        self._gone = False  # we have cancelled

    def __enter__(self) -> CancelOnHangup:
        self._task = asyncio.current_task()
        self._requests = self._task.cancelling() if self._task is not None else 0
        self._epoll = _hangup_watch(self._sock)
        asyncio.get_running_loop().add_reader(self._epoll.fileno(), self._on_hangup)
        return self

    def _on_hangup(self) -> None:
        self._stop()
        if self._task is not None:
            self._gone = True
            self._task.cancel()

    def _stop(self) -> None:
        if self._epoll is not None:
            asyncio.get_running_loop().remove_reader(self._epoll.fileno())
            self._epoll.close()
            self._epoll = None

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None) -> None:
        self._stop()
        if self._gone and self._task is not None and self._task.uncancel() <= self._requests and kind is not None:
            raise HungUp from exc


class Client:
    """One accepted connection to connect.sock: reads the request line, writes reply lines, then hands the stream over."""

    def __init__(self, sock: socket.socket) -> None:
        """`sock` must be non-blocking; it is closed by `close`, or by whoever took `stream`."""
        self.sock = sock
        self._loop = asyncio.get_running_loop()
        self.accepted = False  # the request was answered with ok: what follows is the stream
        self._early = b""  # bytes that came behind the request line: they belong to the stream
        self._writing = asyncio.Lock()  # held by the one writer of stream bytes
        self._unsent = b""  # the rest of lines that the client has not taken yet

    async def read_line(self) -> bytes:
        """The request line, without its newline. Raises GatewayError (usage), EOFError, OSError."""
        data = b""
        while b"\n" not in data:
            if len(data) >= LINE_MAX:
                raise GatewayError(f"the request line is longer than {LINE_MAX} bytes", kind=ErrorKind.USAGE)
            chunk = await self._loop.sock_recv(self.sock, LINE_MAX)
            if not chunk:
                raise EOFError
            data += chunk
        line, _, self._early = data.partition(b"\n")
        if len(line) >= LINE_MAX:
            raise GatewayError(f"the request line is longer than {LINE_MAX} bytes", kind=ErrorKind.USAGE)
        return line

    def post(self, message: Mapping[str, Any]) -> None:
        """Send a line without waiting; a client that does not read loses lines, never parts of one."""
        self._flush()
        if len(self._unsent) < BACKLOG_MAX:
            self._unsent += encode_line(message)
            self._flush()

    def _flush(self) -> None:
        try:
            while self._unsent:
                self._unsent = self._unsent[self.sock.send(self._unsent, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL) :]
        except OSError:  # full, or gone: whoever reads from it will notice
            pass

    async def send(self, message: Mapping[str, Any]) -> None:
        """Send a line and all before it. Raises OSError."""
        data, self._unsent = self._unsent + encode_line(message), b""
        self.accepted = self.accepted or "ok" in message
        await self._loop.sock_sendall(self.sock, data)

    async def read(self, limit: int = 65536) -> bytes:
        """Bytes behind the request line; b"" at the end. Raises OSError."""
        if self._early:
            data, self._early = self._early[:limit], self._early[limit:]
            return data
        return await self._loop.sock_recv(self.sock, limit)

    async def write(self, data: bytes) -> None:
        """Bytes of the stream, whole among those of other writers; waits while the client does not read. Raises OSError."""
        async with self._writing:
            await self._loop.sock_sendall(self.sock, data)

    async def gone(self) -> None:
        """Until the client has closed its connection, not just ended its direction."""
        gone = self._loop.create_future()
        with _hangup_watch(self.sock) as watch:
            self._loop.add_reader(watch, lambda: None if gone.done() else gone.set_result(None))
            try:
                await gone
            finally:
                self._loop.remove_reader(watch)

    def take_early(self) -> bytes:
        """What came behind the request line, for whoever takes `sock` over."""
        early, self._early = self._early, b""
        return early

    def stream(self) -> ClientStream:
        """The connection as a byte stream, which owns the socket from now on."""
        return ClientStream(self.sock, self.take_early())

    def close(self) -> None:
        """Idempotent, also after `stream`."""
        self.sock.close()


class ClientStream:
    """`relay.ByteStream` over a client's connection: first what came behind the request line."""

    def __init__(self, sock: socket.socket, early: bytes) -> None:
        self._stream = SocketStream.from_socket(sock)
        self._early = early  # read before anything else

    async def read(self, limit: int = 262144) -> bytes:
        """As SocketStream."""
        if self._early:
            data, self._early = self._early[:limit], self._early[limit:]
            return data
        return await self._stream.read(limit)

    async def write(self, data: bytes) -> None:
        """As SocketStream."""
        await self._stream.write(data)

    async def write_eof(self) -> None:
        """As SocketStream."""
        await self._stream.write_eof()

    def abort(self) -> None:
        """As SocketStream."""
        self._stream.abort()

    async def aclose(self) -> None:
        """As SocketStream."""
        await self._stream.aclose()

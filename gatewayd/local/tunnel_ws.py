"""The WebSocket under a tunnel, straight on the connection: no ASGI, no queue of messages, no compression (RFC 6455)."""

from __future__ import annotations

import asyncio
import json
import logging
from collections import deque
from collections.abc import Callable
from http import HTTPStatus

from websockets.exceptions import InvalidState
from websockets.frames import CloseCode, Frame, Opcode
from websockets.http11 import Request, Response
from websockets.server import ServerProtocol

from gatewayd.local.envelope import ServiceError, envelope

log = logging.getLogger(__name__)

QUEUE_HIGH = 1024 * 1024  # bytes received and not read above which the connection is not read
QUEUE_LOW = 256 * 1024  # below it, it is read again
SHORT = 4096  # payloads up to this are copied behind their header, larger ones are passed on as they are
CLOSE_DEADLINE = 2.0  # seconds for the client to answer a close


class TunnelSocket(asyncio.Protocol):
    """One WebSocket after its upgrade request was read. A `yamux.aio.MessageTransport` once accepted."""

    def __init__(self, conn: ServerProtocol, request: Request, transport: asyncio.Transport, on_lost: Callable[[], None]) -> None:
        self._conn = conn  # protocol state that has read the upgrade; without extensions, so never permessage-deflate
        self._request = request  # the upgrade
        self._transport = transport
        self._on_lost = on_lost  # called once, when the connection is gone
        self._received: deque[bytes] = deque()  # payloads nobody has read yet
        self._queued = 0  # their bytes
        self._paused = False  # the connection is not read
        self._readable = asyncio.Event()  # something is queued, or the connection has ended
        self._writable = asyncio.Event()  # the transport's buffer is below its limit
        self._writable.set()
        self._ended = False  # nothing more will come
        self._error: Exception | None = None  # why, unless it was closed in order
        self._lost = asyncio.Event()  # the connection is gone
        self._closing = False  # close() was called
        self.close_code = int(CloseCode.NORMAL_CLOSURE)  # sent by close(); changed before a shutdown

    def accept(self) -> bool:
        """Answer the upgrade with 101; False when the request is no proper upgrade (it has been answered then)."""
        response = self._conn.accept(self._request)
        self._conn.send_response(response)
        self._write()
        if response.status_code != HTTPStatus.SWITCHING_PROTOCOLS:
            self._transport.close()
            return False
        return True

    def reject(self, exc: ServiceError) -> None:
        """Answer the upgrade with an HTTP error and its envelope, and hang up."""
        log.info("WS tunnel: %d %s: %s (error_id=%s)", exc.status, exc.error, exc.message, exc.error_id)
        body = json.dumps(envelope(exc.error, exc.message, exc.error_id)).encode()
        response = self._conn.reject(exc.status, "")
        del response.headers["Content-Type"], response.headers["Content-Length"]
        response.headers["Content-Type"] = "application/json"
        response.headers["Content-Length"] = str(len(body))
        self._conn.send_response(Response(response.status_code, response.reason_phrase, response.headers, body))
        self._write()
        self._transport.close()

    # -- MessageTransport

    async def send(self, data: bytes) -> None:
        """Send one binary message; returns when the transport's buffer is below its limit. Raises OSError."""
        if self._closing or self._lost.is_set():
            raise ConnectionResetError("the tunnel's WebSocket is closed")
        size = len(data)
        if size < 126:
            header = bytes((0x82, size))
        elif size < 65536:
            header = b"\x82\x7e" + size.to_bytes(2)
        else:
            header = b"\x82\x7f" + size.to_bytes(8)
        if size <= SHORT:
            self._transport.write(header + data)
        else:
            self._transport.writelines((header, data))
        if not self._writable.is_set():
            await self._writable.wait()
            if self._lost.is_set():
                raise ConnectionResetError("the tunnel's WebSocket was lost")

    async def recv(self) -> bytes:
        """The next message. Raises EOFError after an orderly end, OSError after a failure."""
        while not self._received:
            if self._ended:
                if self._error is not None:
                    raise ConnectionResetError(f"the tunnel's WebSocket was lost: {self._error}") from self._error
                raise EOFError
            self._readable.clear()
            await self._readable.wait()
        data = self._received.popleft()
        self._queued -= len(data)
        if self._paused and self._queued < QUEUE_LOW and not self._lost.is_set():
            self._paused = False
            self._transport.resume_reading()
        return data

    async def close(self) -> None:
        """Say goodbye, give the client a moment to answer, hang up; idempotent."""
        if not self._closing:
            self._closing = True
            self._end(None)
            try:
                self._conn.send_close(self.close_code)
                self._write()
            except InvalidState:
                pass  # the client said it first
            if self._paused and not self._lost.is_set():
                self._paused = False
                self._transport.resume_reading()
        try:
            async with asyncio.timeout(CLOSE_DEADLINE):
                await self._lost.wait()
        except TimeoutError:
            self._transport.abort()

    # -- asyncio.Protocol

    def data_received(self, data: bytes) -> None:
        self._conn.receive_data(data)
        for event in self._conn.events_received():
            if isinstance(event, Frame):
                self._frame(event)
        self._write()  # answers to pings and closes, made by the protocol
        if self._conn.parser_exc is not None:
            self._end(self._conn.parser_exc)
            self._transport.close()
        elif self._conn.close_expected():
            self._transport.close()

    def _frame(self, frame: Frame) -> None:
        if frame.opcode in (Opcode.BINARY, Opcode.CONT):
            if frame.data and not self._ended:
                self._received.append(bytes(frame.data))
                self._queued += len(frame.data)
                self._readable.set()
                if self._queued > QUEUE_HIGH and not self._paused:
                    self._paused = True
                    self._transport.pause_reading()
        elif frame.opcode is Opcode.CLOSE:
            self._end(None)

    def eof_received(self) -> bool:
        self._conn.receive_eof()
        return False  # the transport closes itself

    def connection_lost(self, exc: Exception | None) -> None:
        self._end(exc or (None if self._closing else ConnectionResetError("the connection was closed without a goodbye")))
        self._lost.set()
        self._writable.set()
        self._on_lost()

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    def _end(self, error: Exception | None) -> None:
        if not self._ended:
            self._ended = True
            self._error = error
            self._readable.set()

    def _write(self) -> None:
        output = [data for data in self._conn.data_to_send() if data]
        if output and not self._transport.is_closing():
            self._transport.writelines(output)

"""LangSmith's own yamux client, as its SDK ships it, against our server side; with its tunnel's bridge too."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import socket
import threading
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from langsmith.sandbox._tunnel import _bridge
from langsmith.sandbox._yamux import YamuxSession, YamuxStream

from gatewayd.errors import StreamReset
from gatewayd.relay import RelayResult, SocketStream, relay
from gatewayd.tasks import TaskOwner
from gatewayd.yamux.aio import Mux, MuxStream, SessionConfig
from gatewayd.yamux.frames import INITIAL_WINDOW

pytestmark = [pytest.mark.interop, pytest.mark.timeout(60)]

MIB = 1 << 20


class BlockingConnection:
    """What the SDK's session wants beneath it: read exactly n bytes, write, close."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._file = sock.makefile("rb")

    def read(self, size: int) -> bytes:
        return self._file.read(size)

    def write(self, data: bytes) -> int:
        self._sock.sendall(data)
        return len(data)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def release(self) -> None:
        """Give the descriptor back; only when no thread reads any more."""
        self._file.close()
        self._sock.close()


class PlainTransport:
    """`MessageTransport` over our end of the socket pair."""

    def __init__(self, sock: socket.socket) -> None:
        self._stream = SocketStream.from_socket(sock)

    async def send(self, data: bytes) -> None:
        await self._stream.write(data)

    async def recv(self) -> bytes:
        data = await self._stream.read()
        if not data:
            raise EOFError
        return data

    async def close(self) -> None:
        await self._stream.aclose()


@contextlib.asynccontextmanager
async def connected(
    handler: Callable[[MuxStream], Any], config: SessionConfig | None = None
) -> AsyncIterator[tuple[YamuxSession, Mux, TaskOwner]]:
    theirs, ours = socket.socketpair()
    owner = TaskOwner("test")
    mux = Mux(PlainTransport(ours), client=False, name="sdk", config=config, on_stream=handler)
    running = owner.start(mux.run(), "mux")
    connection = BlockingConnection(theirs)
    session = YamuxSession(connection)
    try:
        yield session, mux, owner
    finally:
        session.close()
        async with asyncio.timeout(10):
            await running
        await owner.aclose()
        await asyncio.to_thread(session._reader_thread.join, 5)
        await asyncio.to_thread(session._keepalive_thread.join, 5)
        connection.release()


async def in_thread(function: Callable[..., Any], *args: Any) -> Any:
    async with asyncio.timeout(30):
        return await asyncio.to_thread(function, *args)


async def echo(stream: MuxStream) -> None:
    while data := await stream.read():
        await stream.write(data)
    await stream.write_eof()


def read_exactly(stream: YamuxStream, size: int) -> bytes:
    out = bytearray()
    while len(out) < size:
        data = stream.read(65536)
        if not data:
            break
        out += data
    return bytes(out)


def send_and_read_back(session: YamuxSession, payload: bytes) -> bytes:
    stream = session.open_stream()
    writer = threading.Thread(target=stream.write, args=(payload,))
    writer.start()
    got = read_exactly(stream, len(payload))
    writer.join(10)
    stream.close()
    return got


@pytest.mark.parametrize("window", [INITIAL_WINDOW, MIB, 16 * MIB])
async def test_bulk_echo_in_every_window_size(window: int) -> None:
    payload = os.urandom(8 * MIB)
    async with connected(echo, SessionConfig(max_stream_window=window)) as (session, mux, _):
        got = await in_thread(send_and_read_back, session, payload)
        assert hashlib.sha256(got).digest() == hashlib.sha256(payload).digest()
        async with asyncio.timeout(5):
            while mux.streams:  # noqa: ASYNC110 - the SDK's FIN is on its way, nothing else tells
                await asyncio.sleep(0.001)


async def test_many_streams_at_once() -> None:
    payloads = [os.urandom(50_000 + number) for number in range(24)]
    async with connected(echo) as (session, _, _):
        got = await asyncio.gather(*(in_thread(send_and_read_back, session, payload) for payload in payloads))
    assert [hashlib.sha256(one).digest() for one in got] == [hashlib.sha256(one).digest() for one in payloads]


async def test_pings_and_orderly_end() -> None:
    async with connected(echo, SessionConfig(keepalive_interval=0.02)) as (session, mux, _):
        assert 0 < await mux.ping() < 10
        stream = session.open_stream()
        stream.write(b"x")
        assert await in_thread(stream.read, 1) == b"x"
        session.close()
        await mux.wait_closed()
        assert mux.error is None


async def test_our_reset_and_our_end_reach_the_sdk() -> None:
    async def handler(stream: MuxStream) -> None:
        stream.abort()

    async with connected(handler) as (session, mux, _):
        with pytest.raises(ConnectionResetError):
            await in_thread(session.open_stream().read, 1)
        await mux.aclose()
        await in_thread(session._reader_thread.join, 5)
        assert session.is_closed


async def test_the_sdks_bridge_through_our_relay() -> None:
    """A TCP client → the SDK's bridge → both muxes → our relay → an echo server; many connections, both ways."""
    results: asyncio.Queue[RelayResult] = asyncio.Queue(100)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()[:2]

    async def dial(stream: MuxStream) -> None:
        sock = socket.create_connection((host, port))
        results.put_nowait(await relay(stream, SocketStream.from_socket(sock)))

    def talk(session: YamuxSession, payload: bytes) -> bytes:
        mine, bridged = socket.socketpair()
        bridge = threading.Thread(target=_bridge, args=(session.open_stream(), bridged))
        bridge.start()
        sender = threading.Thread(target=mine.sendall, args=(payload,))
        sender.start()
        with mine, mine.makefile("rb") as incoming:
            got = incoming.read(len(payload))
            sender.join(10)
        bridge.join(10)
        return got

    payloads = [os.urandom(400_000 + number) for number in range(8)]
    async with connected(dial) as (session, mux, _):
        got = await asyncio.gather(*(in_thread(talk, session, payload) for payload in payloads))
        assert got == payloads
        for payload in payloads:
            result = await asyncio.wait_for(results.get(), 10)
            assert result.error is None
            assert result.b_to_a >= len(payloads[0])
            assert result.a_to_b >= len(payload) - len(payloads)
        assert mux.streams == 0
    server.close()
    await server.wait_closed()


async def test_a_relay_ends_although_the_sdk_never_credits_after_its_fin() -> None:
    """The SDK drops what comes after its own close; nothing of ours may wait for that credit for ever."""
    results: asyncio.Queue[RelayResult] = asyncio.Queue(1)
    near, far = socket.socketpair()

    async def dial(stream: MuxStream) -> None:
        results.put_nowait(await relay(stream, SocketStream.from_socket(near)))

    config = SessionConfig(max_stream_window=INITIAL_WINDOW, stream_close_timeout=0.3)
    async with connected(dial, config) as (session, mux, owner):
        stream = session.open_stream()
        stream.write(b"x")
        source = SocketStream.from_socket(far)
        assert await source.read() == b"x"
        feeding = owner.start(source.write(bytes(64 * MIB)), "feed")
        await in_thread(stream.read, 1)
        stream.close()
        result = await asyncio.wait_for(results.get(), 10)
        assert isinstance(result.error, StreamReset)
        with pytest.raises(OSError, match=r"."):
            await feeding
        assert mux.streams == 0
        assert not mux.closed
        await source.aclose()

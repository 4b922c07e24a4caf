"""The copy loop and the socket stream: real sockets on loopback and socketpairs."""

from __future__ import annotations

import asyncio
import hashlib
import os
import socket
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import pytest
import uvloop

from gatewayd.errors import StreamClosed
from gatewayd.relay import Breakable, ByteStream, RelayResult, SocketStream, relay
from gatewayd.tasks import TaskOwner
from gatewayd.yamux.aio import MuxStream

pytestmark = pytest.mark.timeout(30)

MIB = 1 << 20


@pytest.fixture
async def owner() -> AsyncIterator[TaskOwner]:
    tasks = TaskOwner("test")
    yield tasks
    await tasks.aclose()
    left = asyncio.all_tasks() - {asyncio.current_task()}
    assert not left, f"tasks left behind: {left}"


def unix_pair() -> tuple[socket.socket, socket.socket]:
    return socket.socketpair()


def tcp_pair() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        near = socket.create_connection(server.getsockname())
        far, _ = server.accept()
        return near, far


@pytest.fixture(params=[unix_pair, tcp_pair], ids=["unix", "tcp"])
async def ends(request: pytest.FixtureRequest) -> AsyncIterator[tuple[SocketStream, SocketStream]]:
    near, far = (SocketStream.from_socket(sock) for sock in request.param())
    yield near, far
    await near.aclose()
    await far.aclose()


async def read_all(stream: ByteStream) -> bytes:
    out = bytearray()
    while data := await stream.read():
        out += data
    return bytes(out)


class Chain:
    """outer_a ↔ (inner_a, relay, inner_b) ↔ outer_b."""

    def __init__(self, owner: TaskOwner, tcp: bool = True) -> None:
        make = tcp_pair if tcp else unix_pair
        self.a, self.inner_a = (SocketStream.from_socket(sock) for sock in make())
        self.b, self.inner_b = (SocketStream.from_socket(sock) for sock in make())
        self.result: asyncio.Task[RelayResult] = owner.start(relay(self.inner_a, self.inner_b), "relay")

    async def close(self) -> None:
        for stream in (self.a, self.b):
            await stream.aclose()


# -- SocketStream -----------------------------------------------------------------------------------------------------


async def test_socket_bytes_and_half_close(ends: tuple[SocketStream, SocketStream]) -> None:
    near, far = ends
    await near.write(b"hello")
    assert await far.read(2) == b"he"
    assert await far.read() == b"llo"
    await near.write_eof()
    await near.write_eof()
    assert await far.read() == b""
    await far.write(b"reply")
    assert await near.read() == b"reply"
    with pytest.raises(StreamClosed):
        await near.write(b"more")


async def test_socket_back_pressure(ends: tuple[SocketStream, SocketStream], owner: TaskOwner) -> None:
    near, far = ends
    payload = os.urandom(24 * MIB)
    writing = owner.start(near.write(payload), "write")
    for _ in range(50):
        await asyncio.sleep(0)
    assert not writing.done(), "the kernel's buffers are smaller than this"
    got = bytearray()
    while len(got) < len(payload):
        got += await far.read()
    await writing
    assert hashlib.sha256(got).digest() == hashlib.sha256(payload).digest()


@pytest.mark.parametrize("how", ["abort", "aclose"])
async def test_closing_a_socket_wakes_its_reader_and_writer(
    ends: tuple[SocketStream, SocketStream], owner: TaskOwner, how: str
) -> None:
    near, _ = ends
    reading = owner.start(near.read(), "read")
    writing = owner.start(near.write(bytes(24 * MIB)), "write")
    for _ in range(20):
        await asyncio.sleep(0)
    assert not reading.done()
    assert not writing.done()
    if how == "abort":
        near.abort()
        near.abort()
    else:
        await near.aclose()
        await near.aclose()
    for task in (reading, writing):
        with pytest.raises(StreamClosed):
            await task
    for attempt in (near.read(), near.write(b"x"), near.write_eof()):
        with pytest.raises(StreamClosed):
            await attempt


async def test_a_cancelled_read_loses_nothing(ends: tuple[SocketStream, SocketStream], owner: TaskOwner) -> None:
    near, far = ends
    reading = owner.start(near.read(), "read")
    await asyncio.sleep(0)
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    await far.write(b"kept")
    assert await near.read() == b"kept"


async def test_tcp_abort_is_a_reset() -> None:
    near, far = (SocketStream.from_socket(sock) for sock in tcp_pair())
    near.abort()
    with pytest.raises(ConnectionResetError):
        await far.read()
    await far.aclose()


async def test_two_readers_are_refused(ends: tuple[SocketStream, SocketStream], owner: TaskOwner) -> None:
    near, _ = ends
    reading = owner.start(near.read(), "read")
    await asyncio.sleep(0)
    with pytest.raises(StreamClosed, match="another task"):
        await near.read()
    reading.cancel()


def test_mux_streams_are_watched_and_sockets_need_not_be() -> None:
    assert issubclass(MuxStream, Breakable)
    assert not issubclass(SocketStream, Breakable)


# -- relay ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tcp", [True, False])
async def test_relay_both_ways_with_half_close(owner: TaskOwner, tcp: bool) -> None:
    chain = Chain(owner, tcp)
    await chain.a.write(b"request")
    await chain.a.write_eof()
    assert await read_all(chain.b) == b"request"
    assert not chain.result.done(), "one direction has ended, the other has not"
    await chain.b.write(b"reply, after the request has ended")
    await chain.b.write_eof()
    assert await read_all(chain.a) == b"reply, after the request has ended"
    assert await chain.result == RelayResult(7, 34, None)
    await chain.close()


async def test_relay_bulk_both_ways_at_once(owner: TaskOwner) -> None:
    chain = Chain(owner)
    up, down = os.urandom(5 * MIB), os.urandom(7 * MIB)

    async def feed(stream: SocketStream, data: bytes) -> None:
        await stream.write(data)
        await stream.write_eof()

    feeds = [owner.start(feed(chain.a, up), "up"), owner.start(feed(chain.b, down), "down")]
    got_up, got_down = await asyncio.gather(read_all(chain.b), read_all(chain.a))
    await asyncio.gather(*feeds)
    assert (got_up, got_down) == (up, down)
    assert await chain.result == RelayResult(len(up), len(down), None)
    await chain.close()


async def test_relay_carries_back_pressure(owner: TaskOwner) -> None:
    chain = Chain(owner)
    writing = owner.start(chain.a.write(bytes(64 * MIB)), "write")
    done, _ = await asyncio.wait([writing], timeout=0.3)
    assert not done, "64 MiB can only be under way if somebody buffers without limit"
    await chain.close()
    with pytest.raises(StreamClosed):
        await writing
    assert (await chain.result).error is not None


async def test_relay_passes_a_reset_on(owner: TaskOwner) -> None:
    chain = Chain(owner)
    await chain.a.write(b"x")
    assert await chain.b.read() == b"x"
    chain.a.abort()
    with pytest.raises(ConnectionResetError):
        await chain.b.read()
    result = await chain.result
    assert isinstance(result.error, ConnectionResetError)
    assert result.a_to_b == 1
    await chain.close()


async def test_relay_cancelled_aborts_both(owner: TaskOwner) -> None:
    chain = Chain(owner)
    await asyncio.sleep(0)
    chain.result.cancel()
    with pytest.raises(asyncio.CancelledError):
        await chain.result
    for outer in (chain.a, chain.b):
        with pytest.raises(ConnectionResetError):
            await outer.read()
    await chain.close()


class BrittleStream:
    """Delivers what it is given, is never written out, and breaks on demand."""

    def __init__(self, chunks: list[bytes]) -> None:
        self.chunks = chunks
        self.gone = asyncio.get_running_loop().create_future()
        self.aborted = 0

    async def read(self, limit: int = 0) -> bytes:
        if self.chunks:
            return self.chunks.pop(0)
        await asyncio.shield(self.gone)
        raise ConnectionResetError(104, "broken")

    async def write(self, data: bytes) -> None:
        await asyncio.shield(self.gone)

    async def write_eof(self) -> None:
        pass

    def abort(self) -> None:
        self.aborted += 1

    async def aclose(self) -> None:
        pass

    def broken(self) -> asyncio.Future[None]:
        return self.gone


async def test_relay_notices_a_break_while_the_other_side_is_stalled(owner: TaskOwner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gatewayd.relay._DRAIN_DEADLINE", 0.05)
    stalled, inner = (SocketStream.from_socket(sock) for sock in tcp_pair())
    brittle = BrittleStream([bytes(16 * MIB)])
    relaying = owner.start(relay(brittle, inner), "relay")
    await asyncio.sleep(0.01)
    brittle.gone.set_result(None)
    result = await relaying
    assert result.error is not None
    assert brittle.aborted
    with pytest.raises(ConnectionResetError):
        await read_all(stalled)
    await stalled.aclose()


async def test_relay_delivers_what_came_before_the_break(owner: TaskOwner) -> None:
    reader, inner = (SocketStream.from_socket(sock) for sock in unix_pair())
    brittle = BrittleStream([b"last ", b"words"])
    brittle.gone.set_result(None)
    result = await relay(brittle, inner)
    assert isinstance(result.error, ConnectionResetError)
    assert result.a_to_b == 10
    assert await read_all(reader) == b"last words"
    await reader.aclose()


@pytest.mark.parametrize(
    "scenario",
    [
        test_relay_bulk_both_ways_at_once,
        test_relay_passes_a_reset_on,
        test_relay_cancelled_aborts_both,
        test_relay_delivers_what_came_before_the_break,
    ],
)
def test_the_same_on_uvloop(scenario: Callable[[TaskOwner], Coroutine[Any, Any, None]]) -> None:
    async def run() -> None:
        owner = TaskOwner("uvloop")
        await scenario(owner)
        await owner.aclose()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(run())


@pytest.mark.parametrize("how", ["abort", "aclose"])
def test_sockets_wake_their_waiters_on_uvloop(how: str) -> None:
    async def run() -> None:
        owner = TaskOwner("uvloop")
        near, far = (SocketStream.from_socket(sock) for sock in tcp_pair())
        await test_closing_a_socket_wakes_its_reader_and_writer((near, far), owner, how)
        await far.aclose()
        await owner.aclose()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(run())

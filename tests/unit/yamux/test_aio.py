"""Mux and MuxStream over in-memory transports: streams, back-pressure, failures, ends."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from gatewayd.errors import GatewayError, MuxClosed, StreamClosed, StreamReset
from gatewayd.yamux.aio import Mux, MuxStream, SessionConfig
from gatewayd.yamux.frames import INITIAL_WINDOW, Flag, FrameType, encode_header

pytestmark = pytest.mark.timeout(30)

MakePair = Callable[..., Awaitable[Any]]
SMALL = SessionConfig(max_stream_window=INITIAL_WINDOW)
MIB = 1 << 20


async def read_all(stream: MuxStream) -> bytes:
    out = bytearray()
    while data := await stream.read():
        out += data
    return bytes(out)


async def echo(stream: MuxStream) -> None:
    while data := await stream.read():
        await stream.write(data)
    await stream.write_eof()


async def swallow(stream: MuxStream) -> None:
    await read_all(stream)


class Hold:
    """A handler that keeps its stream as it is until the session ends."""

    def __init__(self) -> None:
        self.streams: list[MuxStream] = []

    async def __call__(self, stream: MuxStream) -> None:
        self.streams.append(stream)
        await stream._mux.wait_closed()

    async def first(self) -> MuxStream:
        await spin(lambda: bool(self.streams))
        return self.streams[0]


async def spin(condition: Callable[[], object]) -> None:
    """Let the loop run until `condition` holds; fails after 5 s."""
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110 - what is awaited is state inside the mux, which has no event for tests
            await asyncio.sleep(0)


# -- streams ----------------------------------------------------------------------------------------------------------


async def test_echo_with_half_close(make_pair: MakePair) -> None:
    pair = await make_pair(echo)
    stream = await pair.client.open_stream()
    await stream.write(b"hello")
    assert await stream.read() == b"hello"
    await stream.write(b"world")
    await stream.write_eof()
    await stream.write_eof()
    assert await read_all(stream) == b"world"
    await spin(lambda: pair.client.streams == pair.server.streams == 0)
    with pytest.raises(StreamClosed):
        await stream.write(b"more")
    assert await stream.read() == b"", "EOF stays"
    await stream.write_eof()
    await stream.aclose()
    stream.abort()


async def test_both_sides_may_open(make_pair: MakePair) -> None:
    pair = await make_pair(echo, on_client_stream=echo)
    for mux in (pair.client, pair.server):
        stream = await mux.open_stream()
        await stream.write(b"x")
        assert await stream.read() == b"x"
        await stream.aclose()


async def test_bulk_both_ways_on_many_streams(make_pair: MakePair) -> None:
    pair = await make_pair(echo)
    payload = os.urandom(700_000)

    async def one() -> str:
        stream = await pair.client.open_stream()

        async def feed() -> None:
            await stream.write(payload)
            await stream.write_eof()

        feeding = pair.owner.start(feed(), "feed")
        got = await read_all(stream)
        await feeding
        return hashlib.sha256(got).hexdigest()

    digests = await asyncio.gather(*(one() for _ in range(10)))
    assert set(digests) == {hashlib.sha256(payload).hexdigest()}
    assert pair.client.bytes_out == pair.server.bytes_in > 7_000_000
    assert pair.client.bytes_in == pair.server.bytes_out


async def test_reads_respect_the_limit(make_pair: MakePair) -> None:
    pair = await make_pair(echo)
    stream = await pair.client.open_stream()
    await stream.write(b"0123456789")
    assert [await stream.read(3) for _ in range(3)] == [b"012", b"345", b"678"]
    assert await stream.read(3) == b"9"


async def test_tiny_frames_are_joined_into_few_objects(make_pair: MakePair) -> None:
    hold = Hold()
    pair = await make_pair(hold)
    stream = await pair.client.open_stream()
    far = await hold.first()
    for i in range(500):
        await stream.write(b"%03d," % i)
        if i % 10 == 0:
            await asyncio.sleep(0)
    await stream.write_eof()
    await spin(lambda: far._eof)
    assert len(far._chunks) < 5
    assert await read_all(far) == b"".join(b"%03d," % i for i in range(500))


async def test_writer_blocks_at_the_window_and_continues_when_the_reader_does(make_pair: MakePair) -> None:
    hold = Hold()
    pair = await make_pair(hold, server_config=SMALL)
    stream = await pair.client.open_stream()
    payload = os.urandom(3 * MIB)
    writing = pair.owner.start(stream.write(payload), "write")
    far = await hold.first()
    await spin(lambda: sum(map(len, far._chunks)) == INITIAL_WINDOW)
    for _ in range(50):
        await asyncio.sleep(0)
    assert sum(map(len, far._chunks)) == INITIAL_WINDOW
    assert not writing.done()
    got = b""
    while len(got) < len(payload):
        got += await far.read()
    assert got == payload
    await writing


async def test_a_stalled_stream_does_not_hold_up_another(make_pair: MakePair) -> None:
    hold = Hold()

    async def handler(stream: MuxStream) -> None:
        await (hold if stream.id == 1 else echo)(stream)

    pair = await make_pair(handler, server_config=SMALL)
    stalled = await pair.client.open_stream()
    writing = pair.owner.start(stalled.write(bytes(2 * MIB)), "write")
    lively = await pair.client.open_stream()
    for _ in range(5):
        await lively.write(b"ping")
        assert await lively.read() == b"ping"
    assert not writing.done()
    stalled.abort()
    with pytest.raises(StreamReset):
        await writing


async def test_the_output_queue_is_bounded_when_the_transport_blocks(make_pair: MakePair) -> None:
    pair = await make_pair(swallow, server_config=SessionConfig(max_stream_window=16 * MIB))
    stream = await pair.client.open_stream()
    await stream.write(b"x")
    await spin(lambda: stream._core.send_window > MIB)
    pair.client_wire.hold.clear()
    writing = pair.owner.start(stream.write(bytes(8 * MIB)), "write")
    await spin(lambda: not pair.client._session.has_room)
    for _ in range(20):
        await asyncio.sleep(0)
    assert not writing.done()
    assert pair.client._session._outbox.data_size < MIB
    pair.client_wire.hold.set()
    await writing


async def test_bulk_writers_take_turns(make_pair: MakePair) -> None:
    counts: dict[int, int] = {}
    started = asyncio.Event()

    async def handler(stream: MuxStream) -> None:
        while data := await stream.read():
            counts[stream.id] = counts.get(stream.id, 0) + len(data)
        started.set()

    pair = await make_pair(handler)
    streams = [await pair.client.open_stream() for _ in range(4)]

    async def feed(stream: MuxStream) -> None:
        await stream.write(bytes(4 * MIB))
        await stream.write_eof()

    tasks = [pair.owner.start(feed(stream), "feed") for stream in streams]
    await started.wait()
    assert min(counts.values()) > 2 * MIB, "all had a similar share when the first was done"
    await asyncio.gather(*tasks)


# -- resets and closes ------------------------------------------------------------------------------------------------


async def test_abort_wakes_both_ends(make_pair: MakePair) -> None:
    hold = Hold()
    pair = await make_pair(hold)
    stream = await pair.client.open_stream()
    await stream.write(b"before")
    far = await hold.first()
    await spin(lambda: far._chunks)
    broken = far.broken()
    reading = pair.owner.start(stream.read(), "read")
    await asyncio.sleep(0)
    stream.abort()
    stream.abort()
    with pytest.raises(StreamReset):
        await reading
    await broken
    assert await far.read() == b"before", "what came before the reset is delivered"
    for attempt in (far.read(), far.write(b"x"), far.write_eof(), stream.write(b"x"), stream.read()):
        with pytest.raises(StreamReset):
            await attempt
    assert pair.client.streams == pair.server.streams == 0
    assert far.broken().done()


async def test_a_handlers_failure_resets_only_its_stream(make_pair: MakePair, caplog: pytest.LogCaptureFixture) -> None:
    async def handler(stream: MuxStream) -> None:
        if stream.id == 1:
            await stream.read()
            raise RuntimeError("handler broke")
        await echo(stream)

    pair = await make_pair(handler)
    first, second = await pair.client.open_stream(), await pair.client.open_stream()
    await first.write(b"x")
    with pytest.raises(StreamReset):
        await first.read()
    await second.write(b"y")
    assert await second.read() == b"y"
    assert any("handler of stream 1 failed" in record.getMessage() for record in caplog.records)


async def test_a_handler_that_returns_closes_its_stream(make_pair: MakePair) -> None:
    async def handler(stream: MuxStream) -> None:
        await stream.write(b"bye")

    pair = await make_pair(handler)
    stream = await pair.client.open_stream()
    assert await read_all(stream) == b"bye"


async def test_aclose_drains_late_data_and_resets_a_peer_that_never_stops(make_pair: MakePair) -> None:
    async def handler(stream: MuxStream) -> None:
        await stream.aclose()
        await stream.aclose()

    pair = await make_pair(handler, server_config=SMALL)
    polite = await pair.client.open_stream()
    assert await polite.read() == b""
    await polite.write(bytes(600_000))
    await polite.write_eof()
    await spin(lambda: pair.server.streams == 0)
    endless = await pair.client.open_stream()
    with pytest.raises(StreamReset):
        await endless.write(bytes(16 * MIB))


async def test_aclose_fails_a_waiting_reader(make_pair: MakePair) -> None:
    pair = await make_pair(Hold())
    stream = await pair.client.open_stream()
    reading = pair.owner.start(stream.read(), "read")
    await asyncio.sleep(0)
    await stream.aclose()
    with pytest.raises(StreamClosed):
        await reading


async def test_streams_are_refused_without_a_handler(make_pair: MakePair) -> None:
    pair = await make_pair(None)
    stream = await pair.client.open_stream()
    with pytest.raises(StreamReset):
        await stream.read()


async def test_opening_waits_while_the_backlog_is_full(make_pair: MakePair, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = await make_pair(echo, client_config=SessionConfig(accept_backlog=2))
    pair.server_wire.hold.clear()  # acknowledgements do not arrive
    for _ in range(2):
        await pair.client.open_stream()
    opening = pair.owner.start(pair.client.open_stream(), "open")
    for _ in range(20):
        await asyncio.sleep(0)
    assert not opening.done()
    pair.server_wire.hold.set()
    assert (await opening).id == 5
    pair.server_wire.hold.clear()
    monkeypatch.setattr("gatewayd.yamux.aio._OPEN_DEADLINE", 0.05)
    await spin(lambda: pair.client._session.unacked < 2)
    while pair.client._session.unacked < 2:
        await pair.client.open_stream()
    with pytest.raises(GatewayError) as caught:
        await pair.client.open_stream()
    assert caught.value.kind == "timeout"
    pair.server_wire.hold.set()


# -- session ----------------------------------------------------------------------------------------------------------


async def test_ping(make_pair: MakePair) -> None:
    pair = await make_pair()
    assert pair.client.rtt is None
    assert 0 < await pair.client.ping() == pair.client.rtt
    assert 0 < await pair.server.ping() < 5
    pair.server_wire.hold.clear()
    pinging = pair.owner.start(pair.client.ping(), "ping")
    await asyncio.sleep(0)
    await pair.client.aclose()
    with pytest.raises(MuxClosed):
        await pinging
    pair.server_wire.hold.set()


async def test_ping_times_out(make_pair: MakePair) -> None:
    pair = await make_pair(client_config=SessionConfig(keepalive_timeout=0.05))
    pair.server_wire.hold.clear()
    with pytest.raises(TimeoutError):
        await pair.client.ping()
    assert not pair.client.closed
    pair.server_wire.hold.set()


async def test_keepalive_measures_and_ends_a_dead_session(make_pair: MakePair) -> None:
    pair = await make_pair(echo, client_config=SessionConfig(keepalive_interval=0.02, keepalive_timeout=0.1))
    stream = await pair.client.open_stream()
    await spin(lambda: pair.client.rtt)
    pair.server_wire.hold.clear()
    with pytest.raises(MuxClosed, match="no answer to a ping"):
        await stream.read()
    await pair.client.wait_closed()
    assert isinstance(pair.client.error, MuxClosed)
    pair.server_wire.hold.set()


async def test_aclose_fails_streams_and_tells_the_peer(make_pair: MakePair) -> None:
    hold = Hold()
    pair = await make_pair(hold)
    stream = await pair.client.open_stream()
    far = await hold.first()
    await pair.client.aclose()
    await pair.client.aclose()
    assert pair.client.closed
    assert pair.client.error is None
    assert pair.client_wire.closed >= 1
    for attempt in (stream.read(), stream.write(b"x"), stream.write_eof(), pair.client.open_stream(), pair.client.ping()):
        with pytest.raises(MuxClosed):
            await attempt
    stream.abort()
    await pair.server.wait_closed()
    assert pair.server.error is None, "the peer left in order"
    with pytest.raises(MuxClosed, match="closed the connection"):
        await far.read()


async def test_what_arrived_with_its_end_is_delivered_after_the_session(make_pair: MakePair) -> None:
    got: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    async def handler(stream: MuxStream) -> None:
        await pair.server.wait_closed()
        got.set_result(await read_all(stream))

    pair = await make_pair(handler)
    stream = await pair.client.open_stream()
    await stream.write(b"last words")
    await stream.write_eof()
    await pair.client.aclose()
    assert await got == b"last words"


async def test_the_peers_orderly_go_away(make_pair: MakePair) -> None:
    pair = await make_pair(echo)
    stream = await pair.client.open_stream()
    await pair.client.ping()  # the stream has arrived there
    pair.server._session.go_away()
    pair.server._after()
    await spin(lambda: pair.client._session.peer_gone_away)
    with pytest.raises(MuxClosed):
        await pair.client.open_stream()
    await stream.write(b"x")
    assert await stream.read() == b"x"


@pytest.mark.parametrize("error", [ConnectionResetError(104, "reset"), GatewayError("cannot read: gone"), ValueError("a bug")])
@pytest.mark.parametrize("direction", ["send", "recv"])
async def test_transport_failures_end_the_session(
    make_pair: MakePair, error: Exception, direction: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    pair = await make_pair(echo)
    stream = await pair.client.open_stream()
    if direction == "send":
        pair.client_wire.send_error = error
        await stream.write(b"x")
    else:
        pair.client_wire.break_off(error)
    with pytest.raises(MuxClosed):
        await stream.read()
    await pair.runs[0]
    assert pair.client.error is error
    assert pair.client_wire.closed == 1
    await pair.server.wait_closed()


async def test_garbage_is_answered_with_go_away(make_pair: MakePair) -> None:
    pair = await make_pair(echo)
    await pair.client_wire.send(b"HTTP/1.1 502 Bad Gateway\r\n\r\n")
    await pair.server.wait_closed()
    assert isinstance(pair.server.error, MuxClosed)
    await pair.client.wait_closed()
    assert "go away with code 1" in str(pair.client.error)


async def test_cancelling_run_cleans_up(make_pair: MakePair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gatewayd.yamux.aio._ABANDON_DEADLINE", 0.05)
    started, cancelled = asyncio.Event(), asyncio.Event()

    async def stubborn(stream: MuxStream) -> None:
        started.set()
        try:
            await asyncio.get_running_loop().create_future()
        except asyncio.CancelledError:
            cancelled.set()
            raise

    pair = await make_pair(stubborn)
    stream = await pair.client.open_stream()
    await started.wait()
    pair.runs[1].cancel()
    with pytest.raises(asyncio.CancelledError):
        await pair.runs[1]
    assert pair.server.closed
    assert cancelled.is_set()
    with pytest.raises(MuxClosed):
        await stream.read()


async def test_aclose_without_run_closes_the_transport(make_pair: MakePair) -> None:
    pair = await make_pair()
    await pair.client.aclose()
    wire = pair.client_wire
    mux = Mux(wire, client=True, name="unused")
    await mux.aclose()
    assert mux.closed
    assert wire.closed >= 2
    await mux.run()
    with pytest.raises(MuxClosed):
        await mux.open_stream()


async def test_a_handler_may_close_its_own_session(make_pair: MakePair) -> None:
    async def handler(stream: MuxStream) -> None:
        await pair.server.aclose()

    pair = await make_pair(handler)
    stream = await pair.client.open_stream()
    with pytest.raises(MuxClosed):
        await stream.read()
    await pair.runs[1]


async def test_stream_opened_and_reset_in_one_message(make_pair: MakePair) -> None:
    hold = Hold()
    pair = await make_pair(hold)
    syn = encode_header(FrameType.WINDOW_UPDATE, Flag.SYN, 1, 0)
    rst = encode_header(FrameType.WINDOW_UPDATE, Flag.RST, 1, 0)
    await pair.client_wire.send(syn + rst)
    assert await pair.client.ping() > 0
    assert pair.server.streams == 0
    assert not hold.streams

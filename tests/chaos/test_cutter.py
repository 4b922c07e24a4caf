"""The relay itself: what it does to connections is what it says."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from websockets.asyncio.client import connect
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosedError, ConnectionClosedOK

from tests.chaos.cutter import Cut, Cutter
from tests.chaos.cutter_frames import Frames

ANSWER = b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\n\r\n"
HEADS = {0: b"\x82\x00", 125: b"\x82\x7d", 126: b"\x82\x7e\x00\x7e", 70_000: b"\x82\x7f" + (70_000).to_bytes(8, "big")}
DEADLINE = 20.0  # seconds


@pytest.mark.parametrize("seed", range(5))
def test_where_frames_end(seed: int) -> None:
    rng = random.Random(seed)  # noqa: S311 - repeatable, not secret
    stream, ends = ANSWER, [len(ANSWER)]
    for size in rng.choices(list(HEADS), k=20):
        stream += HEADS[size] + bytes(size)
        ends.append(len(stream))
    frames, at, found = Frames(), 0, []
    while at < len(stream):
        taken = frames.follow(stream[at : at + rng.randrange(1, 3000)], stop=rng.random() < 0.5)
        at += taken
        if frames.between:
            found.append(at)
        if not taken:  # it stands between two frames
            at += frames.follow(stream[at : at + 1])
    assert found
    assert set(found) <= set(ends)
    assert frames.between


def test_other_answers_have_no_frames() -> None:
    frames = Frames()
    assert frames.follow(b"HTTP/1.1 200 OK\r\n\r\nhello", stop=True) == 24
    assert frames.follow(bytes(100), stop=True) == 100
    assert not frames.between


@pytest.mark.parametrize("cut", Cut, ids=[cut.name.lower() for cut in Cut])
async def test_what_a_websocket_sees(cut: Cut) -> None:
    over = asyncio.Event()

    async def flood(connection: ServerConnection) -> None:
        await connection.send("first")
        while not over.is_set():
            await connection.send(bytes(100_000))
            await asyncio.sleep(0)  # a send that need not wait does not let others run

    options: dict[str, Any] = {"ping_interval": None, "close_timeout": 0.1, "compression": None}
    async with asyncio.timeout(DEADLINE), serve(flood, "127.0.0.1", 0, **options) as server:
        with Cutter(next(iter(server.sockets)).getsockname()[1]) as cutter:
            client = await connect(f"ws://127.0.0.1:{cutter.port}", **options)
            assert await client.recv() == "first"
            assert await asyncio.to_thread(cutter.strike, cut, 0.1) == 1
            if cut is Cut.RELOAD:
                with pytest.raises(ConnectionClosedOK) as closed:
                    await drain(client.recv)
                assert closed.value.rcvd is not None
                assert closed.value.rcvd.code == 1001
            elif cut in (Cut.RESET, Cut.BLACKHOLE, Cut.HALF_NEAR):
                with pytest.raises(ConnectionClosedError):
                    await drain(client.recv)
            elif cut is Cut.HALF_FAR:
                with pytest.raises(TimeoutError):
                    async with asyncio.timeout(1):
                        await drain(client.recv)
            else:
                assert len(await client.recv()) == 100_000
            over.set()
            client.transport.abort()
            async with connect(f"ws://127.0.0.1:{cutter.port}", **options) as again:
                assert await again.recv() == "first"


async def drain(recv: Callable[[], Awaitable[object]]) -> None:
    """Receive until that fails."""
    while True:
        await recv()

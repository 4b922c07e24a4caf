"""In-memory transports and connected pairs for the tests of yamux."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest
import uvloop

from gatewayd.tasks import TaskOwner
from gatewayd.yamux.aio import Mux, SessionConfig

_QUEUE_LIMIT = 4  # messages in flight in one direction


class MemoryTransport:
    """One end of an in-memory message pipe with back-pressure; faults can be set from outside."""

    def __init__(self, inbox: asyncio.Queue[bytes | None], outbox: asyncio.Queue[bytes | None]) -> None:
        self.inbox = inbox
        self.outbox = outbox
        self.closed = 0  # how often close() was called
        self.send_error: Exception | None = None  # raised by the next sends
        self.recv_error: Exception | None = None  # raised by recv once `break_off` has woken it
        self.hold = asyncio.Event()  # cleared: send() blocks
        self.hold.set()

    async def send(self, data: bytes) -> None:
        await self.hold.wait()
        if self.send_error is not None:
            raise self.send_error
        await self.outbox.put(data)

    async def recv(self) -> bytes:
        data = await self.inbox.get()
        if self.recv_error is not None:
            raise self.recv_error
        if data is None:
            raise EOFError
        return data

    async def close(self) -> None:
        self.closed += 1
        if self.closed == 1 and not self.outbox.full():
            self.outbox.put_nowait(None)

    def break_off(self, error: Exception) -> None:
        """Let the other side's next recv fail."""
        self.recv_error = error
        self.inbox.put_nowait(b"")


class Pair:
    """Two muxes that run, with what is needed to look behind them."""

    def __init__(self, client: Mux, server: Mux, wires: tuple[MemoryTransport, MemoryTransport], owner: TaskOwner) -> None:
        self.client = client
        self.server = server
        self.client_wire, self.server_wire = wires
        self.owner = owner  # for further tasks of a test
        self.runs = [owner.start(client.run(), "client"), owner.start(server.run(), "server")]


def memory_wires() -> tuple[MemoryTransport, MemoryTransport]:
    there: asyncio.Queue[bytes | None] = asyncio.Queue(_QUEUE_LIMIT)
    back: asyncio.Queue[bytes | None] = asyncio.Queue(_QUEUE_LIMIT)
    return MemoryTransport(back, there), MemoryTransport(there, back)


MakePair = Callable[..., Awaitable[Pair]]


@pytest.fixture
async def make_pair() -> AsyncIterator[MakePair]:
    """Makes running pairs; ends them and checks that no task survives."""

    @asynccontextmanager
    async def pair(on_stream: Any = None, **options: Any) -> AsyncIterator[Pair]:
        wires = memory_wires()
        client_config = options.get("client_config", SessionConfig())
        server_config = options.get("server_config", SessionConfig())
        owner = TaskOwner("test")
        made = Pair(
            Mux(wires[0], client=True, name="client", config=client_config, on_stream=options.get("on_client_stream")),
            Mux(wires[1], client=False, name="server", config=server_config, on_stream=on_stream),
            wires,
            owner,
        )
        await asyncio.sleep(0)  # both runs have begun
        try:
            yield made
        finally:
            await made.client.aclose()
            await made.server.aclose()
            async with asyncio.timeout(10):
                await asyncio.gather(*made.runs, return_exceptions=True)
            await owner.aclose()

    async with AsyncExitStack() as stack:

        async def make(on_stream: Any = None, **options: Any) -> Pair:
            return await stack.enter_async_context(pair(on_stream, **options))

        yield make
    left = asyncio.all_tasks() - {asyncio.current_task()}
    assert not left, f"tasks left behind: {left}"


def pytest_asyncio_loop_factories(config: pytest.Config, item: pytest.Item) -> dict[str, Any]:
    """Every test here that needs an event loop runs on both: the daemon uses uvloop where it can."""
    return {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}

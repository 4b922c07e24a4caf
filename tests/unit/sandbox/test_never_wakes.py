"""What is asked for with `wake=False`, of a sandbox that is stopped: no request may be one that starts it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from websockets.asyncio.server import ServerConnection

from gatewayd.errors import GatewayError
from gatewayd.frontends.ssh.target import Target, Ways
from gatewayd.relay import ByteStream
from gatewayd.sandbox.accounts import Account
from gatewayd.sandbox.boxes import Directory
from gatewayd.sandbox.guest_client import Guests
from gatewayd.sandbox.pool import Pool
from gatewayd.sandbox.session import ProcessSpec
from tests.unit.fakeservice import FakeService


@pytest.fixture
async def ways(service: FakeService) -> AsyncIterator[Ways]:
    """To the sandbox `x`, which is stopped."""
    service.add_box("x", status="stopped")
    directory = Directory()
    pool = Pool(directory)
    guests = Guests(directory, pool)
    yield Ways(directory, pool, guests)
    await guests.aclose()
    await pool.aclose()


def starters(service: FakeService) -> list[str]:
    """Requests that start a stopped sandbox."""
    return [seen.path for seen in service.seen if not seen.path.endswith("/status")] + [each.path for each in service.upgrades]


async def never(stream: ByteStream, peer: str) -> None:
    raise AssertionError(peer)


@pytest.mark.parametrize("kind", ["tcp", "unix"])
async def test_listeners(service: FakeService, account: Account, ways: Ways, kind: str) -> None:
    target = Target(ways, account, "x", "", wake=False)
    with pytest.raises(GatewayError, match="'x' is stopped"):
        await (target.listen_tcp("127.0.0.1", 0, never) if kind == "tcp" else target.listen_unix("", never))
    guests = ways.guests
    listening = (
        guests.listen_tcp(account, "x", "127.0.0.1", 0, "", never, wake=False)
        if kind == "tcp"
        else guests.listen_unix(account, "x", "", "", never, wake=False)
    )
    with pytest.raises(GatewayError, match="'x' is stopped") as caught:
        await listening
    assert caught.value.kind == "stopped"
    assert starters(service) == []


async def test_a_link_that_died_unnoticed(service: FakeService, account: Account, ways: Ways) -> None:
    service.boxes["x"]["status"] = "ready"
    await ways.pool.warm(account, "x")
    service.boxes["x"]["status"] = "stopped"
    linked = starters(service)
    with pytest.raises(GatewayError, match="'x' is stopped") as caught:
        await ways.guests.ready(account, "x", wake=False)
    assert caught.value.kind == "stopped"
    assert starters(service) == linked


async def test_programs_of_an_image_without_python(service: FakeService, account: Account, ways: Ways) -> None:
    """The way in is known by then, and nobody asks the service for it again."""
    released = asyncio.Event()

    async def serve(connection: ServerConnection, request: dict[str, Any]) -> None:
        await connection.send(json.dumps({"type": "started", "command_id": request["command_id"], "pid": 42}))
        await released.wait()

    service.on_exec = serve
    service.execute = lambda _: {"stdout": "GATEWAYD-NO-PYTHON\n", "stderr": "", "exit_code": 0}
    async with service.front() as origin, asyncio.timeout(20):
        service.boxes["x"] |= {"status": "ready", "dataplane_url": f"{origin}/dp/x"}
        target = Target(ways, account, "x", "", wake=False)
        session = await target.start(ProcessSpec(command="cat"))
        service.boxes["x"]["status"] = "stopped"
        before = starters(service)
        with pytest.raises(GatewayError, match="'x' is stopped"):
            await target.start(ProcessSpec(command="cat"))
        released.set()  # its connection breaks: it is not replaced
        with pytest.raises(GatewayError, match="'x' is stopped") as caught:
            await session.wait()
        assert caught.value.kind == "stopped"
        assert starters(service) == before
        await session.aclose()

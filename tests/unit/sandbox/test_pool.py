from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from gatewayd.errors import DialRefused, GatewayError
from gatewayd.sandbox import link as link_module
from gatewayd.sandbox import pool as pool_module
from gatewayd.sandbox.accounts import Account
from gatewayd.sandbox.boxes import Directory, require_running
from gatewayd.sandbox.pool import Pool
from gatewayd.yamux.aio import MuxStream
from tests.unit.fakeservice import FakeService, echo, until


@pytest.fixture
async def pool(service: FakeService, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Pool]:
    monkeypatch.setattr(pool_module, "BACKOFF_BASE", 0.01)
    monkeypatch.setattr(pool_module, "BACKOFF_MAX", 0.02)
    service.add_box("x")
    service.ports[7] = echo
    pool = Pool(Directory())
    yield pool
    await pool.aclose()


async def spoken(stream: MuxStream) -> bool:
    await stream.write(b"hello")
    answer = await stream.read()
    await stream.aclose()
    return answer == b"hello"


async def test_concurrent_demand_opens_one_link(service: FakeService, account: Account, pool: Pool) -> None:
    service.upgrade_gate.clear()
    dials = [asyncio.ensure_future(pool.dial(account, "x", 7)) for _ in range(20)]
    await until(lambda: service.upgrades, "an upgrade")
    assert [status["state"] for status in pool.status()] == ["connecting"]
    service.upgrade_gate.set()
    streams = await asyncio.gather(*dials)
    assert len(service.upgrades) == 1
    assert len({stream.id for stream in streams}) == 20
    assert all(await asyncio.gather(*(spoken(stream) for stream in streams)))
    assert sum(seen.method == "GET" for seen in service.seen) == 1


async def test_a_link_that_came_while_the_status_was_asked_is_used(
    service: FakeService, account: Account, pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, answered = asyncio.Event(), asyncio.Event()

    async def slowly(*args: Any) -> Any:
        asked.set()
        await answered.wait()
        return await require_running(*args)

    monkeypatch.setattr(pool_module, "require_running", slowly)
    careful = asyncio.ensure_future(pool.dial(account, "x", 7, wake=False))
    await asked.wait()
    assert await spoken(await pool.dial(account, "x", 7))
    answered.set()
    assert await spoken(await careful)
    assert len(service.upgrades) == 1


async def test_links_are_per_sandbox(service: FakeService, account: Account, pool: Pool) -> None:
    service.add_box("y")
    assert await spoken(await pool.dial(account, "x", 7))
    assert await spoken(await pool.dial(account, "y", 7))
    assert [request.path for request in service.upgrades] == ["/dp/id-x/tunnel", "/dp/id-y/tunnel"]
    assert {status["sandbox"] for status in pool.status()} == {"x", "y"}


async def test_status(service: FakeService, account: Account, pool: Pool) -> None:
    assert pool.status() == []
    stream = await pool.dial(account, "x", 7)
    (status,) = pool.status()
    assert (status["sandbox"], status["profile"], status["state"], status["streams"]) == ("x", "env", "up", 1)
    assert status["bytes_in"] > 0
    assert status["connected_at"] is not None
    await stream.aclose()


async def test_a_lost_link_is_redialled_on_the_next_demand_only(service: FakeService, account: Account, pool: Pool) -> None:
    stream = await pool.dial(account, "x", 7)
    service.connections[0].transport.abort()
    with pytest.raises(GatewayError):
        await stream.read()
    await until(lambda: pool.status()[0]["state"] == "down", "the link is down")
    assert len(service.upgrades) == 1
    assert await spoken(await pool.dial(account, "x", 7))
    assert len(service.upgrades) == 2


async def test_a_link_that_breaks_under_the_dial_is_replaced(service: FakeService, account: Account, pool: Pool) -> None:
    await pool.warm(account, "x")
    service.silent_ports.add(7)
    dial = asyncio.ensure_future(pool.dial(account, "x", 7))
    await until(lambda: service.dialled, "a dial")
    service.silent_ports.clear()
    service.connections[0].transport.abort()
    assert await spoken(await dial)
    assert len(service.upgrades) == 2


async def test_a_dead_link_is_noticed_by_the_next_dial(
    service: FakeService, account: Account, pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The machine slept, the connection is there and nobody answers: a new one is opened long before the keepalive would."""
    monkeypatch.setattr(link_module, "PROBE_AFTER", 0.05)
    monkeypatch.setattr(link_module, "PROBE_TIMEOUT", 0.05)
    await pool.warm(account, "x")
    service.connections[0].transport.pause_reading()
    assert await spoken(await pool.dial(account, "x", 7))
    assert len(service.upgrades) == 2
    service.connections[0].transport.abort()


async def test_a_slow_port_does_not_cost_the_link(
    service: FakeService, account: Account, pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link_module, "PROBE_AFTER", 0.05)
    service.silent_ports.add(9)
    other = await pool.dial(account, "x", 7)
    slow = asyncio.ensure_future(pool.dial(account, "x", 9))
    await until(lambda: pool.status()[0]["rtt_ms"] is not None, "the probe is answered")
    assert await spoken(other)
    assert len(service.upgrades) == 1
    slow.cancel()
    await asyncio.wait([slow])


async def test_passing_failures_are_retried_with_a_notice(service: FakeService, account: Account, pool: Pool) -> None:
    service.rejections.extend([(502, b""), (503, b"")])
    notices: list[str] = []
    assert await spoken(await pool.dial(account, "x", 7, notices.append))
    assert len(service.upgrades) == 3
    assert len(notices) == 2
    assert "HTTP 502" in notices[0]


async def test_lasting_failures_are_told_to_everybody(service: FakeService, account: Account, pool: Pool) -> None:
    service.rejections.extend([(502, b"")] * 10)
    outcomes = await asyncio.gather(*(pool.dial(account, "x", 7) for _ in range(4)), return_exceptions=True)
    assert all(isinstance(outcome, GatewayError) and "HTTP 502" in outcome.message for outcome in outcomes)
    assert len(service.upgrades) == 3
    (status,) = pool.status()
    assert status["state"] == "down"
    assert "HTTP 502" in status["last_error"]
    service.rejections.clear()
    assert await spoken(await pool.dial(account, "x", 7))


@pytest.mark.parametrize(("status", "kind"), [(401, "auth"), (403, "auth")])
async def test_a_refused_key_is_not_tried_again(
    service: FakeService, account: Account, pool: Pool, status: int, kind: str
) -> None:
    service.rejections.append((status, b""))
    with pytest.raises(GatewayError) as caught:
        await pool.dial(account, "x", 7)
    assert caught.value.kind == "auth"
    assert len(service.upgrades) == 1


async def test_404_for_a_sandbox_that_exists(service: FakeService, account: Account, pool: Pool) -> None:
    service.rejections.append((404, b""))
    with pytest.raises(GatewayError, match="its data plane has none") as caught:
        await pool.dial(account, "x", 7)
    assert caught.value.kind == "unsupported"


async def test_a_data_plane_that_moved_is_looked_up_again(service: FakeService, account: Account, pool: Pool) -> None:
    assert await spoken(await pool.dial(account, "x", 7))
    await service.stop_ws()
    await service.start_ws()
    assert await spoken(await pool.dial(account, "x", 7))
    assert sum(seen.path.endswith("/x") for seen in service.seen) == 2


async def test_a_sandbox_that_was_made_anew_is_looked_up_again(service: FakeService, account: Account, pool: Pool) -> None:
    assert await spoken(await pool.dial(account, "x", 7))
    service.connections[0].transport.abort()
    await until(lambda: pool.status()[0]["state"] == "down", "the link is down")
    service.rejections.append((404, b""))
    service.boxes["x"]["dataplane_url"] = f"{service.ws_origin}/dp/other"
    assert await spoken(await pool.dial(account, "x", 7))
    assert [request.path for request in service.upgrades] == ["/dp/id-x/tunnel", "/dp/id-x/tunnel", "/dp/other/tunnel"]


async def test_an_unknown_sandbox(service: FakeService, account: Account, pool: Pool) -> None:
    with pytest.raises(GatewayError, match="no sandbox named 'nope'") as caught:
        await pool.dial(account, "nope", 7)
    assert caught.value.kind == "not_found"
    assert service.upgrades == []


async def test_a_sandbox_that_is_being_made_is_waited_for(service: FakeService, account: Account, pool: Pool) -> None:
    service.boxes["x"]["status"] = "provisioning"
    notices: list[str] = []

    def notice(text: str) -> None:
        notices.append(text)
        service.boxes["x"]["status"] = "ready"

    assert await spoken(await pool.dial(account, "x", 7, notice))
    assert notices == ["waiting for sandbox 'x' to become ready"]


@pytest.mark.parametrize("status", ["failed", "deleting"])
async def test_a_sandbox_that_will_not_be_ready(service: FakeService, account: Account, pool: Pool, status: str) -> None:
    service.boxes["x"] |= {"status": status, "status_message": "out of\x1b luck"}
    with pytest.raises(GatewayError, match=f"sandbox 'x' is {status}: out of  luck"):
        await pool.dial(account, "x", 7)


@pytest.mark.parametrize(
    "url", [None, "", 3, "ftp://x", "http://", "http://u:p@127.0.0.1/", "http://127.0.0.1:0/", "http://a\nb/", "x" * 5000]
)
async def test_data_planes_that_are_none(service: FakeService, account: Account, pool: Pool, url: object) -> None:
    service.boxes["x"]["dataplane_url"] = url
    with pytest.raises(GatewayError, match="data plane"):
        await pool.dial(account, "x", 7)
    assert service.upgrades == []


async def test_nothing_listens(account: Account, pool: Pool, service: FakeService) -> None:
    with pytest.raises(DialRefused):
        await pool.dial(account, "x", 9)
    assert len(service.upgrades) == 1


async def test_the_last_demand_that_leaves_ends_the_dial(service: FakeService, account: Account, pool: Pool) -> None:
    service.upgrade_gate.clear()
    first, second = (asyncio.ensure_future(pool.dial(account, "x", 7)) for _ in range(2))
    await until(lambda: service.upgrades, "an upgrade")
    first.cancel()
    await asyncio.wait([first])
    assert pool.status()[0]["state"] == "connecting"
    second.cancel()
    await asyncio.wait([second])
    await asyncio.sleep(0)
    assert pool.status()[0]["state"] == "down"
    service.upgrade_gate.set()
    assert await spoken(await pool.dial(account, "x", 7))


async def test_an_idle_link_is_closed_a_used_one_is_not(service: FakeService, account: Account) -> None:
    service.add_box("x")
    service.ports[7] = echo
    pool = Pool(Directory(), idle_timeout=0.1)
    stream = await pool.dial(account, "x", 7)
    await asyncio.sleep(0.3)
    assert pool.status()[0]["state"] == "up"
    await stream.aclose()
    await until(lambda: not pool.status(), "the link is closed and then forgotten")
    assert await spoken(await pool.dial(account, "x", 7))
    assert len(service.upgrades) == 2
    await pool.aclose()


async def test_forgetting_a_sandbox(service: FakeService, account: Account, pool: Pool) -> None:
    stream = await pool.dial(account, "x", 7)
    await pool.forget(account, "x")
    await pool.forget(account, "never seen")
    with pytest.raises(GatewayError):
        await stream.read()
    assert await spoken(await pool.dial(account, "x", 7))
    assert sum(seen.path.endswith("/x") for seen in service.seen) == 2


async def test_after_the_end(account: Account, pool: Pool) -> None:
    await pool.warm(account, "x")
    await pool.aclose()
    with pytest.raises(GatewayError, match="stopping") as caught:
        await pool.dial(account, "x", 7)
    assert caught.value.kind == "unavailable"

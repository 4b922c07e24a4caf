from __future__ import annotations

import asyncio
import logging

import pytest

from gatewayd.errors import GatewayError
from gatewayd.tasks import SingleFlight, TaskOwner


async def test_a_closed_owner_starts_nothing() -> None:
    owner = TaskOwner("o")
    running = owner.start(asyncio.sleep(3600), "sleep")
    assert running.get_name() == "o/sleep"
    await owner.aclose()
    await owner.aclose()
    assert running.cancelled()
    assert len(owner) == 0
    with pytest.raises(RuntimeError, match="owner is closed"):
        owner.start(asyncio.sleep(0), "late")


async def test_a_failure_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    async def fail() -> None:
        raise ValueError("boom")

    owner = TaskOwner("o")
    with caplog.at_level(logging.ERROR):
        await asyncio.wait([owner.start(fail(), "fail")])
        await asyncio.sleep(0)
    assert "o/fail failed" in caplog.text
    await owner.aclose()


async def test_one_run_for_all() -> None:
    owner = TaskOwner("o")
    runs = 0
    gate = asyncio.Event()

    async def work() -> int:
        nonlocal runs
        runs += 1
        await gate.wait()
        return runs

    flight: SingleFlight[int] = SingleFlight(owner, "work")
    waiters = [asyncio.ensure_future(flight.join(work)) for _ in range(5)]
    await asyncio.sleep(0)
    assert flight.running
    gate.set()
    assert await asyncio.gather(*waiters) == [1] * 5
    assert await flight.join(work) == 2
    assert runs == 2
    await owner.aclose()


async def test_every_waiter_gets_the_exception_and_none_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    async def fail() -> int:
        await asyncio.sleep(0)
        raise GatewayError("no")

    owner = TaskOwner("o")
    flight: SingleFlight[int] = SingleFlight(owner, "work")
    outcomes = await asyncio.gather(*(flight.join(fail) for _ in range(3)), return_exceptions=True)
    assert [str(outcome) for outcome in outcomes] == ["no"] * 3
    assert caplog.text == ""
    await owner.aclose()


@pytest.mark.parametrize("keep", [False, True])
async def test_the_last_waiter_that_leaves_ends_the_run(keep: bool) -> None:
    owner = TaskOwner("o")
    ended = asyncio.Event()

    async def work() -> None:
        try:
            await asyncio.sleep(3600)
        finally:
            ended.set()

    flight: SingleFlight[None] = SingleFlight(owner, "work", keep=keep)
    first, second = (asyncio.ensure_future(flight.join(work)) for _ in range(2))
    await asyncio.sleep(0)
    first.cancel()
    await asyncio.wait([first])
    assert flight.running
    assert not ended.is_set()
    second.cancel()
    await asyncio.wait([second])
    await asyncio.sleep(0)
    assert flight.running is keep
    assert ended.is_set() is not keep
    await owner.aclose()
    assert ended.is_set()


async def test_a_run_that_is_stopped_with_its_owner() -> None:
    owner = TaskOwner("o")
    flight: SingleFlight[None] = SingleFlight(owner, "work")
    waiter = asyncio.ensure_future(flight.join(lambda: asyncio.sleep(3600)))
    await asyncio.sleep(0)
    await owner.aclose()
    with pytest.raises(RuntimeError, match="stopped"):
        await waiter

"""The lookups of one sandbox: how many at once, for how long, and what is kept."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from ipaddress import ip_address

import pytest

from gatewayd.local.egress import resolver
from gatewayd.local.egress.addresses import Address
from gatewayd.local.egress.resolver import NameUnknown, Resolver

_ADDRESS = ip_address("192.0.2.1")


class _System:
    """A system resolver that answers when it is told to."""

    def __init__(self) -> None:
        self.asked: list[str] = []  # names, in order
        self.full = asyncio.Event()  # set: it was asked three times
        self.answers = asyncio.Event()  # set: it answers

    async def lookup(self, name: str) -> list[Address]:
        self.asked.append(name)
        if len(self.asked) == 3:
            self.full.set()
        await self.answers.wait()
        if name == "unknown":
            raise NameUnknown(name)
        return [_ADDRESS, _ADDRESS]


@pytest.fixture
def system() -> _System:
    return _System()


@pytest.fixture
async def names(system: _System) -> AsyncIterator[Resolver]:
    made = Resolver(system.lookup)
    yield made
    await made.aclose()
    await made.aclose()


async def test_a_lookup_keeps_its_slot_when_nobody_waits_any_more(
    system: _System, names: Resolver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resolver, "_DEADLINE", 0.05)
    for _ in range(2):
        outcomes = await asyncio.gather(*(names.addresses(f"n{at}") for at in range(5)), return_exceptions=True)
        assert [str(one) for one in outcomes] == [f"n{at} was not found within 0 s" for at in range(5)]
        assert system.asked == ["n0", "n1", "n2"]  # the others found no slot, then or later
    monkeypatch.setattr(resolver, "_DEADLINE", 10.0)
    system.answers.set()
    assert await names.addresses("n3") == [_ADDRESS]  # slots are free again
    assert await names.addresses("n0") == [_ADDRESS]
    assert system.asked == ["n0", "n1", "n2", "n3"]  # what came late is kept


async def test_a_waiter_that_is_cancelled_leaves_the_lookup_alone(system: _System, names: Resolver) -> None:
    async with asyncio.timeout(10):
        waiting = [asyncio.ensure_future(names.addresses(f"n{at}")) for at in range(4)]
        await system.full.wait()
        for task in waiting:
            task.cancel()
        outcomes = await asyncio.gather(*waiting, return_exceptions=True)
        assert [type(one) for one in outcomes] == [asyncio.CancelledError] * 4
        system.answers.set()
        for at in range(4):
            assert await names.addresses(f"n{at}") == [_ADDRESS]
        assert system.asked == ["n0", "n1", "n2", "n3"]


async def test_a_name_that_is_unknown_frees_its_slot(system: _System, names: Resolver) -> None:
    system.answers.set()
    for _ in range(5):
        with pytest.raises(NameUnknown):
            await names.addresses("unknown")
    assert system.asked == ["unknown"] * 5

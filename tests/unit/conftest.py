"""What the gateway's tests share: a scripted sandbox service on real sockets, and a guard against leaked tasks."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from gatewayd.sandbox.accounts import Account
from tests.unit.fakeservice import FakeService


@pytest.fixture
async def service() -> AsyncIterator[FakeService]:
    """Running; afterwards no task may be left but the test's own."""
    service = FakeService()
    await service.start()
    yield service
    await service.aclose()
    await asyncio.sleep(0)
    left = [task for task in asyncio.all_tasks() if task is not asyncio.current_task() and not task.done()]
    assert left == []


@pytest.fixture
async def account(service: FakeService) -> AsyncIterator[Account]:
    """An account of that service."""
    account = service.account()
    yield account
    await account.rest.aclose()

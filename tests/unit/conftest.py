"""What the gateway's tests share: a scripted sandbox service on real sockets, and a guard against leaked tasks."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from gatewayd.config import Settings
from gatewayd.frontends.tcp import Forwards
from gatewayd.sandbox import pool as pool_module
from gatewayd.sandbox.accounts import Account, Accounts
from gatewayd.sandbox.boxes import Directory
from gatewayd.sandbox.embedded import Embedded
from gatewayd.sandbox.guest_client import Guests
from gatewayd.sandbox.pool import Pool
from tests.unit.fakeservice import KEY, FakeService, echo, upper_at_eof
from tests.unit.parts import Parts


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


@pytest.fixture
async def parts(service: FakeService, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Parts]:
    """Its default profile is the scripted service, which has a sandbox `x` with an echo on port 7 and a late answer on port 8."""
    monkeypatch.setattr(pool_module, "BACKOFF_BASE", 0.001)
    service.add_box("x")
    service.ports |= {7: echo, 8: upper_at_eof}
    environ = {"HOME": str(tmp_path), "LANGSMITH_API_KEY": KEY, "LANGSMITH_ENDPOINT": service.endpoint}
    settings = Settings(environ)
    embedded = Embedded(tmp_path / "state", environ)
    directory = Directory()
    pool = Pool(directory)
    guests = Guests(directory, pool)
    parts = Parts(settings, Accounts(settings, embedded), directory, pool, Forwards(pool, guests), embedded, guests)
    yield parts
    await parts.forwards.aclose()
    await guests.aclose()
    await pool.aclose()
    await embedded.aclose()
    await parts.accounts.aclose()

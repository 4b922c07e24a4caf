"""Guests in real sandboxes of the embedded service, seen by the gateway's own client, with a relay on the way that can break."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from gatewayd.config import Profile, Proxies
from gatewayd.errors import GatewayError
from gatewayd.sandbox import guest_session
from gatewayd.sandbox import pool as pool_module
from gatewayd.sandbox.accounts import Account
from gatewayd.sandbox.boxes import Directory, wait_for
from gatewayd.sandbox.guest_client import Guests
from gatewayd.sandbox.pool import Pool
from gatewayd.sandbox.rest_client import FixedAccess
from tests.sdk.cutter import Cutter

STOP_DEADLINE = 10.0  # seconds the service itself promises


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything here starts sandboxes."""
    here = str(Path(__file__).parent)
    for item in items:
        if str(item.path).startswith(here):
            item.add_marker(pytest.mark.e2e)
            if shutil.which("bwrap") is None:
                item.add_marker(pytest.mark.skip(reason="bubblewrap is not installed"))


class Service:
    """``gatewayd local`` in a process of its own."""

    def __init__(self, root: Path, port: int = 0) -> None:
        self.root = root
        env = {name: value for name, value in os.environ.items() if not name.startswith(("LANGSMITH", "LANGCHAIN"))}
        command = [sys.executable, "-m", "gatewayd", "local", "--state-dir", str(root / "state"), "--port", str(port)]
        with (root / "service.log").open("ab") as log:
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log, env=env)
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, (root / "service.log").read_text()
        said = json.loads(line)
        self.port: int = urlsplit(said["endpoint"]).port or 0
        self.key = Path(said["api_key_file"]).read_text().strip()

    def stop(self, number: int = signal.SIGTERM) -> None:
        """End it; idempotent."""
        assert self.process.stdout is not None
        if self.process.poll() is None:
            self.process.send_signal(number)
        self.process.wait(STOP_DEADLINE)
        self.process.stdout.close()


@dataclass
class World:
    """The gateway's parts, and a sandbox."""

    account: Account  # through the relay
    control: Account  # past it
    directory: Directory
    pool: Pool
    guests: Guests
    cutter: Cutter
    sandbox: str = ""

    async def sh(self, script: str) -> str:
        """Run a script inside, not through the guest; its output."""
        place, _ = await Directory().locate(self.control, self.sandbox)
        answer = await self.control.rest.execute(
            place.url, {"command": script, "shell": "/bin/sh"}, action="run", sandbox=self.sandbox, deadline=30
        )
        assert answer["exit_code"] == 0, answer
        return str(answer["stdout"])

    async def status(self) -> Any:
        return (await self.control.rest.status(self.sandbox))["status"]


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """One service for all tests that do not end it."""
    running = Service(tmp_path_factory.mktemp("service"))
    yield running
    running.stop()


_numbers = itertools.count(1)


def account_at(port: int, key: str) -> Account:
    profile = Profile(name="test", endpoint=f"http://127.0.0.1:{port}", api_key=key)
    return Account(profile, FixedAccess(profile), Proxies())


def open_world(service: Service, cutter: Cutter) -> World:
    """Through the relay: the service's data planes are where its requests came to."""
    account, control = account_at(cutter.port, service.key), account_at(service.port, service.key)
    directory = Directory()
    pool = Pool(directory)
    return World(account, control, directory, pool, Guests(directory, pool), cutter)


async def close_world(world: World) -> None:
    await world.guests.aclose()
    await world.pool.aclose()
    await world.account.rest.aclose()
    await world.control.rest.aclose()
    await asyncio.sleep(0)
    left = [task for task in asyncio.all_tasks() if task is not asyncio.current_task() and not task.done()]
    assert left == []


async def make_sandbox(account: Account) -> str:
    name = f"guest-{os.getpid()}-{next(_numbers)}"
    await account.rest.create({"name": name})
    await wait_for(account.rest, name, "ready", 60.0)
    return name


@pytest.fixture(scope="session")
def shared_sandbox(service: Service) -> str:
    """Of the tests that leave it running; it goes with the service."""

    async def make() -> str:
        account = account_at(service.port, service.key)
        try:
            return await make_sandbox(account)
        finally:
            await account.rest.aclose()

    return asyncio.run(make())


@pytest.fixture
async def world(service: Service, shared_sandbox: str, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[World]:
    """With a sandbox that other tests use too, and the guest that they started."""
    monkeypatch.setattr(pool_module, "BACKOFF_BASE", 0.01)
    monkeypatch.setattr(guest_session, "BACKOFF_BASE", 0.01)
    with Cutter(service.port) as cutter:
        world = open_world(service, cutter)
        world.sandbox = shared_sandbox
        yield world
        await close_world(world)


@pytest.fixture
async def own(service: Service, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[World]:
    """With a sandbox of its own."""
    monkeypatch.setattr(pool_module, "BACKOFF_BASE", 0.01)
    monkeypatch.setattr(guest_session, "BACKOFF_BASE", 0.01)
    with Cutter(service.port) as cutter:
        world = open_world(service, cutter)
        world.sandbox = await make_sandbox(world.control)
        yield world
        with contextlib.suppress(GatewayError):  # a test may have deleted it
            await world.control.rest.delete(world.sandbox)
        await close_world(world)

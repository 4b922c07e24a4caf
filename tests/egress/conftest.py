"""Sandboxes of the native runtime behind a real gate, and servers for them to reach."""

from __future__ import annotations

import asyncio
import os
import shlex
import shutil
import ssl
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from gatewayd.local.boxes import Boxes
from gatewayd.local.clock import Clock
from gatewayd.local.egress.addresses import Address, Reach
from gatewayd.local.egress.resolver import NameUnknown
from gatewayd.local.egress.service import Egress
from gatewayd.local.execution import spawn
from gatewayd.local.models import CommandBody, CreateBody, PatchBody
from gatewayd.local.runtime.base import Process
from gatewayd.local.runtime.native import NativeRuntime
from gatewayd.local.sandbox import Sandbox
from gatewayd.local.store import Store

from .servers import Server, certificates, own_address, serving

DEADLINE = 30.0  # seconds for one command inside


@pytest.fixture(scope="session")
def address() -> str:
    """Where the test's servers are: an address that sandboxes may not reach unless it is opened for them."""
    found = own_address()
    if not found or ip_address(found).is_loopback:
        pytest.skip("this machine has no address but its loopback")
    for program in ("bwrap", "nft"):
        if shutil.which(program, path=os.environ["PATH"] + ":/usr/sbin:/sbin") is None:
            pytest.skip(f"{program} is not installed")
    return found


@pytest.fixture(scope="session")
def authority(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The CA of the test's servers, and their key and certificate."""
    return certificates(tmp_path_factory.mktemp("ca"))


@pytest.fixture
def https(address: str, authority: tuple[Path, Path]) -> Iterator[Server]:
    """A server with TLS."""
    with serving(address, authority[1]) as server:
        yield server


@pytest.fixture
def http(address: str) -> Iterator[Server]:
    """A server without."""
    with serving(address, None) as server:
        yield server


@dataclass
class Outcome:
    """How a command went."""

    code: int
    out: str
    err: str


@dataclass
class World:
    """The service's parts, and what names lead to."""

    boxes: Boxes
    state: Path
    names: dict[str, list[str]] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)  # names that were looked up

    async def lookup(self, name: str) -> list[Address]:
        """As `resolver.Lookup`."""
        self.asked.append(name)
        if name not in self.names:
            raise NameUnknown(name)
        return [ip_address(text) for text in self.names[name]]

    async def create(self, proxy_config: dict[str, Any] | None = None, **fields: Any) -> Sandbox:
        """A ready sandbox."""
        body = CreateBody.model_validate({"wait_for_ready": True, "proxy_config": proxy_config, **fields})
        sandbox = await self.boxes.create(body)
        assert sandbox.run is not None
        assert sandbox.run.gate is not None, sandbox.record.status_message
        return sandbox

    async def patch(self, sandbox: Sandbox, proxy_config: dict[str, Any]) -> None:
        """As PATCH does."""
        await self.boxes.update(sandbox, PatchBody.model_validate({"proxy_config": proxy_config}))

    async def run(self, sandbox: Sandbox, command: str, deadline: float = DEADLINE) -> Outcome:
        """A shell command, to its end."""
        assert sandbox.run is not None
        process = await spawn(sandbox.run.box, sandbox.record, CommandBody(command=command))
        os.close(process.stdin)
        try:
            async with asyncio.timeout(deadline):
                out, err = await asyncio.gather(_all(process.stdout), _all(process.stderr or -1))
                return Outcome(await process.exited, out, err)
        except TimeoutError:
            await process.signal(9)
            raise AssertionError(f"no end within {deadline:.0f} s: {command}") from None

    async def ok(self, sandbox: Sandbox, command: str) -> str:
        """The output of a command that must succeed."""
        done = await self.run(sandbox, command)
        assert done.code == 0, (command, done, self.decisions(sandbox))
        return done.out

    def decisions(self, sandbox: Sandbox) -> list[dict[str, Any]]:
        """What was decided."""
        return self.boxes.egress.journal(sandbox.record.id).entries()

    async def until(self, sandbox: Sandbox, **wanted: Any) -> dict[str, Any]:
        """The first decision with these values."""
        async with asyncio.timeout(10):
            async for entry in self.boxes.egress.journal(sandbox.record.id).follow():
                if all(entry[key] == value for key, value in wanted.items()):
                    return entry
        raise AssertionError("the journal ended")


class Spawned:
    """A Python script that is talked to by lines."""

    def __init__(self, process: Process) -> None:
        self._process = process
        self._pending = b""

    async def line(self) -> str:
        """The next line of its output."""
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(DEADLINE):
            while b"\n" not in self._pending:
                readable = asyncio.Event()
                loop.add_reader(self._process.stdout, readable.set)
                try:
                    await readable.wait()
                finally:
                    loop.remove_reader(self._process.stdout)
                chunk = os.read(self._process.stdout, 65536)
                assert chunk, "it has ended"
                self._pending += chunk
        line, _, self._pending = self._pending.partition(b"\n")
        return line.decode() + "\n"

    def go_on(self) -> None:
        """One line of input."""
        os.write(self._process.stdin, b"\n")


async def spawned(world: World, sandbox: Sandbox, script: str) -> Spawned:
    """Start a Python script in a sandbox."""
    assert sandbox.run is not None
    command = CommandBody(command=f"exec python3 -c {shlex.quote(script)}")
    return Spawned(await spawn(sandbox.run.box, sandbox.record, command))


async def _all(fd: int) -> str:
    loop, data = asyncio.get_running_loop(), b""
    try:
        while True:
            readable = asyncio.Event()
            loop.add_reader(fd, readable.set)
            try:
                await readable.wait()
            finally:
                loop.remove_reader(fd)
            if not (chunk := os.read(fd, 65536)):
                return data.decode("utf-8", "replace")
            data += chunk
    finally:
        os.close(fd)


@pytest_asyncio.fixture
async def world(tmp_path: Path, address: str, authority: tuple[Path, Path]) -> AsyncIterator[World]:
    """A service whose sandboxes may reach the test's servers."""
    state = tmp_path / "state"
    state.mkdir(mode=0o700)
    store = Store(state / "state.db")
    names: dict[str, list[str]] = {}
    clock = Clock()
    world: World

    async def lookup(name: str) -> list[Address]:
        return await world.lookup(name)

    def trust() -> ssl.SSLContext:
        return ssl.create_default_context(cafile=str(authority[0]))

    egress = Egress(store, clock, Reach([address]), lookup, trust)
    world = World(Boxes(store, NativeRuntime(state), clock, {}, egress), state, names)
    names.update({name: [address] for name in ("api.test", "other.test", "a.wild.test", "xn--bcher-kva.test")})
    await world.boxes.recover()
    try:
        yield world
    finally:
        await world.boxes.aclose()

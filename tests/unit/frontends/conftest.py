"""The gateway's parts on a scripted service, reached through real sockets."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from gatewayd.config import Settings
from gatewayd.frontends.stdio import ConnectServer
from gatewayd.frontends.tcp import Forwards
from gatewayd.sandbox import pool as pool_module
from gatewayd.sandbox.accounts import Accounts
from gatewayd.sandbox.boxes import Directory
from gatewayd.sandbox.embedded import Embedded
from gatewayd.sandbox.pool import Pool
from tests.unit.fakeservice import KEY, FakeService, echo, upper_at_eof


@dataclass
class Parts:
    """The gateway without its daemon."""

    settings: Settings
    accounts: Accounts
    directory: Directory
    pool: Pool
    forwards: Forwards
    embedded: Embedded


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
    parts = Parts(settings, Accounts(settings, embedded), directory, pool, Forwards(pool), embedded)
    yield parts
    await parts.forwards.aclose()
    await pool.aclose()
    await embedded.aclose()
    await parts.accounts.aclose()


class Caller:
    """A client of connect.sock."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.setblocking(False)
        self.loop = asyncio.get_running_loop()
        self.buffer = b""

    async def dial(self) -> None:
        await self.loop.sock_connect(self.sock, str(self.path))

    async def ask(self, behind: bytes = b"", **request: Any) -> None:
        await self.loop.sock_sendall(self.sock, json.dumps(request).encode() + b"\n" + behind)

    async def line(self) -> dict[str, Any]:
        while b"\n" not in self.buffer:
            data = await self.read_some()
            assert data, f"the connection ended after {self.buffer!r}"
            self.buffer += data
        line, _, self.buffer = self.buffer.partition(b"\n")
        message = json.loads(line)
        assert isinstance(message, dict)
        return message

    async def read_some(self) -> bytes:
        async with asyncio.timeout(10):
            return await self.loop.sock_recv(self.sock, 65536)

    async def read(self, size: int) -> bytes:
        while len(self.buffer) < size:
            data = await self.read_some()
            assert data, f"the connection ended after {self.buffer!r}"
            self.buffer += data
        data, self.buffer = self.buffer[:size], self.buffer[size:]
        return data

    async def read_all(self) -> bytes:
        while data := await self.read_some():
            self.buffer += data
        return self.buffer

    async def write(self, data: bytes) -> None:
        await self.loop.sock_sendall(self.sock, data)

    def close(self) -> None:
        self.sock.close()


@pytest.fixture
async def connect(parts: Parts, tmp_path: Path) -> AsyncIterator[Path]:
    """Path of a connect.sock that is being served."""
    path = tmp_path / "connect.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(path))
        listener.listen()
        server = ConnectServer(parts.accounts, parts.directory, parts.pool, parts.forwards)
        server.start(listener)
        yield path
        await server.aclose()


@pytest.fixture
async def caller(connect: Path) -> AsyncIterator[Caller]:
    """Connected, nothing sent yet."""
    caller = Caller(connect)
    await caller.dial()
    yield caller
    caller.close()

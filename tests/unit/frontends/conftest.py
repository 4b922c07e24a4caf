"""connect.sock on a scripted service."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from gatewayd.frontends.ssh.front import SshFront
from gatewayd.frontends.ssh.target import Ways
from gatewayd.frontends.stdio import ConnectServer
from tests.unit.frontends.caller import Caller
from tests.unit.parts import Parts


@pytest.fixture
async def connect(parts: Parts, tmp_path: Path) -> AsyncIterator[Path]:
    """Path of a connect.sock that is being served."""
    path = tmp_path / "connect.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(path))
        listener.listen()
        ssh = SshFront(parts.settings, parts.accounts, Ways(parts.directory, parts.pool, parts.guests))
        server = ConnectServer(parts.settings, parts.accounts, parts.directory, parts.pool, parts.forwards, parts.guests, ssh)
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

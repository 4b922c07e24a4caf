"""The op `guest` of connect.sock, and forwards that resume, against real guests."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from gatewayd import api
from gatewayd.config import Settings
from gatewayd.frontends.ssh.front import SshFront
from gatewayd.frontends.ssh.target import Ways
from gatewayd.frontends.stdio import ConnectServer
from gatewayd.frontends.tcp import Forwards
from gatewayd.guest import wire
from gatewayd.guest.events import Exit, Output
from gatewayd.guest.session import ClientSession
from gatewayd.guest.wire import Answer
from gatewayd.sandbox.accounts import Accounts
from gatewayd.sandbox.embedded import Embedded
from tests.guest.conftest import Service, World
from tests.guest.test_processes import DEADLINE
from tests.guest.test_streams import server

pytestmark = pytest.mark.e2e


class Gateway:
    """connect.sock in this process, for the world's pool and guests."""

    def __init__(self, world: World, path: Path, environ: dict[str, str]) -> None:
        self.world = world
        self.path = path
        settings = Settings(environ)
        self.embedded = Embedded(path.parent / "state", environ)
        self.accounts = Accounts(settings, self.embedded)
        self.forwards = Forwards(world.pool, world.guests)
        self.ssh = SshFront(settings, self.accounts, Ways(world.directory, world.pool, world.guests))
        self.server = ConnectServer(settings, self.accounts, world.directory, world.pool, self.forwards, world.guests, self.ssh)
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(path))
        self.listener.listen()
        self.server.start(self.listener)

    async def ask(self, **request: Any) -> tuple[dict[str, Any], asyncio.StreamReader, asyncio.StreamWriter]:
        """The reply, and the connection."""
        reader, writer = await asyncio.open_unix_connection(str(self.path))
        writer.write(api.encode_line({"sandbox": self.world.sandbox, **request}))
        while True:
            reply = api.decode_line(await reader.readline())
            if "notice" not in reply:
                return reply, reader, writer

    async def aclose(self) -> None:
        await self.server.aclose()
        await self.ssh.aclose()
        await self.forwards.aclose()
        self.listener.close()
        await self.accounts.aclose()
        await self.embedded.aclose()


@pytest.fixture
async def gateway(world: World, service: Service, tmp_path: Path) -> AsyncIterator[Gateway]:
    environ = {
        "HOME": str(tmp_path),
        "LANGSMITH_API_KEY": service.key,
        "LANGSMITH_ENDPOINT": f"http://127.0.0.1:{world.cutter.port}",
    }
    made = Gateway(world, tmp_path / "connect.sock", environ)
    yield made
    await made.aclose()


async def test_a_session_of_the_clients_own_goes_on_after_a_cut(gateway: Gateway) -> None:
    core = ClientSession()
    core.open([("kind", b"process"), ("command", b"read a; echo got $a; exit 5")])
    for round_number in range(2):
        reply, reader, writer = await gateway.ask(op="guest", session=core.id.hex(), mode=core.mode, received=core.received)
        core.connected(Answer(**reply["ok"]))
        if round_number:
            core.send_input(b"this\n")
        writer.writelines(core.data_to_send())
        events = []
        async with asyncio.timeout(DEADLINE):
            while data := await reader.read(65536):
                events += core.receive(data, 0.0)
                if round_number and any(isinstance(event, Exit) for event in events):
                    core.close()
                writer.writelines(core.data_to_send())
                if not round_number and core.opened:
                    gateway.world.cutter.cut()
                if core.closed and not core.unacknowledged:
                    break
        core.disconnected()
        writer.close()
    assert Output(1, b"got this\n") in events
    assert Exit(5, "", False) in events


@pytest.mark.parametrize(
    ("request_fields", "text"),
    [
        ({"session": "00"}, "session must be 32 hexadecimal digits"),
        ({"session": "zz" * 16}, "session must be 32 hexadecimal digits"),
        ({}, "session is missing"),
        ({"session": "00" * 16, "mode": 3}, "mode must be a whole number from 0 to 2"),
        ({"session": "00" * 16, "received": -1}, "received must be a whole number"),
        ({"session": "00" * 16, "wake": 1}, "wake must be true or false"),
    ],
)
async def test_requests_that_make_no_sense(gateway: Gateway, request_fields: dict[str, Any], text: str) -> None:
    reply, _, writer = await gateway.ask(op="guest", **request_fields)
    assert reply["error"]["kind"] == "usage"
    assert text in reply["error"]["message"]
    writer.close()


async def test_a_session_that_there_is_not(gateway: Gateway) -> None:
    reply, reader, writer = await gateway.ask(op="guest", session=os.urandom(16).hex(), mode=wire.Mode.RESUME, received=0)
    assert reply["ok"]["status"] == wire.Status.NO_SESSION
    assert await reader.read() == b""
    writer.close()


async def test_a_forward_that_resumes(gateway: Gateway) -> None:
    world = gateway.world
    async with server(world, "tcp") as port:
        reply, _, writer = await gateway.ask(op="forward", remote_port=int(port), resumable=True)
        reader, near = await asyncio.open_connection("127.0.0.1", reply["ok"]["port"])
        for part in (b"abc", b"def", b"ghi"):
            near.write(part)
            await near.drain()
            world.cutter.cut()
        near.write_eof()
        async with asyncio.timeout(DEADLINE):
            assert await reader.read() == b"ihgfedcba"
        near.close()
        writer.close()


async def test_what_may_not_wake_a_stopped_sandbox(own: World, gateway: Gateway) -> None:
    await own.control.rest.stop(own.sandbox)
    for request in (
        {"op": "connect", "port": 80},
        {"op": "ssh"},
        {"op": "forward", "remote_port": 80},
        {"op": "exec", "command": "true"},
        {"op": "guest", "session": "00" * 16},
    ):
        reply, _, writer = await gateway.ask(**{**request, "sandbox": own.sandbox, "wake": False})
        assert reply["error"]["kind"] == "stopped", (request, reply)
        assert reply["error"]["hint"] == f"`sandbox start {own.sandbox}` starts it"
        writer.close()
    assert await own.status() == "stopped"

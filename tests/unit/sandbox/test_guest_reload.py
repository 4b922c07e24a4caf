"""A real guest behind a scripted service: what the service can do that the embedded one does not."""

from __future__ import annotations

import asyncio
import hashlib
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from gatewayd.errors import GatewayError
from gatewayd.relay import SocketStream, relay
from gatewayd.sandbox import guest_boot, guest_host, guest_session
from gatewayd.sandbox import pool as pool_module
from gatewayd.sandbox.accounts import Account
from gatewayd.sandbox.boxes import Directory
from gatewayd.sandbox.guest_boot import guest_file
from gatewayd.sandbox.guest_client import Guests
from gatewayd.sandbox.pool import Pool
from gatewayd.sandbox.session import ExitStatus, ProcessSpec
from gatewayd.yamux.aio import MuxStream
from tests.unit.fakeservice import FakeService

DEADLINE = 20.0  # seconds


class Inside:
    """The sandbox `x`, which is this machine: `/execute` starts the guest, the tunnel leads to it."""

    def __init__(self, service: FakeService, root: Path) -> None:
        self.service = service
        content = guest_file()[2] + b"# %s\n" % os.urandom(8).hex().encode()  # a guest of our own: it is ended here
        self.file = root / "guest.py"
        self.file.write_bytes(content)
        self.digest = hashlib.sha256(content).hexdigest()
        self.pids: set[int] = set()
        self.boots = 0
        service.add_box("x", dataplane_url=f"{service.endpoint}/dp/x")
        service.execute = self.execute

    def execute(self, _: dict[str, Any]) -> dict[str, Any]:
        done = subprocess.run(
            [sys.executable, "-I", "-S", self.file, "start"], capture_output=True, text=True, check=True, timeout=20
        )
        self.boots += 1
        port, pid = done.stdout.split()[2::2]
        self.pids.add(int(pid))
        self.service.ports[int(port)] = self.lead(int(port))
        return {"stdout": done.stdout, "stderr": "", "exit_code": 0}

    def lead(self, port: int) -> Any:
        async def to_guest(stream: MuxStream) -> None:
            sock = socket.create_connection(("127.0.0.1", port))
            await relay(stream, SocketStream.from_socket(sock))

        return to_guest

    def close(self) -> None:
        for pid in self.pids:
            os.kill(pid, signal.SIGKILL)
        for folder in Path("/tmp").glob(f".gatewayd-guest-*-{self.digest[:16]}*"):
            shutil.rmtree(folder)


@pytest.fixture
async def guests(service: FakeService, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[tuple[Inside, Guests]]:
    for module in (pool_module, guest_session):
        monkeypatch.setattr(module, "BACKOFF_BASE", 0.01)
        monkeypatch.setattr(module, "BACKOFF_MAX", 0.05)
    inside = Inside(service, tmp_path)
    # The data plane's WebSockets are elsewhere than its REST.
    service.boxes["x"]["dataplane_url"] = f"{service.ws_origin}/dp/x"
    directory = Directory()
    pool = Pool(directory)
    guests = Guests(directory, pool)
    yield inside, guests
    await guests.aclose()
    await pool.aclose()
    inside.close()


@pytest.fixture(autouse=True)
def rest_is_where_it_is(service: FakeService, monkeypatch: pytest.MonkeyPatch) -> None:
    """`/execute` of the scripted service is not on the port of its WebSockets."""
    original = guest_boot.boot

    async def boot(account: Account, directory: Directory, sandbox: str, notice: Any = None) -> Any:
        elsewhere = Directory()
        url = service.boxes["x"]["dataplane_url"]
        service.boxes["x"]["dataplane_url"] = f"{service.endpoint}/dp/x"
        try:
            return await original(account, elsewhere, sandbox, notice)
        finally:
            service.boxes["x"]["dataplane_url"] = url

    monkeypatch.setattr(guest_host, "boot", boot)


@pytest.mark.parametrize("code", [1001, 1011])
async def test_the_service_reloads(service: FakeService, account: Account, guests: tuple[Inside, Guests], code: int) -> None:
    inside, sessions = guests
    async with asyncio.timeout(DEADLINE):
        session = await sessions.process(account, "x", ProcessSpec(argv=("cat",)))
        await session.write(b"before ")
        assert await session.read() == b"before "
        await service.connections[-1].close(code)
        await session.write(b"after")
        session.write_eof()
        assert await session.read() == b"after"
        assert await session.wait() == ExitStatus(0)
        await session.aclose()
    assert len(service.upgrades) == 2
    assert inside.boots == 1


async def test_the_service_says_goodbye_and_then_that_it_has_stopped(
    service: FakeService, account: Account, guests: tuple[Inside, Guests]
) -> None:
    """Between the two its status is still "ready": a dial would start the sandbox again."""
    _, sessions = guests
    async with asyncio.timeout(DEADLINE):
        session = await sessions.process(account, "x", ProcessSpec(argv=("cat",)))
        asked = len(service.seen)
        await service.connections[-1].close(1000)
        while sum(seen.path.endswith("/status") for seen in service.seen[asked:]) < 2:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        service.boxes["x"]["status"] = "stopped"
        with pytest.raises(GatewayError, match="sandbox 'x' was stopped: the session is over") as caught:
            await session.wait()
        await session.aclose()
    assert caught.value.kind == "stopped"
    assert len(service.upgrades) == 1


async def test_the_service_is_away_for_a_while(service: FakeService, account: Account, guests: tuple[Inside, Guests]) -> None:
    _, sessions = guests
    async with asyncio.timeout(DEADLINE):
        session = await sessions.process(account, "x", ProcessSpec(argv=("cat",)))
        service.rejections.extend([(503, b"")] * 7)
        service.connections[-1].transport.abort()
        await session.write(b"there")
        assert await session.read() == b"there"
        await session.aclose()
    assert not service.rejections


async def test_a_guest_that_answers_and_hangs_up(
    service: FakeService, account: Account, guests: tuple[Inside, Guests], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, sessions = guests
    monkeypatch.setattr(guest_session, "BRIEF_MAX", 3)
    answered = 0

    async def hang_up(stream: MuxStream) -> None:
        nonlocal answered
        loop = asyncio.get_running_loop()
        with socket.create_connection(("127.0.0.1", port)) as sock:
            sock.setblocking(False)
            await loop.sock_sendall(sock, await stream.read(61))
            await stream.write(await loop.sock_recv(sock, 21))
        answered += 1
        await stream.aclose()

    async with asyncio.timeout(DEADLINE):
        session = await sessions.process(account, "x", ProcessSpec(argv=("cat",)))
        (port,) = service.ports
        service.ports[port] = hang_up
        await service.connections[-1].close(1011)
        with pytest.raises(GatewayError, match="hangs up again and again"):
            await session.wait()
        await session.aclose()
    assert 3 <= answered <= 6


async def test_an_address_that_is_out_of_date(service: FakeService, account: Account, guests: tuple[Inside, Guests]) -> None:
    """The guest has been replaced, and something else listens where it was."""
    inside, sessions = guests

    async def something_else(stream: MuxStream) -> None:
        await stream.read()
        await stream.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        await stream.aclose()

    async with asyncio.timeout(DEADLINE):
        await sessions.ready(account, "x")
        (pid,) = inside.pids
        os.kill(pid, signal.SIGKILL)
        inside.pids.clear()
        service.ports = dict.fromkeys(service.ports, something_else)
        session = await sessions.process(account, "x", ProcessSpec(argv=("echo", "new")))
        assert await session.read() == b"new\n"
        await session.aclose()
    assert inside.boots == 2


async def test_many_who_want_it_at_once_start_it_once(account: Account, guests: tuple[Inside, Guests]) -> None:
    inside, sessions = guests
    async with asyncio.timeout(DEADLINE):
        started = await asyncio.gather(*(sessions.process(account, "x", ProcessSpec(argv=("true",))) for _ in range(10)))
        for session in started:
            assert await session.wait() == ExitStatus(0)
            await session.aclose()
    assert inside.boots == 1


async def test_an_image_without_python(service: FakeService, account: Account, guests: tuple[Inside, Guests]) -> None:
    _, sessions = guests
    bodies = []

    def execute(body: dict[str, Any]) -> dict[str, Any]:
        bodies.append(body)
        return {"stdout": "GATEWAYD-NO-PYTHON\n", "stderr": "", "exit_code": 0}

    service.execute = execute
    assert sessions.carrier(account, "x") == ""
    for _ in range(2):
        with pytest.raises(GatewayError, match="has no Python") as caught:
            await sessions.process(account, "x", ProcessSpec(argv=("true",)))
        assert caught.value.kind == "unsupported"
    assert len(bodies) == 1
    assert sessions.carrier(account, "x") == "text"

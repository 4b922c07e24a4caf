"""Programs without a guest, against a scripted service that speaks /execute/ws."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from websockets.asyncio.server import ServerConnection

from gatewayd.errors import GatewayError, StreamClosed
from gatewayd.sandbox.accounts import Account
from gatewayd.sandbox.boxes import Directory
from gatewayd.sandbox.session import STDERR, STDOUT, ExitStatus, ProcessSpec
from gatewayd.sandbox.text_session import BUFFER_MAX, TextSession, start_text_session
from tests.unit.fakeservice import FakeService

DEADLINE = 20.0  # seconds


class Command:
    """What a test's program is told, and what it says."""

    def __init__(self, service: FakeService) -> None:
        self.request: dict[str, Any] = {}
        self.told: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self.connection: ServerConnection | None = None
        service.add_box("x")
        service.on_exec = self.serve

    async def serve(self, connection: ServerConnection, request: dict[str, Any]) -> None:
        self.request = request
        self.connection = connection
        await self.say(type="started", command_id=request["command_id"], pid=42)
        async for message in connection:
            self.told.put_nowait(json.loads(message))

    async def say(self, **message: Any) -> None:
        assert self.connection is not None
        await self.connection.send(json.dumps(message))

    async def next(self) -> dict[str, Any]:
        async with asyncio.timeout(DEADLINE):
            return await self.told.get()


@pytest.fixture
def command(service: FakeService) -> Command:
    return Command(service)


async def start(account: Account, **spec: Any) -> TextSession:
    async with asyncio.timeout(DEADLINE):
        return await start_text_session(account, Directory(), "x", ProcessSpec(**spec))


async def test_input_output_and_exit(account: Account, command: Command) -> None:
    session = await start(account, argv=("echo", "a b"), env={"X": "1"}, cwd="/tmp")
    assert session.pid == 42
    assert (command.request["command"], command.request["shell"]) == ("echo 'a b'", "/bin/sh")
    assert (command.request["env"], command.request["cwd"]) == ({"X": "1"}, "/tmp")
    await session.write("hü".encode()[:2])
    await session.write("hü".encode()[2:])
    session.write_eof()
    session.write_eof()
    assert [(await command.next())["data"] for _ in range(2)] == ["h", "ü"]
    assert await command.next() == {"type": "close_stdin"}
    with pytest.raises(StreamClosed):
        await session.write(b"x")
    await command.say(type="stdout", data="out", offset=0)
    await command.say(type="stderr", data="err", offset=0)
    await command.say(type="exit", exit_code=3)
    async with asyncio.timeout(DEADLINE):
        assert await session.read(STDOUT, 2) == b"ou"
        assert await session.read(STDOUT) == b"t"
        assert await session.read(STDOUT) == b""
        assert await session.read(STDERR) == b"err"
        assert await session.read(STDERR) == b""
        assert await session.wait() == ExitStatus(3)
        await session.input_stopped
    await session.aclose()
    await session.aclose()


async def test_a_terminal(account: Account, command: Command) -> None:
    session = await start(account, pty=True, term="xterm", cols=80, rows=24)
    assert "command" not in command.request
    assert (command.request["pty"], command.request["env"]) == (True, {"TERM": "xterm"})
    assert await command.next() == {"type": "resize", "cols": 80, "rows": 24}
    session.resize(1, 2)
    session.resize(100, 30)
    assert await command.next() == {"type": "resize", "cols": 100, "rows": 30}
    session.signal("INT")
    assert await command.next() == {"type": "input", "data": "\x03"}
    session.write_eof()
    assert await command.next() == {"type": "input", "data": "\x04"}
    async with asyncio.timeout(DEADLINE):
        assert await session.read(STDERR) == b""
    await session.aclose()
    assert await command.next() == {"type": "kill"}


async def test_signals(account: Account, command: Command) -> None:
    session = await start(account, command="sleep 9")
    with pytest.raises(GatewayError, match="there is KILL alone") as caught:
        session.signal("USR1")
    assert caught.value.kind == "unsupported"
    session.signal("TERM")
    assert await command.next() == {"type": "kill"}
    await command.say(type="exit", exit_code=137)
    async with asyncio.timeout(DEADLINE):
        assert await session.wait() == ExitStatus(137)
    await session.aclose()


async def test_what_text_cannot_carry(account: Account, command: Command) -> None:
    session = await start(account, command="cat")
    with pytest.raises(GatewayError, match="not UTF-8 at byte 1") as caught:
        await session.write(b"a\xff")
    assert caught.value.kind == "unsupported"
    await session.aclose()
    with pytest.raises(GatewayError, match="no guest to change users") as caught:
        await start(account, command="id", user="somebody")
    assert caught.value.kind == "unsupported"


async def test_the_command_is_lost(account: Account, command: Command) -> None:
    session = await start(account, command="cat")
    await command.say(type="stdout", data="first", offset=0)
    await command.say(type="error", error_type="CommandError", error="it is\x1b gone")
    async with asyncio.timeout(DEADLINE):
        with pytest.raises(GatewayError, match="it is  gone"):
            await session.wait()
        assert await session.read() == b"first"
        with pytest.raises(GatewayError, match="it is  gone"):
            await session.read()
        with pytest.raises(GatewayError, match="it is  gone"):
            await session.write(b"x")
    await session.aclose()


async def test_a_reader_that_is_slow_and_one_that_does_not_want_it(account: Account, command: Command) -> None:
    session = await start(account, command="yes")
    chunk = "y" * 100_000
    for number in range(40):
        await command.say(type="stdout", data=chunk, offset=number * len(chunk))
    async with asyncio.timeout(DEADLINE):
        received = len(await session.read())
        while session._buffered <= BUFFER_MAX:  # noqa: ASYNC110 - until the receiver waits
            await asyncio.sleep(0)
        for _ in range(100):
            await asyncio.sleep(0)
        assert session._buffered <= BUFFER_MAX + len(chunk)
        while received < 40 * len(chunk):
            received += len(await session.read())
        session.stop_output(STDOUT)
        await command.say(type="stdout", data=chunk, offset=received)
        assert await session.read() == b""
        await command.say(type="exit", exit_code=0)
        assert await session.wait() == ExitStatus(0)
    assert session._buffered == 0
    await session.aclose()

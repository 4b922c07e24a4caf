from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from websockets.asyncio.server import ServerConnection

from gatewayd.errors import GatewayError
from gatewayd.sandbox import exec_ws
from gatewayd.sandbox.accounts import Account
from gatewayd.sandbox.boxes import Directory
from gatewayd.sandbox.exec_ws import ExecSession, ExecSpec, Exit, InputDecoder
from tests.unit.fakeservice import FakeService, until

Script = Callable[[ServerConnection, dict[str, Any]], Awaitable[None]]


class Scripted:
    """Plays one script for each connection, and keeps the first message of each."""

    def __init__(self, service: FakeService, *scripts: Script) -> None:
        self.requests: list[dict[str, Any]] = []
        self._scripts = list(scripts)
        service.on_exec = self._play

    async def _play(self, connection: ServerConnection, request: dict[str, Any]) -> None:
        self.requests.append(request)
        await self._scripts.pop(0)(connection, request)


async def say(connection: ServerConnection, **message: Any) -> None:
    await connection.send(json.dumps(message))


async def heard(connection: ServerConnection) -> dict[str, Any]:
    message = json.loads(await connection.recv())
    assert isinstance(message, dict)
    return message


@pytest.fixture
async def start(
    service: FakeService, account: Account, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Callable[[ExecSpec], Awaitable[ExecSession]]]:
    monkeypatch.setattr(exec_ws, "BACKOFF_BASE", 0.001)
    monkeypatch.setattr(exec_ws, "BACKOFF_MAX", 0.002)
    service.add_box("x")
    sessions: list[ExecSession] = []

    async def start(spec: ExecSpec) -> ExecSession:
        session = ExecSession(account, Directory(), "x", spec)
        sessions.append(session)
        await session.start()
        return session

    yield start
    for session in sessions:
        await session.aclose()
        await session.aclose()


Start = Callable[[ExecSpec], Awaitable[ExecSession]]


async def everything(session: ExecSession) -> tuple[bytes, bytes, int]:
    out, err = b"", b""
    while True:
        event = await session.receive()
        if isinstance(event, Exit):
            return out, err, event.code
        if event.stderr:
            err += event.data
        else:
            out += event.data


async def test_a_command(service: FakeService, start: Start) -> None:
    async def run(connection: ServerConnection, request: dict[str, Any]) -> None:
        await say(connection, type="started", command_id=request["command_id"], pid=42)
        await say(connection, type="stdout", data="hé", offset=0)
        await say(connection, type="stderr", data="oops", offset=0)
        await say(connection, type="unknown", data=1)
        await say(connection, type="stdout", data="llo", offset=3)
        await say(connection, type="exit", exit_code=3)

    scripted = Scripted(service, run)
    spec: dict[str, Any] = {
        "command": "ls",
        "env": {"A": "b"},
        "cwd": "/tmp",
        "shell": "/bin/sh",
        "timeout": 9,
        "close_stdin": True,
    }
    session = await start(ExecSpec(**spec))
    assert session.pid == 42
    assert await everything(session) == ("héllo".encode(), b"oops", 3)
    request = scripted.requests[0]
    assert len(request.pop("command_id")) == 32
    assert request == {
        "type": "execute",
        "command": "ls",
        "env": {"A": "b"},
        "cwd": "/tmp",
        "shell": "/bin/sh",
        "timeout_seconds": 9,
        "idle_timeout_seconds": exec_ws.IDLE_TIMEOUT,
        "ttl_seconds": exec_ws.TTL,
        "kill_on_disconnect": False,
        "close_stdin": True,
    }
    assert service.upgrades[0].path == "/dp/id-x/execute/ws"


async def test_input_resize_eof_and_kill(service: FakeService, start: Start) -> None:
    received: list[dict[str, Any]] = []

    async def run(connection: ServerConnection, request: dict[str, Any]) -> None:
        await say(connection, type="started", command_id=request["command_id"], pid=1)
        while not received or received[-1]["type"] != "kill":
            received.append(await heard(connection))
        await say(connection, type="exit", exit_code=137)

    Scripted(service, run)
    session = await start(ExecSpec(pty=True, cols=80, rows=24))
    await session.send_input("abc")
    await session.resize(100, 50)
    await session.close_stdin()
    await session.close_stdin()
    await session.kill()
    assert await everything(session) == (b"", b"", 137)
    assert received == [
        {"type": "resize", "cols": 80, "rows": 24},
        {"type": "input", "data": "abc"},
        {"type": "resize", "cols": 100, "rows": 50},
        {"type": "close_stdin"},
        {"type": "kill"},
    ]
    await session.send_input("too late")  # nobody is there, nothing happens


@pytest.mark.parametrize("code", [1001, 1011, None])
async def test_a_broken_connection_is_resumed(service: FakeService, start: Start, code: int | None) -> None:
    async def first(connection: ServerConnection, request: dict[str, Any]) -> None:
        await say(connection, type="started", command_id=request["command_id"], pid=5)
        await say(connection, type="stdout", data="abc", offset=0)
        await say(connection, type="stderr", data="é", offset=0)
        if code is None:
            connection.transport.abort()
        else:
            await connection.close(code)

    async def second(connection: ServerConnection, request: dict[str, Any]) -> None:
        await say(connection, type="started", command_id=request["command_id"], pid=5)
        await say(connection, type="stdout", data="def", offset=3)
        await say(connection, type="exit", exit_code=0)

    scripted = Scripted(service, first, second)
    session = await start(ExecSpec(command="x"))
    assert await everything(session) == (b"abcdef", "é".encode(), 0)
    assert scripted.requests[1] == {
        "type": "reconnect",
        "command_id": scripted.requests[0]["command_id"],
        "stdout_offset": 3,
        "stderr_offset": 2,
    }


async def test_a_break_before_the_start_repeats_the_same_command(service: FakeService, start: Start) -> None:
    async def first(connection: ServerConnection, _request: dict[str, Any]) -> None:
        connection.transport.abort()

    async def second(connection: ServerConnection, request: dict[str, Any]) -> None:
        await say(connection, type="started", command_id=request["command_id"], pid=5)
        await say(connection, type="exit", exit_code=0)

    scripted = Scripted(service, first, second)
    assert await everything(await start(ExecSpec(command="x"))) == (b"", b"", 0)
    assert scripted.requests[0] == scripted.requests[1]


async def test_bytes_that_are_no_utf8_do_not_shift_the_offsets(service: FakeService, start: Start) -> None:
    """U+FFFD stands for one byte or three: the chunk is asked for again, and not shown twice."""

    async def first(connection: ServerConnection, request: dict[str, Any]) -> None:
        await say(connection, type="started", command_id=request["command_id"], pid=5)
        await say(connection, type="stdout", data="ok ", offset=0)
        await say(connection, type="stdout", data="a\ufffdb", offset=3)
        connection.transport.abort()

    async def second(connection: ServerConnection, request: dict[str, Any]) -> None:
        await say(connection, type="started", command_id=request["command_id"], pid=5)
        await say(connection, type="stdout", data="a\ufffd", offset=3)
        await say(connection, type="stdout", data="bc", offset=5)
        await say(connection, type="exit", exit_code=0)

    scripted = Scripted(service, first, second)
    out, _, _ = await everything(await start(ExecSpec(command="x")))
    assert out.decode() == "ok a\ufffdbc"
    assert scripted.requests[1]["stdout_offset"] == 3


async def test_output_that_is_gone_is_not_passed_over(service: FakeService, start: Start) -> None:
    async def first(connection: ServerConnection, request: dict[str, Any]) -> None:
        await say(connection, type="started", command_id=request["command_id"], pid=5)
        await say(connection, type="stdout", data="abc", offset=0)
        connection.transport.abort()

    async def second(connection: ServerConnection, request: dict[str, Any]) -> None:
        await say(connection, type="started", command_id=request["command_id"], pid=5)
        await say(connection, type="stdout", data="xyz", offset=1000)
        await connection.wait_closed()

    Scripted(service, first, second)
    session = await start(ExecSpec(command="x"))
    with pytest.raises(GatewayError, match="997 bytes of output"):
        await everything(session)


async def test_input_that_may_be_lost_is_told(service: FakeService, start: Start) -> None:
    async def run(connection: ServerConnection, request: dict[str, Any]) -> None:
        await say(connection, type="started", command_id=request["command_id"], pid=5)
        connection.transport.pause_reading()  # input is not confirmed
        await gate.wait()
        connection.transport.abort()

    gate = asyncio.Event()
    Scripted(service, run)
    session = await start(ExecSpec(command="cat"))
    await session.send_input("x" * 100)
    gate.set()
    with pytest.raises(GatewayError, match="up to 100 characters may not have arrived") as caught:
        await everything(session)
    assert caught.value.kind == "unavailable"


async def test_confirmed_input_survives_a_break(service: FakeService, start: Start) -> None:
    async def first(connection: ServerConnection, request: dict[str, Any]) -> None:
        await say(connection, type="started", command_id=request["command_id"], pid=5)
        assert (await heard(connection))["data"] == "hello"
        await until(lambda: session._confirmed == 5, "the pong has arrived")
        connection.transport.abort()

    async def second(connection: ServerConnection, request: dict[str, Any]) -> None:
        await say(connection, type="started", command_id=request["command_id"], pid=5)
        assert await heard(connection) == {"type": "input", "data": " again"}
        await say(connection, type="exit", exit_code=0)

    Scripted(service, first, second)
    session = await start(ExecSpec(command="cat"))
    await session.send_input("hello")
    ending = asyncio.ensure_future(everything(session))
    await until(lambda: len(service.connections) == 2, "a second connection")
    await session.send_input(" again")
    assert await ending == (b"", b"", 0)


async def test_eof_and_size_are_repeated_after_a_break(service: FakeService, start: Start) -> None:
    async def first(connection: ServerConnection, request: dict[str, Any]) -> None:
        await say(connection, type="started", command_id=request["command_id"], pid=5)
        for _ in range(2):
            await heard(connection)
        connection.transport.abort()

    async def second(connection: ServerConnection, request: dict[str, Any]) -> None:
        await say(connection, type="started", command_id=request["command_id"], pid=5)
        assert await heard(connection) == {"type": "resize", "cols": 9, "rows": 8}
        assert await heard(connection) == {"type": "close_stdin"}
        await say(connection, type="exit", exit_code=0)

    Scripted(service, first, second)
    session = await start(ExecSpec(pty=True))
    await session.resize(9, 8)
    await session.close_stdin()
    assert await everything(session) == (b"", b"", 0)


async def test_it_gives_up_in_the_end(service: FakeService, start: Start) -> None:
    async def first(connection: ServerConnection, request: dict[str, Any]) -> None:
        await say(connection, type="started", command_id=request["command_id"], pid=5)
        service.rejections.extend([(502, b"")] * 20)
        connection.transport.abort()

    Scripted(service, first)
    session = await start(ExecSpec(command="x"))
    with pytest.raises(GatewayError, match="HTTP 502"):
        await everything(session)
    assert len(service.upgrades) == 1 + exec_ws.TRIES + 1  # one more: the remembered address is looked up again at once
    await session.send_input("nobody is there")


@pytest.mark.parametrize(
    ("error_type", "kind"),
    [
        ("CommandTimeout", "timeout"),
        ("CommandNotFound", "unavailable"),
        ("SessionExpired", "unavailable"),
        ("CommandError", "failed"),
    ],
)
async def test_errors_of_the_service(service: FakeService, start: Start, error_type: str, kind: str) -> None:
    async def run(connection: ServerConnection, request: dict[str, Any]) -> None:
        await say(connection, type="started", command_id=request["command_id"], pid=5)
        await say(connection, type="error", error_type=error_type, error="because\x1b[31m")

    Scripted(service, run)
    session = await start(ExecSpec(command="x"))
    with pytest.raises(GatewayError, match="because") as caught:
        await everything(session)
    assert caught.value.kind == kind
    assert caught.value.message.isprintable()


async def test_a_command_that_cannot_start(service: FakeService, start: Start) -> None:
    async def run(connection: ServerConnection, _request: dict[str, Any]) -> None:
        await say(connection, type="error", error_type="CommandError", error="no such directory")

    Scripted(service, run)
    with pytest.raises(GatewayError, match="no such directory"):
        await start(ExecSpec(command="x", cwd="/gone"))


@pytest.mark.parametrize(
    "message",
    ["[1]", "nope", '{"type": "stdout", "data": 3}', '{"type": "stdout", "data": "x", "offset": "0"}', '{"type": "exit"}'],
)
async def test_nonsense_ends_the_session(service: FakeService, start: Start, message: str) -> None:
    async def run(connection: ServerConnection, request: dict[str, Any]) -> None:
        await say(connection, type="started", command_id=request["command_id"], pid=5)
        await connection.send(message)
        await connection.wait_closed()

    Scripted(service, run)
    session = await start(ExecSpec(command="x"))
    with pytest.raises(GatewayError, match="no message of /execute/ws"):
        await everything(session)


async def test_leaving_kills(service: FakeService, start: Start) -> None:
    received: list[dict[str, Any]] = []

    async def run(connection: ServerConnection, request: dict[str, Any]) -> None:
        await say(connection, type="started", command_id=request["command_id"], pid=5)
        received.append(await heard(connection))

    Scripted(service, run)
    session = await start(ExecSpec(command="sleep 100"))
    await session.aclose()
    await until(lambda: received, "a message")
    assert received == [{"type": "kill"}]


@given(st.text(max_size=60), st.integers(min_value=1, max_value=7))
def test_input_is_decoded_across_chunks(text: str, size: int) -> None:
    data = text.encode("utf-8", "replace")
    decoder = InputDecoder()
    pieces = [decoder.decode(data[start : start + size]) for start in range(0, len(data), size)]
    assert "".join(pieces) + decoder.decode(b"", final=True) == data.decode()


@pytest.mark.parametrize(
    ("chunks", "offset"),
    [([b"\xff"], 0), ([b"ab\xff"], 2), ([b"ab", b"c\xc3", b"("], 3), ([b"\xe2\x82", b"\xff"], 0), ([b"ok\xc3"], 2)],
)
def test_the_offset_of_what_is_no_text(chunks: list[bytes], offset: int) -> None:
    def decode(decoder: InputDecoder) -> None:
        for chunk in chunks:
            decoder.decode(chunk)
        decoder.decode(b"", final=True)

    with pytest.raises(GatewayError, match=f"at byte {offset}:") as caught:
        decode(InputDecoder())
    assert caught.value.kind == "unsupported"

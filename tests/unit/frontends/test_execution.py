from __future__ import annotations

import asyncio
import json
import socket
from typing import Any

import pytest
from websockets.asyncio.server import ServerConnection

from gatewayd import api
from gatewayd.api import Frame
from tests.unit.fakeservice import FakeService, until
from tests.unit.frontends.caller import Caller
from tests.unit.parts import Parts


class Shell:
    """Plays a command: notes what it is told, says what the test wants."""

    def __init__(self, service: FakeService) -> None:
        self.received: list[dict[str, Any]] = []
        self.connection: ServerConnection | None = None
        service.on_exec = self._run

    async def _run(self, connection: ServerConnection, request: dict[str, Any]) -> None:
        self.received.append(request)
        await connection.send(json.dumps({"type": "started", "command_id": request["command_id"], "pid": 77}))
        self.connection = connection
        while True:
            self.received.append(json.loads(await connection.recv()))

    async def say(self, **message: Any) -> None:
        assert self.connection is not None
        await self.connection.send(json.dumps(message))

    def told(self, kind: str) -> list[dict[str, Any]]:
        return [message for message in self.received if message["type"] == kind]


@pytest.fixture
def shell(service: FakeService, parts: Parts) -> Shell:
    return Shell(service)


async def begin(caller: Caller, **request: Any) -> dict[str, Any]:
    await caller.ask(op="exec", sandbox="x", **request)
    reply = (await caller.line())["ok"]
    assert isinstance(reply, dict)
    return reply


async def frame(caller: Caller) -> tuple[int, bytes]:
    head = await caller.read(api.FRAME_HEADER)
    return head[0], await caller.read(int.from_bytes(head[1:], "big"))


async def test_a_command(caller: Caller, shell: Shell) -> None:
    reply = await begin(caller, argv=["echo", "a b", "$HOME"], env={"A": "ü"}, cwd="/tmp", timeout=1.5)
    assert reply["pid"] == 77
    request = shell.received[0]
    assert (request["command"], request["env"], request["cwd"], request["timeout_seconds"]) == (
        "echo 'a b' '$HOME'",
        {"A": "ü"},
        "/tmp",
        2,
    )
    assert request["command_id"] == reply["command_id"]
    await shell.say(type="stdout", data="out", offset=0)
    assert await frame(caller) == (Frame.STDOUT, b"out")
    await shell.say(type="stderr", data="err", offset=0)
    assert await frame(caller) == (Frame.STDERR, b"err")
    await caller.write(api.encode_frame(Frame.STDIN, "grü".encode()[:3]))
    await caller.write(api.encode_frame(Frame.STDIN, "grü".encode()[3:]) + api.encode_frame(Frame.STDIN_EOF))
    await until(lambda: shell.told("close_stdin"), "the end of the input")
    assert "".join(message["data"] for message in shell.told("input")) == "grü"
    await shell.say(type="exit", exit_code=7)
    kind, payload = await frame(caller)
    assert (kind, json.loads(payload)) == (Frame.EXIT, {"exit_code": 7})
    assert await caller.read_all() == b""


async def test_a_command_that_cannot_start(caller: Caller, service: FakeService) -> None:
    await caller.ask(op="exec", sandbox="nope", command="x")
    assert (await caller.line())["error"]["kind"] == "not_found"
    second = Caller(caller.path)
    await second.dial()

    async def refuse(connection: ServerConnection, _request: dict[str, Any]) -> None:
        await connection.send(json.dumps({"type": "error", "error_type": "CommandError", "error": "no such directory"}))

    service.on_exec = refuse
    await second.ask(op="exec", sandbox="x", command="x", cwd="/gone")
    error = (await second.line())["error"]
    assert (error["kind"], error["message"]) == ("failed", "cannot run the command in sandbox 'x': no such directory")
    second.close()


async def test_a_terminal(caller: Caller, shell: Shell) -> None:
    await begin(caller, pty=True, cols=80, rows=24)
    await caller.write(api.encode_json_frame(Frame.RESIZE, {"cols": 132, "rows": 43}))
    await caller.write(api.encode_json_frame(Frame.SIGNAL, {"signal": "INT"}))
    await until(lambda: shell.told("input"), "the control character")
    assert "command" not in shell.received[0]
    assert [(size["cols"], size["rows"]) for size in shell.told("resize")] == [(80, 24), (132, 43)]
    assert shell.told("input")[0]["data"] == "\x03"
    await caller.write(api.encode_json_frame(Frame.SIGNAL, {"signal": "SIGKILL"}))
    await until(lambda: shell.told("kill"), "the kill")


@pytest.mark.parametrize("signal", ["KILL", "TERM", "INT"])
async def test_without_a_terminal_every_signal_kills(caller: Caller, shell: Shell, signal: str) -> None:
    await begin(caller, command="sleep 100")
    await caller.write(api.encode_json_frame(Frame.SIGNAL, {"signal": signal}))
    await until(lambda: shell.told("kill"), "the kill")
    await shell.say(type="exit", exit_code=137)
    assert await frame(caller) == (Frame.EXIT, b'{"exit_code":137}')


async def test_leaving_kills(caller: Caller, shell: Shell) -> None:
    await begin(caller, command="sleep 100")
    caller.close()
    await until(lambda: shell.told("kill"), "the kill")


async def test_the_end_of_the_input_is_not_leaving(caller: Caller, shell: Shell) -> None:
    await begin(caller, command="cat")
    caller.sock.shutdown(socket.SHUT_WR)
    await until(lambda: shell.told("close_stdin"), "the end of the input")
    await shell.say(type="stdout", data="still here", offset=0)
    await shell.say(type="exit", exit_code=0)
    assert await frame(caller) == (Frame.STDOUT, b"still here")
    assert await frame(caller) == (Frame.EXIT, b'{"exit_code":0}')
    assert shell.told("kill") == []


async def test_a_large_output_comes_in_frames_within_the_limit(caller: Caller, shell: Shell) -> None:
    await begin(caller, command="x")
    size = api.FRAME_MAX + 1000
    await shell.say(type="stdout", data="é" * (size // 2), offset=0)
    first, second = await frame(caller), await frame(caller)
    assert (len(first[1]), len(second[1])) == (api.FRAME_MAX, 1000)
    assert (first[1] + second[1]).decode() == "é" * (size // 2)


async def failure(caller: Caller) -> dict[str, Any]:
    kind, payload = await frame(caller)
    assert kind == Frame.ERROR
    assert await caller.read_all() == b""
    error = json.loads(payload)
    assert isinstance(error, dict)
    return error


async def test_binary_input_is_refused_by_offset(caller: Caller, shell: Shell) -> None:
    await begin(caller, command="cat")
    await caller.write(api.encode_frame(Frame.STDIN, b"text ") + api.encode_frame(Frame.STDIN, b"and \xff\xfe"))
    error = await failure(caller)
    assert error["kind"] == "unsupported"
    assert "at byte 9" in error["message"]
    await until(lambda: shell.told("kill"), "the kill")


@pytest.mark.parametrize(
    "data",
    [
        b"\x09\0\0\0\0",
        b"\x00\xff\xff\xff\xff",
        api.encode_frame(Frame.STDOUT, b"x"),
        api.encode_frame(Frame.RESIZE, b"[]"),
        api.encode_frame(Frame.RESIZE, b"{"),
        api.encode_json_frame(Frame.RESIZE, {"cols": 0, "rows": 1}),
        api.encode_json_frame(Frame.SIGNAL, {}),
    ],
)
async def test_frames_that_make_no_sense(caller: Caller, shell: Shell, data: bytes) -> None:
    await begin(caller, command="cat")
    await caller.write(data)
    assert (await failure(caller))["kind"] == "usage"
    await until(lambda: shell.told("kill"), "the kill")


async def test_a_signal_that_cannot_be_sent(caller: Caller, shell: Shell) -> None:
    await begin(caller, command="cat")
    await caller.write(api.encode_json_frame(Frame.SIGNAL, {"signal": "USR1"}))
    assert (await failure(caller))["kind"] == "unsupported"


async def test_a_failure_of_the_command(caller: Caller, shell: Shell) -> None:
    await begin(caller, command="sleep 100", timeout=1)
    await shell.say(type="error", error_type="CommandTimeout", error="1 second is over")
    error = await failure(caller)
    assert (error["kind"], error["message"]) == ("timeout", "the command took too long: 1 second is over")


async def test_a_client_that_does_not_read_holds_the_command_back(caller: Caller, shell: Shell, service: FakeService) -> None:
    await begin(caller, command="yes")
    chunk, sent = "y" * 65536, 0

    async def flood() -> None:
        nonlocal sent
        while True:
            await shell.say(type="stdout", data=chunk, offset=sent)
            sent += len(chunk)

    flooding = asyncio.ensure_future(flood())
    before = -1
    while before != sent:  # until nothing moves any more
        before = sent
        await asyncio.sleep(0.2)
    assert sent < 32 << 20
    held = sent
    received = 0
    while received < held:
        kind, payload = await frame(caller)
        assert kind == Frame.STDOUT
        received += len(payload)
    await until(lambda: sent > held, "the command goes on")
    flooding.cancel()
    await asyncio.wait([flooding])

from __future__ import annotations

import asyncio
import os
import socket
from pathlib import Path
from typing import Any

import pytest

from gatewayd import api
from gatewayd.frontends import stdio
from gatewayd.yamux.aio import MuxStream
from tests.unit.fakeservice import KEY, Answer, FakeService, echo, until
from tests.unit.frontends.caller import Caller
from tests.unit.parts import Parts


async def test_connect_becomes_the_stream(caller: Caller) -> None:
    await caller.ask(op="connect", sandbox="x", port=7)
    assert await caller.line() == {"ok": {}}
    await caller.write(b"\x00\xff through")
    assert await caller.read(10) == b"\x00\xff through"
    caller.sock.shutdown(socket.SHUT_WR)
    assert await caller.read_all() == b""


async def test_bytes_behind_the_request_belong_to_the_stream(caller: Caller) -> None:
    await caller.ask(b"early ", op="connect", sandbox="x", port=7)
    assert await caller.line() == {"ok": {}}
    await caller.write(b"late")
    assert await caller.read(10) == b"early late"


async def test_a_half_closed_connection_gets_its_reply(caller: Caller) -> None:
    await caller.ask(b"shout", op="connect", sandbox="x", port=8)
    caller.sock.shutdown(socket.SHUT_WR)  # before the reply: the dial goes on
    assert await caller.line() == {"ok": {}}
    assert await caller.read_all() == b"SHOUT"


async def test_a_large_transfer_both_ways(caller: Caller) -> None:
    await caller.ask(op="connect", sandbox="x", port=7)
    await caller.line()
    data = bytes(range(256)) * 16384  # 4 MiB

    async def send() -> None:
        await caller.write(data)
        caller.sock.shutdown(socket.SHUT_WR)

    _, received = await asyncio.gather(send(), caller.read_all())
    assert received == data


async def failure(caller: Caller, **request: Any) -> tuple[str, str, str]:
    await caller.ask(**request)
    error = (await caller.line())["error"]
    assert await caller.read_all() == b""
    return error["kind"], error["message"], error["hint"]


async def test_nothing_listens(caller: Caller) -> None:
    kind, message, hint = await failure(caller, op="connect", sandbox="x", port=9)
    assert kind == "refused"
    assert message == "cannot connect to port 9 of sandbox 'x': nothing listens on it"
    assert "127.0.0.1:9" in hint


async def test_an_unknown_sandbox(caller: Caller) -> None:
    kind, message, _ = await failure(caller, op="connect", sandbox="nope", port=9)
    assert (kind, message) == ("not_found", "cannot get sandbox 'nope': no sandbox named 'nope' (profile env)")


async def test_an_unknown_sandbox_gets_the_nearest_name(caller: Caller, service: FakeService) -> None:
    service.add_box("staging")
    assert (await failure(caller, op="ssh", sandbox="stagign"))[2] == "did you mean 'staging'?"


async def test_an_unknown_sandbox_unlike_any_other(caller: Caller) -> None:
    assert (await failure(caller, op="ssh", sandbox="nope"))[2] == "`sandbox list` shows those there are"


async def test_an_unknown_sandbox_and_a_service_that_breaks(caller: Caller, service: FakeService) -> None:
    service.answers.extend([Answer(404, {"detail": {"error": "NotFound", "message": "gone"}}), Answer(400, {})])
    assert (await failure(caller, op="ssh", sandbox="nope"))[::2] == ("not_found", "")


@pytest.mark.parametrize(
    ("request_", "text"),
    [
        ({}, "op is missing"),
        ({"op": "connect"}, "sandbox is missing"),
        ({"op": "connect", "sandbox": ""}, "sandbox is empty"),
        ({"op": "dance", "sandbox": "x"}, "unknown op 'dance'"),
        ({"op": "connect", "sandbox": "x"}, "port is missing"),
        ({"op": "connect", "sandbox": "x", "port": 0}, "port must be a whole number from 1 to 65535"),
        ({"op": "connect", "sandbox": "x", "port": "22"}, "port must be a whole number"),
        ({"op": "connect", "sandbox": "x", "port": True}, "port must be a whole number"),
        ({"op": "forward", "sandbox": "x", "remote_port": 1, "address": "0.0.0.0"}, "loopback only"),
        ({"op": "forward", "sandbox": "x", "remote_port": 1, "address": "evil"}, "no address"),
        ({"op": "exec", "sandbox": "x"}, "command or argv is missing"),
        ({"op": "exec", "sandbox": "x", "argv": []}, "argv is empty"),
        ({"op": "exec", "sandbox": "x", "argv": ["a"], "command": "b"}, "exclude each other"),
        ({"op": "exec", "sandbox": "x", "argv": [1]}, "argv must be a list of strings"),
        ({"op": "exec", "sandbox": "x", "command": "a", "env": {"A": 1}}, "env must map names to strings"),
        ({"op": "exec", "sandbox": "x", "command": "a", "timeout": -1}, "timeout must be a number"),
        ({"op": "connect", "sandbox": 3}, "sandbox must be a string"),
    ],
)
async def test_requests_that_make_no_sense(caller: Caller, request_: dict[str, Any], text: str) -> None:
    kind, message, _ = await failure(caller, **request_)
    assert kind == "usage"
    assert text in message


@pytest.mark.parametrize("line", [b"\n", b"nonsense\n", b"[]\n", b"\xff\xfe\n"])
async def test_lines_that_are_no_request(caller: Caller, line: bytes) -> None:
    await caller.write(line)
    assert (await caller.line())["error"]["kind"] == "usage"


async def test_a_line_without_end(caller: Caller) -> None:
    await caller.write(b"x" * api.LINE_MAX)
    assert "longer than" in (await caller.line())["error"]["message"]


async def test_a_client_that_says_nothing(caller: Caller, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "LINE_DEADLINE", 0.05)
    second = Caller(caller.path)
    await second.dial()
    assert "no request line within" in (await second.line())["error"]["message"]
    second.close()


async def test_a_client_of_another_user(connect: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stdio, "peer_is_self", lambda sock: False)
    caller = Caller(connect)
    await caller.dial()
    assert await caller.read_some() == b""
    caller.close()


async def test_profiles_and_credentials(caller: Caller, service: FakeService, parts: Parts) -> None:
    kind, message, _ = await failure(caller, op="connect", sandbox="x", port=7, profile="nope")
    assert (kind, "no [profiles.nope]" in message) == ("config", True)
    wrong = Caller(caller.path)
    await wrong.dial()
    kind, message, _ = await failure(wrong, op="connect", sandbox="x", port=7, api_key="wrong-key", endpoint=service.endpoint)
    assert kind == "auth"
    assert "wrong-key" not in message
    wrong.close()
    right = Caller(caller.path)
    await right.dial()
    await right.ask(op="connect", sandbox="x", port=7, api_key=KEY, endpoint=service.endpoint + "/api/v1", profile="env")
    assert await right.line() == {"ok": {}}
    right.close()


async def test_a_client_that_leaves_while_it_is_dialled(caller: Caller, service: FakeService, parts: Parts) -> None:
    service.upgrade_gate.clear()
    await caller.ask(op="connect", sandbox="x", port=7)
    await until(lambda: service.upgrades, "an upgrade")
    caller.close()
    await until(lambda: parts.pool.status()[0]["state"] == "down", "the dial is given up")
    service.upgrade_gate.set()


async def test_notices_come_before_the_reply(caller: Caller, service: FakeService) -> None:
    service.rejections.append((502, b""))
    await caller.ask(op="connect", sandbox="x", port=7)
    assert "HTTP 502" in (await caller.line())["notice"]
    assert await caller.line() == {"ok": {}}


async def test_ssh_starts_sshd_when_nothing_listens(caller: Caller, service: FakeService, parts: Parts) -> None:
    scripts: list[str] = []

    def execute(body: dict[str, object]) -> dict[str, object]:
        scripts.append(str(body["command"]))
        service.ports[22] = echo
        return {"stdout": "USER root\n", "stderr": "", "exit_code": 0}

    service.execute = execute
    async with service.front() as origin:
        service.boxes["x"]["dataplane_url"] = f"{origin}/dp/x"
        await caller.ask(b"SSH-2.0-client\r\n", op="ssh", sandbox="x", direct=True)
        assert await caller.line() == {"notice": "starting sshd in sandbox 'x'"}
        assert await caller.line() == {"ok": {}}
        assert await caller.read(16) == b"SSH-2.0-client\r\n"
        second = Caller(caller.path)
        await second.dial()
        await second.ask(op="ssh", sandbox="x", direct=True)
        assert await second.line() == {"ok": {}}
        assert len(scripts) == 1
        second.close()
        caller.close()
        await parts.pool.aclose()


async def test_forward(caller: Caller, service: FakeService, parts: Parts) -> None:
    await caller.ask(op="forward", sandbox="x", remote_port=7, local_port=0)
    reply = (await caller.line())["ok"]
    assert reply["address"] == "127.0.0.1"
    reader, writer = await asyncio.open_connection("127.0.0.1", reply["port"])
    writer.write(b"hello")
    assert await reader.readexactly(5) == b"hello"
    event = await caller.line()
    assert (event["event"], event["peer"]) == ("opened", "127.0.0.1:{}".format(writer.get_extra_info("sockname")[1]))
    assert parts.forwards.status() == [
        {"id": 1, "sandbox": "x", "address": "127.0.0.1", "port": reply["port"], "remote_port": 7, "connections": 1}
    ]
    writer.close()
    await writer.wait_closed()
    event = await caller.line()
    assert event["event"] == "closed"
    assert event["message"] == "5 bytes sent, 5 bytes received"
    caller.close()
    await until(lambda: not parts.forwards.status(), "the forward ends with its connection")
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection("127.0.0.1", reply["port"])


async def test_a_forward_to_an_unknown_sandbox_does_not_begin(caller: Caller, parts: Parts) -> None:
    kind, _, _ = await failure(caller, op="forward", sandbox="nope", remote_port=7)
    assert kind == "not_found"
    assert parts.forwards.status() == []


async def test_a_taken_port(caller: Caller) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        kind, message, hint = await failure(caller, op="forward", sandbox="x", remote_port=7, local_port=port)
    assert kind == "port_in_use"
    assert message.startswith(f"cannot listen on 127.0.0.1:{port}: the port is in use by ")
    assert f"(pid {os.getpid()})" in message
    assert "0 for any" in hint


async def test_a_refused_dial_resets_and_is_reported(caller: Caller) -> None:
    await caller.ask(op="forward", sandbox="x", remote_port=9, local_port=0)
    port = (await caller.line())["ok"]["port"]
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    with pytest.raises(ConnectionResetError):
        await reader.read()
    writer.close()
    event = await caller.line()
    assert event["event"] == "failed"
    assert "nothing listens" in event["message"]


async def test_stopping_ends_every_connection(connect: Path, parts: Parts, service: FakeService) -> None:
    ended = asyncio.Event()

    async def hold(stream: MuxStream) -> None:
        try:
            await stream.read()
        finally:
            ended.set()

    service.ports[10] = hold
    caller = Caller(connect)
    await caller.dial()
    await caller.ask(op="connect", sandbox="x", port=10)
    await caller.line()
    await parts.pool.aclose()
    assert await caller.read_all() == b""
    async with asyncio.timeout(5):
        await ended.wait()
    caller.close()

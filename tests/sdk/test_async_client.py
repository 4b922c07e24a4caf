"""The SDK's asynchronous client, through the same paths."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

import pytest
from langsmith.sandbox import CommandTimeoutError, ResourceNotFoundError, SandboxOperationError, ValidationError

if TYPE_CHECKING:
    from tests.sdk.conftest import Service


@pytest.fixture
async def aclient(service: Service) -> AsyncIterator[Any]:
    """The asynchronous client; it uses the other prefix."""
    async with service.async_client() as made:
        yield made


@pytest.fixture
async def box(aclient: Any, name: str) -> AsyncIterator[Any]:
    """A sandbox of its own."""
    async with await aclient.sandbox(name=name) as made:
        yield made


async def test_life(aclient: Any, name: str) -> None:
    made = await aclient.create_sandbox(name=name)
    assert (await made.run("echo hi; exit 3")).exit_code == 3
    await made.write("a/b", b"\0\xff")
    assert await made.read("a/b") == b"\0\xff"
    assert (await made.stat("a/b")).size_bytes == 2
    assert (await made.read_range("a/b", start=1)).content == b"\xff"
    await made.stop()
    assert (await aclient.get_sandbox_status(name)).status == "stopped"
    await made.start()
    assert await made.read("a/b") == b"\0\xff"
    await aclient.update_sandbox(name, new_name=f"{name}-x")
    assert f"{name}-x" in [sandbox.name for sandbox in await aclient.list_sandboxes()]
    await aclient.delete_sandbox(f"{name}-x")
    with pytest.raises(ResourceNotFoundError):
        await aclient.get_sandbox(f"{name}-x")
    with pytest.raises(ValidationError):
        await aclient.create_sandbox(name="UPPER")


async def test_many_commands_at_once(box: Any) -> None:
    results = await asyncio.gather(*(box.run(f"echo {number}; echo e{number} >&2; exit {number}") for number in range(20)))
    assert [(one.stdout, one.stderr, one.exit_code) for one in results] == [(f"{n}\n", f"e{n}\n", n) for n in range(20)]


async def test_many_requests_wake_it_once(aclient: Any, box: Any, service: Service) -> None:
    await box.stop()
    before = service.text().count(f"sandbox {box.name}: ready")
    results = await asyncio.gather(*(box.run("cat /proc/sys/kernel/random/boot_id /etc/hostname; echo $PPID") for _ in range(8)))
    assert {one.exit_code for one in results} == {0}
    assert service.text().count(f"sandbox {box.name}: ready") == before + 1


async def test_streamed_input_and_reconnect(box: Any) -> None:
    handle = await box.run('while read -r line; do echo "<$line>"; done', wait=False, close_input=False)
    await handle.send_input("one\n")
    chunks = handle.__aiter__()
    assert (await chunks.__anext__()).data == "<one>\n"
    again = await handle.reconnect()
    started = asyncio.ensure_future(again.__aiter__().__anext__())
    await handle.send_input("two\n")
    assert (await started).data == "<two>\n"
    await handle.close_input()
    assert (await handle.result).stdout == "<one>\n<two>\n"
    assert (await (await box.reconnect(handle.command_id, stdout_offset=6)).result).stdout == "<two>\n"


async def test_kill_and_timeout(box: Any) -> None:
    handle = await box.run("exec sleep 1000", wait=False)
    await handle.kill()
    assert (await (await box.reconnect(handle.command_id)).result).exit_code == 137
    with pytest.raises(CommandTimeoutError):
        await box.run("sleep 1000", timeout=1)
    with pytest.raises(SandboxOperationError):
        await box.run("true", cwd="/nowhere")


# the SDK calls websockets' connect() in a way that newer websockets deprecate
@pytest.mark.filterwarnings(r"ignore:connect\(\) must be used as a context manager:DeprecationWarning")
async def test_tunnel(box: Any) -> None:
    await box.run("socat TCP-LISTEN:7000,fork EXEC:cat >/dev/null 2>&1 </dev/null &")
    await box.run("until grep -q ':1B58 00' /proc/net/tcp /proc/net/tcp6; do sleep 0.02; done", timeout=10)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    async with await box.tunnel(7000, local_port=port) as tunnel:
        reader, writer = await asyncio.open_connection("127.0.0.1", tunnel.local_port)
        writer.write(b"there and back\n")
        async with asyncio.timeout(10):
            assert await reader.readline() == b"there and back\n"
        writer.close()
        await writer.wait_closed()

"""What only the Docker runtime can get wrong: its relay, its neighbours on the same daemon, and the daemon itself."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from gatewayd.local.runtime import docker_ports
from gatewayd.local.runtime.base import BoxSpec, PortRefused, RuntimeFailure, SpawnSpec
from gatewayd.local.runtime.docker import DockerRuntime
from gatewayd.local.runtime.docker_api import DockerApi, DockerError
from gatewayd.local.runtime.docker_box import DockerBox

from .conftest import clear, close, converse, read_until, run, sh

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def runtime(docker_socket: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[DockerRuntime]:
    runtime = DockerRuntime(tmp_path_factory.mktemp("state"), docker_socket)
    yield runtime
    await clear(runtime)


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def box(runtime: DockerRuntime) -> AsyncIterator[DockerBox]:
    box = await runtime.start(BoxSpec("relayed", "boxy"))
    yield box
    await box.stop(grace=0.1)


async def test_ports_are_reached_without_being_root(box: DockerBox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(box, "_namespace", None)
    with pytest.raises(PortRefused, match="5432: Connection refused"):
        await box.connect(5432)
    await converse(box)


async def test_a_relay_goes_with_its_connection(box: DockerBox, monkeypatch: pytest.MonkeyPatch) -> None:
    script = "import socket; s = socket.create_server(('127.0.0.1', 0)); print(s.getsockname()[1], flush=True)\n"
    script += "c = s.accept()[0]\nwhile True: c.sendall(bytes(65536))"
    process = await box.spawn(SpawnSpec(["python3", "-c", script]))
    port = int(await read_until(process.stdout, b"\n"))
    monkeypatch.setattr(box, "_namespace", None)
    sock = await box.connect(port)
    assert await asyncio.get_running_loop().sock_recv(sock, 10) == bytes(10)
    sock.close()
    assert await asyncio.wait_for(process.exited, 20) == 1  # BrokenPipeError: the relay was killed, not left to drain it
    close(process)


async def test_the_network_namespace_of_another_process_is_not_taken(box: DockerBox) -> None:
    assert docker_ports.Namespace.open(os.getpid(), "0" * 64) is None
    assert docker_ports.Namespace.open(2**22 + 1, "0" * 64) is None


async def test_two_services_on_one_daemon_leave_each_other_alone(
    runtime: DockerRuntime, box: DockerBox, docker_socket: Path, tmp_path: Path
) -> None:
    other = DockerRuntime(tmp_path, docker_socket)
    assert await other.disks() == set()
    await other.recover()
    await other.remove("relayed")
    assert "relayed" in await runtime.disks()
    assert (await run(box, "true")).code == 0
    await other.aclose()


async def test_limits_follow_the_spec_at_the_next_start(runtime: DockerRuntime, docker_socket: Path) -> None:
    async def limits(**fields: Any) -> tuple[int, int]:
        box = await runtime.start(BoxSpec("resized", "boxy", **fields))
        state = await DockerApi(docker_socket).request("look", "GET", f"/containers/{box._container}/json")
        await box.stop(grace=0)
        assert state["HostConfig"]["Privileged"] is False
        return state["HostConfig"]["Memory"], state["HostConfig"]["NanoCpus"]

    assert await limits(mem_bytes=64 << 20, vcpus=0.5) == (64 << 20, 500_000_000)
    assert await limits(mem_bytes=128 << 20, vcpus=0.25) == (128 << 20, 250_000_000)
    memory, processors = await limits()
    assert memory > 128 << 20
    assert processors >= 1_000_000_000


async def test_what_is_not_enforced_is_said(runtime: DockerRuntime) -> None:
    box = await runtime.start(BoxSpec("noted", "boxy", fs_capacity_bytes=1 << 30))
    await box.stop(grace=0)
    assert "fs_capacity_bytes" in box.limits_note


async def test_a_process_that_nobody_waits_for_any_more_is_killed(box: DockerBox) -> None:
    marker = "/tmp/unclaimed"
    spawning = asyncio.gather(box.spawn(SpawnSpec(["/bin/sh", "-c", f"echo > {marker}; exec sleep 4321"])))
    await asyncio.sleep(0)
    spawning.cancel()
    with pytest.raises(asyncio.CancelledError):
        await spawning
    async with asyncio.timeout(20):
        while len(box._tasks):  # noqa: ASYNC110 - whatever of it is under way
            await asyncio.sleep(0.02)
    assert (await run(box, "pgrep", "-f", "sleep 4321")).code == 1


async def test_a_variable_the_shell_would_drop_is_refused(box: DockerBox) -> None:
    with pytest.raises(RuntimeFailure, match="identifier"):
        await box.spawn(SpawnSpec(["true"], env={"a.b": "c"}))


async def test_commands_are_listed_once(box: DockerBox) -> None:
    assert (await sh(box, "pgrep -fc 'unique[-]word'; true # unique-word")).strip() == "1"


async def test_no_daemon_is_a_finding_and_a_failure(tmp_path: Path) -> None:
    runtime = DockerRuntime(tmp_path, tmp_path / "no.sock")
    (finding,) = await runtime.check()
    assert not finding.ok
    assert finding.remedy
    with pytest.raises(RuntimeFailure, match="No such file") as caught:
        await runtime.start(BoxSpec("box", "boxy"))
    assert str(tmp_path) not in str(caught.value)
    await runtime.aclose()


async def test_an_id_that_is_no_name_is_refused(runtime: DockerRuntime) -> None:
    with pytest.raises(RuntimeFailure):
        await runtime.start(BoxSpec("../x?y=z", "boxy"))
    await runtime.remove("../x?y=z")


# The daemon as a peer that may say anything


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"garbage\r\n\r\n",
        b"HTTP/1.1 two hundred\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"x: y\r\n" * 20_000,
        b"HTTP/1.1 200 OK\r\n\r\n{]",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n{}",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n0\r\n\r\n",
        b"HTTP/1.1 500 Oh\r\n\r\nnot JSON",
    ],
)
async def test_what_makes_no_sense_is_a_failure(tmp_path: Path, answer: bytes) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        writer.close()

    async with await asyncio.start_unix_server(serve, tmp_path / "sock"):
        api = DockerApi(tmp_path / "sock")
        with pytest.raises(RuntimeFailure, match="cannot look"):
            await api.request("look", "GET", "/x")
        with pytest.raises(RuntimeFailure):
            await (DockerRuntime(tmp_path, tmp_path / "sock")).start(BoxSpec("box", "boxy"))


async def test_the_daemons_reasons_are_told_without_its_paths(tmp_path: Path) -> None:
    body = b'{"message": "no space in /secret/place: mkdir \\"/secret/x\\"\\u001b[1m"}'

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 409 Conflict\r\n\r\n" + body)
        writer.close()

    async with await asyncio.start_unix_server(serve, tmp_path / "sock"):
        with pytest.raises(DockerError, match="no space in") as caught:
            await DockerApi(tmp_path / "sock").request("look", "GET", "/x")
    assert caught.value.status == 409
    assert "secret" not in str(caught.value)
    assert "\x1b" not in str(caught.value)

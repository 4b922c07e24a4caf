"""One runtime and one box for a whole module: each test that needs its own asks `start` for it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import socket
import tempfile
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import pytest_asyncio

from gatewayd.local.runtime.base import Box, BoxSpec, Process, Runtime, SpawnSpec
from gatewayd.local.runtime.docker import DockerRuntime
from gatewayd.local.runtime.docker_api import DockerApi, part
from gatewayd.local.runtime.gvisor import ARGUMENTS, RUNSC, GvisorRuntime
from gatewayd.local.runtime.native import NativeRuntime

from . import dockerd

RUNTIMES = ["native", "docker", *dockerd.GVISOR]  # gVisor's absence is told in test_gvisor.py


async def read_all(fd: int) -> bytes:
    """Everything until end of file (a pty's EIO included); closes the descriptor."""

    def read() -> bytes:
        os.set_blocking(fd, True)
        data = b""
        try:
            while chunk := os.read(fd, 65536):
                data += chunk
        except OSError:
            pass
        finally:
            os.close(fd)
        return data

    return await asyncio.to_thread(read)


async def read_until(fd: int, wanted: bytes) -> bytes:
    """What comes on a descriptor, up to and including `wanted`."""

    def read() -> bytes:
        os.set_blocking(fd, True)
        data = b""
        while wanted not in data and (chunk := os.read(fd, 4096)):
            data += chunk
        return data

    return await asyncio.wait_for(asyncio.to_thread(read), 20)


async def write_all(fd: int, data: bytes) -> None:
    """Write it all and close the descriptor, whether or not somebody reads to the end."""

    def write() -> None:
        os.set_blocking(fd, True)
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(fd, view) :]
        except BrokenPipeError:
            pass
        finally:
            os.close(fd)

    await asyncio.to_thread(write)


def close(process: Process) -> None:
    """Close what is still open of a process's descriptors."""
    for fd in {process.stdin, process.stdout, process.stderr}:
        if fd is not None:
            with contextlib.suppress(OSError):
                os.close(fd)


class Ran(NamedTuple):
    """What a finished process left."""

    code: int
    out: bytes
    err: bytes


async def run(box: Box, *argv: str, stdin: bytes = b"", **options: Any) -> Ran:
    """Run to the end with three pipes."""
    process = await box.spawn(SpawnSpec(argv, **options))
    assert process.stderr is not None
    reading = (read_all(process.stdout), read_all(process.stderr), process.exited, write_all(process.stdin, stdin))
    out, err, code, _ = await asyncio.wait_for(asyncio.gather(*reading), 30)
    return Ran(code, out, err)


async def sh(box: Box, script: str, **options: Any) -> str:
    """Output of a shell script that must succeed."""
    ran = await run(box, "/bin/sh", "-c", script, **options)
    assert ran.code == 0, ran
    return ran.out.decode()


ECHO = """
import socket
server = socket.create_server(("127.0.0.1", 0))
print(server.getsockname()[1], flush=True)
while True:
    with server.accept()[0] as connection:
        connection.sendall(b"hello ")
        while data := connection.recv(65536):
            connection.sendall(data.upper())
        connection.sendall(b" bye")
"""


async def converse(box: Box) -> None:
    """Talk to a server inside, with a half-close in the middle."""
    process = await box.spawn(SpawnSpec(["python3", "-c", ECHO]))
    port = int(await read_until(process.stdout, b"\n"))
    loop = asyncio.get_running_loop()
    for _ in range(2):
        with await box.connect(port) as sock:
            await loop.sock_sendall(sock, b"abc" * 100_000)
            sock.shutdown(socket.SHUT_WR)
            await run(box, "true")  # long enough for everything to be there before it is read
            answer = b""
            while data := await asyncio.wait_for(loop.sock_recv(sock, 65536), 20):
                answer += data
        assert answer == b"hello " + b"ABC" * 100_000 + b" bye"
    await process.signal(9)
    assert await process.exited == 137
    close(process)


@pytest.fixture(scope="session")
def docker_socket() -> Iterator[Path]:
    """The socket of a Docker daemon, or a skipped test."""
    with contextlib.ExitStack() as stack:
        try:
            path = stack.enter_context(dockerd.daemon())
        except dockerd.Unavailable as exc:
            pytest.skip(str(exc))
        yield path


@pytest.fixture(scope="session")
def gvisor_socket(docker_socket: Path) -> Iterator[Path]:
    """The socket of a Docker daemon that has gVisor as it should be, or a skipped test."""
    if dockerd.RUNSC_PATH is None:
        pytest.skip("needs gVisor: install runsc, or build it by `make runsc` (needs Go)")
    info = asyncio.run(DockerApi(docker_socket).request("ask Docker", "GET", "/info"))
    with contextlib.ExitStack() as stack:
        path = docker_socket
        if not set(ARGUMENTS) <= set(info["Runtimes"].get(RUNSC, {}).get("runtimeArgs") or ()):
            try:
                path = stack.enter_context(dockerd.private(dockerd.GVISOR))
            except dockerd.Unavailable as exc:
                pytest.skip(str(exc))
        yield path


class Kind(NamedTuple):
    """How to make a runtime, here and in a process of its own."""

    name: str
    make: Callable[[Path], Runtime]
    code: str  # an expression for the same, where STATE is the folder
    socket: Path | None = None  # of the Docker daemon, if it needs one


@pytest.fixture(scope="module", params=RUNTIMES)
def kind(request: pytest.FixtureRequest) -> Kind:
    """Every runtime that this machine can run."""
    if request.param == "native":
        if shutil.which("bwrap") is None:
            pytest.skip("bubblewrap is not installed")
        return Kind("native", NativeRuntime, "gatewayd.local.runtime.native.NativeRuntime(STATE)")
    made: type[DockerRuntime | GvisorRuntime] = DockerRuntime if request.param == "docker" else GvisorRuntime
    path: Path = request.getfixturevalue("docker_socket" if request.param == "docker" else "gvisor_socket")
    code = f"{made.__module__}.{made.__qualname__}(STATE, Path({str(path)!r}))"
    return Kind(request.param, lambda state: made(state, path), code, path)


@pytest.fixture(scope="module")
def state() -> Iterator[Path]:
    """A folder of state."""
    folder = Path(tempfile.mkdtemp(prefix="gatewayd-state-"))
    yield folder
    shutil.rmtree(folder)


async def clear(runtime: Runtime) -> None:
    """Remove all that a runtime keeps between two lives of a service."""
    for box_id in await runtime.disks():
        await runtime.remove(box_id)
    assert await runtime.disks() == set()
    await runtime.aclose()
    if isinstance(runtime, DockerRuntime):  # its image is a cache: nothing else removes it
        for image in await runtime._images._mine():
            await runtime._api.request("remove an image", "DELETE", f"/images/{part(image)}")


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def runtime(kind: Kind, state: Path) -> AsyncIterator[Runtime]:
    runtime = kind.make(state)
    await runtime.recover()
    yield runtime
    await clear(runtime)


Start = Callable[..., Awaitable[Box]]


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def start(runtime: Runtime) -> AsyncIterator[Start]:
    """Start boxes that are stopped at the end."""
    boxes: list[Box] = []

    async def start(**fields: Any) -> Box:
        fields.setdefault("id", uuid.uuid4().hex[:8])
        box = await runtime.start(BoxSpec(hostname="boxy", **fields))
        boxes.append(box)
        return box

    yield start
    await asyncio.gather(*(box.stop(grace=0.1) for box in boxes))


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def box(start: Start) -> Box:
    """One box for all tests of a module that do it no harm."""
    return await start()

"""What comes from inside with a socket: an agent that was taken over, a relay that does not keep to the rules."""

from __future__ import annotations

import asyncio
import base64
import os
import resource
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from gatewayd.local.runtime import docker_listener, nativelistener
from gatewayd.local.runtime.base import RuntimeFailure, SpawnSpec
from gatewayd.local.runtime.docker_listener import DockerListener
from gatewayd.local.runtime.docker_pump import Pump
from gatewayd.local.runtime.nativebox import NativeBox
from gatewayd.local.runtime.nativelistener import checked
from gatewayd.tasks import TaskOwner

from .conftest import needs_bubblewrap, read_all

TOKEN = "0" * 32
PATH = "/tmp/gatewayd-0123456789abcdef/socket"  # never opened


def descriptors() -> set[str]:
    return {entry.name for entry in Path("/proc/self/fd").iterdir()}


def of_socket(family: int, kind: int, *, listens: bool = False) -> int:
    sock = socket.socket(family, kind)
    if listens:
        sock.listen()
    return sock.detach()


@pytest.mark.parametrize("path", [None, 7, "", "relative", "/etc/passwd", PATH + "\n", PATH + "/../x", "/tmp/gatewayd-0/socket"])
def test_a_path_that_is_none_of_ours(path: Any) -> None:
    before = descriptors()
    with pytest.raises(RuntimeFailure):
        checked({"path": path}, [of_socket(socket.AF_UNIX, socket.SOCK_STREAM)])
    assert descriptors() == before


def test_descriptors_that_are_no_listening_socket() -> None:
    before = descriptors()
    for fds in (
        [],
        [os.open("/dev/null", os.O_RDONLY)],
        [of_socket(socket.AF_UNIX, socket.SOCK_STREAM)],
        [of_socket(socket.AF_UNIX, socket.SOCK_DGRAM)],
        [of_socket(socket.AF_INET, socket.SOCK_STREAM, listens=True)],
        [of_socket(socket.AF_UNIX, socket.SOCK_STREAM) for _ in range(2)],
    ):
        with pytest.raises(RuntimeFailure):
            checked({"path": PATH}, fds)
    assert descriptors() == before


ASK = """
import socket, sys
input()
sock = socket.socket(socket.AF_UNIX)
sock.connect(sys.argv[1])
print("connected", flush=True)
print(sock.recv(100).decode())
"""


@needs_bubblewrap
async def test_connections_wait_while_there_are_no_descriptors(box: NativeBox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nativelistener, "_RETRY", 0.1)
    connections: asyncio.Queue[socket.socket] = asyncio.Queue()
    listener = await box.listen_unix(None, connections.put_nowait)
    process = await box.spawn(SpawnSpec(["python3", "-c", ASK, listener.path]))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    spare = os.dup(0)
    os.close(spare)  # the lowest free number, and with the limit there none is free
    resource.setrlimit(resource.RLIMIT_NOFILE, (spare, hard))
    try:
        os.write(process.stdin, b"\n")
        async with asyncio.timeout(20):
            while listener._retry is None:  # noqa: ASYNC110 - it tells nobody
                await asyncio.sleep(0.01)
        assert connections.empty()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    with await asyncio.wait_for(connections.get(), 20) as sock:
        sock.send(b"after all")
    listener.close()
    await listener.removed()
    assert process.stderr is not None
    for fd in (process.stdin, process.stderr):
        os.close(fd)
    assert await asyncio.wait_for(read_all(process.stdout), 20) == b"connected\nafter all\n"
    assert await process.exited == 0


class Relay:
    """The other end of an exec connection: what a relay inside says and hears."""

    def __init__(self) -> None:
        ours, self.sock = socket.socketpair()
        ours.setblocking(False)
        self.sock.setblocking(False)
        self.tasks = TaskOwner("test")
        self.accepted: asyncio.Queue[socket.socket] = asyncio.Queue()
        pump = Pump(ours, b"", TOKEN, framed=True)
        self.listener = DockerListener(pump, self.tasks, PATH, self.accepted.put_nowait)

    async def say(self, *texts: str, stream: int = 1) -> None:
        """Records."""
        payload = b"".join(b"\x1e\xff" + f"{TOKEN} {text}".encode() + b"\x1e" for text in texts)
        frame = bytes([stream, 0, 0, 0]) + len(payload).to_bytes(4, "big") + payload
        await asyncio.wait_for(asyncio.get_running_loop().sock_sendall(self.sock, frame), 10)

    async def hear(self) -> str:
        """What arrives next; "" at the end."""
        return (await asyncio.wait_for(asyncio.get_running_loop().sock_recv(self.sock, 65536), 10)).decode()

    async def connection(self, number: int) -> socket.socket:
        """A new connection."""
        await self.say(f"new {number}")
        return await asyncio.wait_for(self.accepted.get(), 10)


@pytest.fixture
async def relay() -> AsyncIterator[Relay]:
    before = descriptors()
    made = Relay()
    yield made
    made.listener.close()
    made.sock.close()
    await made.listener.removed()
    await made.tasks.aclose()
    while not made.accepted.empty():
        made.accepted.get_nowait().close()
    await asyncio.sleep(0)  # callbacks of what was closed
    assert descriptors() == before


async def read(sock: socket.socket) -> bytes:
    return await asyncio.wait_for(asyncio.get_running_loop().sock_recv(sock, 65536), 10)


def encoded(data: bytes) -> str:
    return base64.b64encode(data).decode()


async def test_both_ways_and_the_end(relay: Relay) -> None:
    with await relay.connection(1) as sock:
        await relay.say("data 1 " + encoded(b"in"))
        assert await read(sock) == b"in"
        assert await relay.hear() == "ack 1\n"
        sock.send(b"out")
        assert await relay.hear() == f"data 1 {encoded(b'out')}\n"
        sock.send(b"more")  # follows the acknowledgement
        await relay.say("ack 1")
        assert await relay.hear() == f"data 1 {encoded(b'more')}\n"
        await relay.say("eof 1")
        assert await read(sock) == b""
        sock.send(b"last")
        await relay.say("ack 1")
        assert await relay.hear() == f"data 1 {encoded(b'last')}\n"
        await relay.say("close 1")
        async with asyncio.timeout(10):
            while True:  # a write tells that the other end is closed
                try:
                    sock.send(b"x")
                except BrokenPipeError:
                    break
                except BlockingIOError:
                    pass
                await asyncio.sleep(0.01)


async def test_what_the_service_closes(relay: Relay) -> None:
    (await relay.connection(1)).close()
    assert await relay.hear() == "close 1\n"
    await relay.say("data 1 " + encoded(b"late"), "ack 1", "eof 1", "close 1")
    with await relay.connection(1) as sock:  # its own business, if it counts from the start again
        await relay.say("data 1 " + encoded(b"new"))
        assert await read(sock) == b"new"


async def test_nonsense_is_passed_over(relay: Relay) -> None:
    with await relay.connection(1) as sock:
        await relay.say("", "new", "new x", "new -1", "new ٣", "new " + "9" * 11, "new 1")
        await relay.say("ack 2", "data 2 AAAA", "hello 1", "ack 1")
        await relay.say("new 7", stream=2)  # not from the relay: programs write there
        await relay.say("data 1 " + encoded(b"still there"))
        assert await read(sock) == b"still there"
    assert relay.accepted.empty()


@pytest.mark.parametrize("texts", [["data 1 A"], ["data 1 é"], ["data 1 " + encoded(bytes(9000))] * 2])
async def test_data_out_of_order_end_everything(relay: Relay, texts: list[str]) -> None:
    with await relay.connection(1) as sock, await relay.connection(2) as other:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
        await relay.say(*([*texts, *texts] * 40))
        async with asyncio.timeout(10):
            while await read(other):
                pass
            while await relay.hear():
                pass


async def test_more_connections_than_there_may_be(relay: Relay) -> None:
    limit = docker_listener._MAX_CONNECTIONS
    await relay.say(*(f"new {number}" for number in range(limit + 1)))
    assert await relay.hear() == f"close {limit}\n"
    assert relay.accepted.qsize() == limit


async def test_a_relay_that_does_not_listen(relay: Relay) -> None:
    """Every line to it is the answer to one of its own; it gets no more of them than the limit."""
    await relay.say(*(f"new {number}" for number in range(docker_listener._MAX_CONNECTIONS)))
    flood = [f"new {number}" for number in range(10_000_000, 10_000_000 + 10_000)]
    for _ in range(40):
        try:
            await relay.say(*flood)
        except (TimeoutError, OSError):
            break
    first = relay.accepted.get_nowait()
    async with asyncio.timeout(10):
        assert await read(first) == b""  # the listener is closed
    first.close()


async def test_the_end_of_the_relay_ends_its_connections(relay: Relay) -> None:
    with await relay.connection(1) as sock:
        relay.sock.shutdown(socket.SHUT_RDWR)
        assert await read(sock) == b""
        await relay.listener.removed()


async def test_a_box_that_is_closing() -> None:
    before = descriptors()
    tasks = TaskOwner("closed")
    await tasks.aclose()
    ours, theirs = socket.socketpair()
    pump = Pump(ours, b"", TOKEN, framed=True)
    with pytest.raises(RuntimeError):
        DockerListener(pump, tasks, PATH, socket.socket.close)
    pump.close()
    theirs.close()
    assert descriptors() == before

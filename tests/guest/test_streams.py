"""Connections made and accepted inside a sandbox."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from gatewayd.errors import DialRefused, GatewayError, StreamClosed, StreamReset
from gatewayd.relay import ByteStream, relay
from gatewayd.sandbox.session import Session
from tests.guest.conftest import World
from tests.guest.test_processes import DEADLINE, read_all, run

SERVER = """
import os, socket, sys, threading
where = sys.argv[1]
if where == "tcp":
    server = socket.create_server(("127.0.0.1", 0))
    print(server.getsockname()[1], flush=True)
else:
    server = socket.socket(socket.AF_UNIX)
    server.bind(where)
    server.listen()
    print("ready", flush=True)
def serve(sock):
    data = bytearray()
    while piece := sock.recv(65536):
        data += piece
        if data == b"reset":
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, bytes((1, 0, 0, 0, 0, 0, 0, 0)))
            return sock.close()
        if data == b"half":
            sock.sendall(b"first")
            sock.shutdown(socket.SHUT_WR)
    try:
        sock.sendall(data[::-1])
    except OSError:
        pass
    sock.close()
while True:
    threading.Thread(target=serve, args=(server.accept()[0],), daemon=True).start()
"""


async def everything(stream: ByteStream) -> bytes:
    parts = []
    while data := await stream.read():
        parts.append(data)
    return b"".join(parts)


@asynccontextmanager
async def server(world: World, where: str) -> AsyncIterator[str]:
    """A server inside that answers with the reverse of what it got, at the end of that."""
    session = await run(world, argv=("python3", "-c", SERVER, where))
    async with asyncio.timeout(DEADLINE):
        yield (await session.read()).decode().strip()
    await session.aclose()


async def settled(world: World) -> None:
    """The guest has forgotten every session but those of programs."""
    async with asyncio.timeout(DEADLINE):
        while any(item.kind != "process" for item in await world.guests.sessions(world.account, world.sandbox)):  # noqa: ASYNC110
            await asyncio.sleep(0.05)


async def test_half_close_over_tcp(world: World) -> None:
    async with server(world, "tcp") as port:
        stream = await world.guests.connect_tcp(world.account, world.sandbox, "127.0.0.1", int(port))
        await stream.write(b"hello")
        await stream.write_eof()
        assert await everything(stream) == b"olleh"
        with pytest.raises(StreamClosed):
            await stream.write(b"x")
        await stream.aclose()
        await stream.aclose()
        stream.abort()
        await settled(world)


async def test_the_peer_may_end_its_direction_first(world: World) -> None:
    async with server(world, "tcp") as port:
        stream = await world.guests.connect_tcp(world.account, world.sandbox, "localhost", int(port))
        await stream.write(b"half")
        assert await everything(stream) == b"first"
        await stream.write(b"more")
        await stream.write_eof()
        await stream.aclose()
        await settled(world)


async def test_a_unix_socket_through_cuts(world: World) -> None:
    data = os.urandom(1 << 20) * 6
    await world.sh("rm -f /tmp/server.sock")
    async with server(world, "/tmp/server.sock"):
        stream = await world.guests.connect_unix(world.account, world.sandbox, "/tmp/server.sock")
        world.cutter.after = 1_500_000
        for pos in range(0, len(data), 200_000):
            await stream.write(data[pos : pos + 200_000])
        await stream.write_eof()
        assert await everything(stream) == data[::-1]
        world.cutter.after = 1 << 40
        assert world.cutter.cuts >= 3
        await stream.aclose()
        await settled(world)


async def test_what_was_written_before_the_close_is_delivered(world: World) -> None:
    await world.sh("rm -f /tmp/got")
    session = await run(
        world,
        argv=(
            "python3",
            "-c",
            "import socket; s = socket.create_server(('127.0.0.1', 0)); print(s.getsockname()[1], flush=True); "
            "c = s.accept()[0]; print(sum(iter(lambda: len(c.recv(65536)), 0)))",
        ),
    )
    port = int(await session.read())
    stream = await world.guests.connect_tcp(world.account, world.sandbox, "127.0.0.1", port)
    for _ in range(50):
        await stream.write(bytes(100_000))
    await stream.write_eof()
    await stream.aclose()
    async with asyncio.timeout(DEADLINE):
        assert int(await read_all(session)) == 5_000_000
    await session.aclose()
    await settled(world)


async def test_a_reset(world: World) -> None:
    async with server(world, "tcp") as port:
        stream = await world.guests.connect_tcp(world.account, world.sandbox, "127.0.0.1", int(port))
        await stream.write(b"reset")
        with pytest.raises(StreamReset):
            await everything(stream)
        await stream.aclose()


async def test_aborting(world: World) -> None:
    async with server(world, "tcp") as port:
        stream = await world.guests.connect_tcp(world.account, world.sandbox, "127.0.0.1", int(port))
        stream.abort()
        stream.abort()
        with pytest.raises(GatewayError):
            await stream.read()
        with pytest.raises(GatewayError):
            await stream.write(b"x")
        await stream.aclose()
        await settled(world)


async def test_nothing_listens(world: World) -> None:
    with pytest.raises(DialRefused, match=r"cannot connect to 127\.0\.0\.1:1 in sandbox"):
        await world.guests.connect_tcp(world.account, world.sandbox, "127.0.0.1", 1)
    with pytest.raises(GatewayError, match=r"no-such\.sock"):
        await world.guests.connect_unix(world.account, world.sandbox, "/tmp/no-such.sock")
    await settled(world)


async def client(world: World, target: str, text: str) -> Session:
    """A program inside that connects, sends, and prints what comes back."""
    script = (
        "import socket, sys\n"
        "where = sys.argv[1]\n"
        "s = socket.create_connection(('127.0.0.1', int(where))) if where.isdigit() else socket.socket(socket.AF_UNIX)\n"
        "where.isdigit() or s.connect(where)\n"
        "s.sendall(sys.argv[2].encode())\n"
        "s.shutdown(socket.SHUT_WR)\n"
        "print(b''.join(iter(lambda: s.recv(65536), b'')).decode())\n"
    )
    return await run(world, argv=("python3", "-c", script, target, text))


@pytest.mark.parametrize("kind", ["tcp", "unix"])
async def test_listening(world: World, kind: str) -> None:
    peers = []

    async def shout(stream: ByteStream, peer: str) -> None:
        peers.append(peer)
        world.cutter.cut()
        await stream.write((await everything(stream)).upper())
        await stream.write_eof()

    if kind == "tcp":
        listener = await world.guests.listen_tcp(world.account, world.sandbox, "127.0.0.1", 0, "", shout)
        target = str(listener.port)
    else:
        listener = await world.guests.listen_unix(world.account, world.sandbox, "", "", shout)
        target = listener.path
        assert target.startswith("/")
    async with asyncio.timeout(DEADLINE):
        clients = [await client(world, target, f"number {number}") for number in range(5)]
        answers = await asyncio.gather(*(read_all(one) for one in clients))
        assert answers == [b"NUMBER %d\n" % number for number in range(5)]
        for one in clients:
            await one.aclose()
        assert len(peers) == 5
        await listener.aclose()
        await listener.aclose()
        assert await listener.wait_closed() is not None
        late = await client(world, target, "nobody")
        assert (await late.wait()).code == 1
        await late.aclose()
    await settled(world)


async def test_a_listener_whose_port_is_taken(world: World) -> None:
    async def never(stream: ByteStream, peer: str) -> None:
        raise AssertionError(peer)

    async with server(world, "tcp") as port:
        with pytest.raises(GatewayError, match=f"cannot listen on 127.0.0.1:{port}"):
            await world.guests.listen_tcp(world.account, world.sandbox, "127.0.0.1", int(port), "", never)
    await settled(world)


async def test_a_task_that_fails_ends_its_connection_alone(world: World) -> None:
    async def fail(stream: ByteStream, peer: str) -> None:
        raise GatewayError("no use for it")

    listener = await world.guests.listen_tcp(world.account, world.sandbox, "127.0.0.1", 0, "", fail)
    async with asyncio.timeout(DEADLINE):
        for _ in range(2):
            one = await client(world, str(listener.port), "x")
            await one.wait()
            await one.aclose()
        await listener.aclose()
    await settled(world)


async def test_relayed_to_a_socket_here(world: World) -> None:
    """As the forwards do it."""
    import socket

    from gatewayd.relay import SocketStream

    async with server(world, "tcp") as port:
        remote = await world.guests.connect_tcp(world.account, world.sandbox, "127.0.0.1", int(port))
        ours, theirs = socket.socketpair()
        relaying = asyncio.ensure_future(relay(SocketStream.from_socket(theirs), remote))
        near = SocketStream.from_socket(ours)
        await near.write(b"abc" * 100_000)
        await near.write_eof()
        assert await everything(near) == b"cba" * 100_000
        result = await relaying
        assert (result.a_to_b, result.b_to_a, result.error) == (300_000, 300_000, None)
        await near.aclose()
        await settled(world)

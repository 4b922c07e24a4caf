"""What `Box.listen_unix` promises, checked against every runtime that this machine can run."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import PurePosixPath
from typing import NamedTuple

import pytest

from gatewayd.local.runtime.base import Box, RuntimeFailure, SpawnSpec, UnixListener

from .conftest import Start, close, read_until, run, sh

pytestmark = pytest.mark.asyncio(loop_scope="module")

DEADLINE = 30.0  # seconds for anything here; a container's exec takes half of one

# Sends its arguments' first, half-closes, and prints what comes back up to the end.
ASK = """
import socket, sys
sock = socket.socket(socket.AF_UNIX)
sock.connect(sys.argv[1])
sock.sendall(sys.argv[2].encode())
sock.shutdown(socket.SHUT_WR)
while data := sock.recv(65536):
    sys.stdout.write(data.decode())
"""
BULK = """
import socket, sys, threading
sock = socket.socket(socket.AF_UNIX)
sock.connect(sys.argv[1])
size = int(sys.argv[2])
sending = threading.Thread(target=sock.sendall, args=(bytes(range(256)) * (size // 256),))
sending.start()
left = size
while left:
    data = sock.recv(min(left, 65536))
    assert data and not data.strip(b"x"), data
    left -= len(data)
sending.join()
print("all")
"""


class Listening(NamedTuple):
    """A listener and what it accepts."""

    listener: UnixListener
    connections: asyncio.Queue[socket.socket]

    async def accept(self) -> socket.socket:
        """The next connection."""
        return await asyncio.wait_for(self.connections.get(), DEADLINE)


@asynccontextmanager
async def listening(box: Box, user: str | None = None) -> AsyncIterator[Listening]:
    """A listener, closed at the end with what it accepted and nobody took."""
    connections: asyncio.Queue[socket.socket] = asyncio.Queue()
    one = Listening(await box.listen_unix(user, connections.put_nowait), connections)
    try:
        yield one
    finally:
        while not connections.empty():
            connections.get_nowait().close()
        one.listener.close()
        await one.listener.removed()


async def receive(sock: socket.socket) -> bytes:
    """Up to the end."""
    data = b""
    while piece := await asyncio.wait_for(asyncio.get_running_loop().sock_recv(sock, 65536), DEADLINE):
        data += piece
    return data


async def send(sock: socket.socket, data: bytes) -> None:
    await asyncio.wait_for(asyncio.get_running_loop().sock_sendall(sock, data), DEADLINE)


async def flood(sock: socket.socket) -> None:
    while True:
        await send(sock, bytes(65536))


async def test_a_question_a_half_close_and_the_answer(box: Box) -> None:
    async with listening(box) as here:
        asking = asyncio.ensure_future(run(box, "python3", "-c", ASK, here.listener.path, "question"))
        with await here.accept() as sock:
            assert not sock.getblocking()
            assert await receive(sock) == b"question"
            await send(sock, b"answer")
        assert await asyncio.wait_for(asking, DEADLINE) == (0, b"answer", b"")


async def test_it_is_the_user_s_alone(box: Box) -> None:
    async with listening(box, "user") as here:
        path = here.listener.path
        shown = await sh(box, f"stat -c '%U %a %F' {PurePosixPath(path).parent} {path}")
        assert shown.splitlines() == ["user 700 directory", "user 600 socket"]
        refused = await run(box, "python3", "-c", ASK, path, "", user="sshd")
        assert refused.code == 1
        assert b"PermissionError" in refused.err
        asking = asyncio.ensure_future(run(box, "python3", "-c", ASK, path, "mine", user="user"))
        with await here.accept() as sock:
            assert await receive(sock) == b"mine"
        assert (await asyncio.wait_for(asking, DEADLINE)).code == 0


async def test_it_is_gone_when_it_is_closed(box: Box) -> None:
    before = await sh(box, "ls -A /tmp")
    async with listening(box) as here, listening(box, "user") as other:
        assert here.listener.path != other.listener.path
        process = await box.spawn(SpawnSpec(["python3", "-c", ASK, here.listener.path, "x"]))
        with await here.accept() as sock:
            assert await receive(sock) == b"x"
            here.listener.close()
            here.listener.close()
            await here.listener.removed()
        assert (await asyncio.wait_for(process.exited, DEADLINE)) == 0
        close(process)
        refused = await run(box, "python3", "-c", ASK, here.listener.path, "")
        assert b"FileNotFoundError" in refused.err
    assert await sh(box, "ls -A /tmp") == before


async def test_what_others_put_into_its_folder_stays(box: Box) -> None:
    async with listening(box) as here:
        folder = PurePosixPath(here.listener.path).parent
        await sh(box, f"rm {here.listener.path}; mkdir {here.listener.path}; echo kept > {folder}/file")
    assert await sh(box, f"cat {folder}/file; rm -r {folder}") == "kept\n"


async def test_many_at_once_and_a_lot_of_both_ways(box: Box) -> None:
    size = 512 * 1024
    async with listening(box) as here:
        script = f"for i in 1 2 3; do python3 -c '{BULK}' {here.listener.path} {size} & done; wait"
        running = asyncio.ensure_future(sh(box, script))

        async def serve() -> None:
            with await here.accept() as sock:
                await send(sock, b"x" * size)  # all of it, before the first byte is read
                assert await receive(sock) == bytes(range(256)) * (size // 256)

        await asyncio.gather(serve(), serve(), serve())
        assert await asyncio.wait_for(running, DEADLINE) == "all\n" * 3


async def test_a_client_that_hangs_up_is_noticed(box: Box) -> None:
    async with listening(box) as here:
        process = await box.spawn(SpawnSpec(["python3", "-c", ASK, here.listener.path, "hold"]))
        with await here.accept() as sock:
            assert await receive(sock) == b"hold"
            await process.signal(9)
            with pytest.raises((BrokenPipeError, ConnectionResetError)):
                await asyncio.wait_for(flood(sock), DEADLINE)
        assert await process.exited == 137
        close(process)


async def test_where_it_cannot_be_made(start: Start) -> None:
    box = await start()
    with pytest.raises(OSError, match="nobody-at-all") as unknown:
        await box.listen_unix("nobody-at-all", socket.socket.close)
    assert unknown.value.errno == errno.EINVAL
    await sh(box, "chmod 755 /tmp")
    with pytest.raises(PermissionError):
        await box.listen_unix("user", socket.socket.close)
    assert await sh(box, "ls -A /tmp") == ""
    await box.stop(grace=0.1)
    with pytest.raises(RuntimeFailure, match="has ended"):
        await box.listen_unix(None, socket.socket.close)


async def test_nothing_stays_open_when_the_sandbox_ends(start: Start) -> None:
    box = await start()
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - a count
    listener = await box.listen_unix(None, socket.socket.close)
    await box.stop(grace=0.1)
    listener.close()
    await listener.removed()
    assert len(os.listdir("/proc/self/fd")) <= before  # noqa: PTH208 - a count


async def test_a_program_that_reads_nothing_holds_its_own_connection_up(box: Box) -> None:
    deaf = "import socket,sys; s=socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]); print('in', flush=True); input()"
    async with listening(box) as here:
        process = await box.spawn(SpawnSpec(["python3", "-c", deaf, here.listener.path]))
        assert await read_until(process.stdout, b"in\n") == b"in\n"
        with await here.accept() as sock:
            sending = asyncio.ensure_future(asyncio.get_running_loop().sock_sendall(sock, bytes(8 << 20)))
            asking = asyncio.ensure_future(run(box, "python3", "-c", ASK, here.listener.path, "other"))
            with await here.accept() as other:
                assert await receive(other) == b"other"
            assert (await asyncio.wait_for(asking, DEADLINE)).code == 0
            assert not sending.done()
            sending.cancel()
            await asyncio.wait([sending])
        await process.signal(9)
        close(process)

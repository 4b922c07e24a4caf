"""The Go peer: built once into pytest's cache, started for each test, driven over its standard input and output."""

from __future__ import annotations

import asyncio
import hashlib
import json
import shutil
import socket
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from gatewayd.tasks import TaskOwner
from gatewayd.yamux.aio import Mux, MuxStream, SessionConfig

_SOURCES = Path(__file__).parent / "gopeer"
_CALL_DEADLINE = 30.0  # seconds for one command to the peer


@pytest.fixture(scope="session")
def go_binary(pytestconfig: pytest.Config) -> Path:
    """The compiled peer; skips where there is no Go."""
    go = shutil.which("go")
    if go is None:
        pytest.skip("needs Go (https://go.dev/dl) for hashicorp's yamux")
    digest = hashlib.sha256(b"".join((_SOURCES / name).read_bytes() for name in ("go.mod", "go.sum", "main.go")))
    assert pytestconfig.cache is not None
    binary = pytestconfig.cache.mkdir("gopeer") / f"gopeer-{digest.hexdigest()[:16]}"
    if not binary.exists():
        fresh = binary.with_suffix(".new")
        build = subprocess.run(
            [go, "build", "-o", str(fresh), "."], cwd=_SOURCES, capture_output=True, text=True, timeout=110, check=False
        )
        assert build.returncode == 0, f"go build failed:\n{build.stderr}"
        fresh.replace(binary)
    return binary


class SocketTransport:
    """`MessageTransport` over one connected stream socket."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    async def over(cls, sock: socket.socket) -> SocketTransport:
        return cls(*await asyncio.open_connection(sock=sock, limit=1 << 20))

    async def send(self, data: bytes) -> None:
        self._writer.write(data)
        await self._writer.drain()

    async def recv(self) -> bytes:
        data = await self._reader.read(256 * 1024)
        if not data:
            raise EOFError
        return data

    async def close(self) -> None:
        self._writer.close()


class GoPeer:
    """hashicorp's end of a session, and our Mux at the other end."""

    def __init__(self, process: asyncio.subprocess.Process, mux: Mux, owner: TaskOwner) -> None:
        self.mux = mux
        self.owner = owner  # for further tasks of a test
        self.running = owner.start(mux.run(), "mux")
        self.notes: asyncio.Queue[dict[str, Any]] = asyncio.Queue(1000)  # what the peer says unasked
        self._process = process
        self._answers: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._next_id = 1
        owner.start(self._listen(), "listen")

    async def _listen(self) -> None:
        assert self._process.stdout is not None
        while line := await self._process.stdout.readline():
            message = json.loads(line)
            if answer := self._answers.pop(message["id"], None):
                answer.set_result(message)
            else:
                self.notes.put_nowait(message)

    async def call(self, op: str, **arguments: Any) -> dict[str, Any]:
        """Run a command there; its answer. Fails when the peer reports an error."""
        number, self._next_id = self._next_id, self._next_id + 1
        answer = self._answers[number] = asyncio.get_running_loop().create_future()
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"id": number, "op": op, **arguments}).encode() + b"\n")
        async with asyncio.timeout(_CALL_DEADLINE):
            message: dict[str, Any] = await answer
        assert "error" not in message, f"{op}: {message['error']}"
        return message

    async def note(self) -> dict[str, Any]:
        """The next thing the peer says unasked."""
        async with asyncio.timeout(_CALL_DEADLINE):
            return await self.notes.get()

    async def open(self, line: str) -> MuxStream:
        """A stream to the peer whose first line is sent."""
        stream = await self.mux.open_stream()
        await stream.write(line.encode() + b"\n")
        return stream


StartPeer = Callable[..., Awaitable[GoPeer]]


@pytest.fixture
async def start_peer(go_binary: Path) -> AsyncIterator[StartPeer]:
    """Starts Go peers: `await start_peer(client=…)` gives us that yamux role and the peer the other one."""

    @asynccontextmanager
    async def peer(
        *, client: bool, on_stream: Any, config: SessionConfig | None, flags: tuple[str, ...]
    ) -> AsyncIterator[GoPeer]:
        owner = TaskOwner("peer")
        with socket.create_server(("127.0.0.1", 0)) as server:
            server.setblocking(False)
            host, port = server.getsockname()
            process = await asyncio.create_subprocess_exec(
                go_binary,
                "-connect",
                f"{host}:{port}",
                "-role",
                "server" if client else "client",
                *flags,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                limit=1 << 20,  # of one answer
            )
            try:
                async with asyncio.timeout(20):
                    sock, _ = await asyncio.get_running_loop().sock_accept(server)
                transport = await SocketTransport.over(sock)
                mux = Mux(transport, client=client, name="go", config=config, on_stream=on_stream)
                made = GoPeer(process, mux, owner)
                yield made
                await mux.aclose()
            finally:
                process.kill()
                await process.wait()
                await owner.aclose()

    async with AsyncExitStack() as stack:

        async def start(
            *, client: bool = True, on_stream: Any = None, config: SessionConfig | None = None, flags: tuple[str, ...] = ()
        ) -> GoPeer:
            return await stack.enter_async_context(peer(client=client, on_stream=on_stream, config=config, flags=flags))

        yield start

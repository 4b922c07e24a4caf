"""A sandbox service in a few lines: REST on one port, WebSockets on another, both with real sockets and scripted answers."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from uvicorn.config import Config as UvicornConfig
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState
from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.datastructures import Headers
from websockets.exceptions import ConnectionClosed, ConnectionClosedOK
from websockets.http11 import Request as WsRequest
from websockets.http11 import Response as WsResponse

from gatewayd.config import Profile, Proxies
from gatewayd.sandbox.accounts import Account
from gatewayd.sandbox.rest_client import FixedAccess
from gatewayd.yamux.aio import Mux, MuxStream

KEY = "k-secret-123"


@dataclass
class Seen:
    """One REST request."""

    method: str
    path: str
    query: str
    headers: dict[str, str]
    body: Any


@dataclass
class Answer:
    """A scripted answer, given instead of the usual one."""

    status: int
    body: Any = None
    headers: dict[str, str] = field(default_factory=dict)
    delay: float = 0.0  # seconds before it


class ServerTransport:
    """The service's end of a tunnel's WebSocket."""

    def __init__(self, websocket: ServerConnection) -> None:
        self.websocket = websocket

    async def send(self, data: bytes) -> None:
        try:
            await self.websocket.send(data)
        except ConnectionClosed as exc:
            raise ConnectionError from exc

    async def recv(self) -> bytes:
        try:
            data = await self.websocket.recv()
        except ConnectionClosedOK as exc:
            raise EOFError from exc
        except ConnectionClosed as exc:
            raise ConnectionError from exc
        assert isinstance(data, bytes)
        return data

    async def close(self) -> None:
        await self.websocket.close()


class FakeService:
    """Scripted by its attributes; `start` and `aclose` it."""

    def __init__(self) -> None:
        self.boxes: dict[str, dict[str, Any]] = {}
        self.seen: list[Seen] = []
        self.answers: deque[Answer] = deque()  # for the next REST requests
        self.rest_connections: set[str] = set()  # the client's ends
        self.execute: Callable[[dict[str, Any]], dict[str, Any]] = lambda body: {"stdout": "", "stderr": "", "exit_code": 0}
        self.upgrades: list[WsRequest] = []  # every WebSocket handshake that was begun
        self.rejections: deque[tuple[int, bytes]] = deque()  # for the next handshakes
        self.upgrade_gate = asyncio.Event()  # cleared: handshakes wait
        self.upgrade_gate.set()
        self.ports: dict[int, Callable[[MuxStream], Awaitable[None]]] = {}  # what listens inside the sandbox
        self.silent_ports: set[int] = set()  # dials that never get an answer
        self.statuses: dict[int, int] = {}  # ports that answer a certain status
        self.dialled: list[int] = []
        self.muxes: list[Mux] = []
        self.connections: list[ServerConnection] = []
        self.on_exec: Callable[[ServerConnection, dict[str, Any]], Coroutine[Any, Any, None]] | None = None
        self.endpoint = ""
        self.ws_origin = ""  # of the data plane
        self._stopping = asyncio.Event()
        self._rest: asyncio.AbstractServer | None = None
        self._ws: Server | None = None
        self._state = ServerState()

    async def start(self) -> None:
        app = Starlette(routes=[Route("/{path:path}", self._serve_rest, methods=["GET", "POST", "PATCH", "DELETE"])])
        config = UvicornConfig(app, lifespan="off", log_config=None, access_log=False, ws="none")
        config.load()
        loop = asyncio.get_running_loop()
        sock = socket.create_server(("127.0.0.1", 0))
        self._rest = await loop.create_server(lambda: H11Protocol(config, self._state, {}, loop), sock=sock)
        self.endpoint = f"http://127.0.0.1:{sock.getsockname()[1]}"
        await self.start_ws()

    async def start_ws(self, port: int = 0) -> None:
        self._ws = await serve(
            self._serve_ws,
            "127.0.0.1",
            port,
            process_request=self._upgrade,
            compression=None,
            ping_interval=None,
            close_timeout=0.5,
        )
        self.ws_origin = f"http://127.0.0.1:{next(iter(self._ws.sockets)).getsockname()[1]}"
        for box in self.boxes.values():
            box["dataplane_url"] = f"{self.ws_origin}/dp/{box['id']}"

    async def stop_ws(self) -> None:
        """The data plane is gone: connections break, new ones are refused."""
        if self._ws is not None:
            for connection in list(self._ws.connections):
                connection.transport.abort()
            self._ws.close(close_connections=False)
            await self._ws.wait_closed()
            self._ws = None

    async def aclose(self) -> None:
        self._stopping.set()
        for mux in self.muxes:
            await mux.aclose()
        if self._ws is not None:
            self._ws.close()
            await self._ws.wait_closed()
        if self._rest is not None:
            self._rest.close()
        for connection in list(self._state.connections):
            assert connection.transport is not None
            connection.transport.abort()
        for task in list(self._state.tasks):
            task.cancel()
        if self._state.tasks:
            await asyncio.wait(set(self._state.tasks), timeout=5)

    def add_box(self, name: str, **fields: Any) -> dict[str, Any]:
        box = {"id": f"id-{name}", "name": name, "status": "ready", "status_message": None} | fields
        box.setdefault("dataplane_url", f"{self.ws_origin}/dp/{box['id']}")
        self.boxes[name] = box
        return box

    def profile(self, name: str = "env") -> Profile:
        return Profile(name, self.endpoint, KEY)

    def account(self) -> Account:
        profile = self.profile()
        return Account(profile, FixedAccess(profile), Proxies())

    @contextlib.asynccontextmanager
    async def front(self) -> AsyncIterator[str]:
        """The origin of a data plane that takes both: GET goes to the WebSockets, everything else to REST."""

        async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            with contextlib.suppress(ConnectionError):
                while data := await reader.read(65536):
                    writer.write(data)
                    await writer.drain()
            writer.close()

        async def serve_one(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            first = await reader.readexactly(4)
            origin = self.ws_origin if first == b"GET " else self.endpoint
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", int(origin.rpartition(":")[2]))
            far_writer.write(first)
            await asyncio.gather(copy(reader, far_writer), copy(far_reader, writer))

        server = await asyncio.start_server(serve_one, "127.0.0.1", 0)
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        server.close()

    # --- REST ---------------------------------------------------------------------------------------------------------

    async def _serve_rest(self, request: Request) -> Response:
        raw = await request.body()
        body = json.loads(raw) if raw else None
        path = request.scope["raw_path"].decode()
        self.seen.append(Seen(request.method, path, request.url.query, dict(request.headers), body))
        if request.client is not None:
            self.rest_connections.add(str(request.client.port))
        if self.answers:
            answer = self.answers.popleft()
            if answer.delay:
                await asyncio.sleep(answer.delay)
            content = answer.body if isinstance(answer.body, bytes) else json.dumps(answer.body).encode()
            return Response(content, answer.status, answer.headers, "application/json")
        if request.headers.get("x-api-key") != KEY:
            return error(401, "Unauthorized", "invalid API key")
        if path.endswith("/execute"):
            return reply(self.execute(body or {}))
        parts = [unquote(part) for part in path.removeprefix("/v2/sandboxes/boxes").strip("/").split("/")]
        return self._boxes(request, parts, body)

    def _boxes(self, request: Request, parts: list[str], body: Any) -> Response:
        name, action = parts[0], "/".join(parts[1:])
        if not name:
            if request.method == "POST":
                return reply(self.add_box((body or {}).get("name") or "generated"))
            offset, limit = int(request.query_params.get("offset", 0)), int(request.query_params.get("limit", 50))
            return reply({"sandboxes": list(self.boxes.values())[offset : offset + limit]})
        box = self.boxes.get(name)
        if box is None:
            return error(404, "NotFound", f"sandbox {name} not found")
        if request.method == "DELETE":
            del self.boxes[name]
            return Response(status_code=204)
        if request.method == "PATCH":
            box |= body or {}
            if box["name"] != name:
                self.boxes[box["name"]] = self.boxes.pop(name)
        if action == "status":
            return reply({"status": box["status"], "status_message": box["status_message"]})
        if action in ("start", "stop"):
            box["status"] = "ready" if action == "start" else "stopped"
        return reply(box)

    # --- WebSockets ---------------------------------------------------------------------------------------------------

    async def _upgrade(self, _connection: ServerConnection, request: WsRequest) -> WsResponse | None:
        self.upgrades.append(request)
        await self.upgrade_gate.wait()
        if self.rejections:
            status, body = self.rejections.popleft()
            return WsResponse(status, "No", Headers({"Content-Length": str(len(body)), "Location": "http://127.0.0.1:1/"}), body)
        if request.headers.get("X-Api-Key") != KEY:
            return WsResponse(401, "Unauthorized", Headers({"Content-Length": "0"}), b"")
        return None

    async def _serve_ws(self, connection: ServerConnection) -> None:
        self.connections.append(connection)
        assert connection.request is not None
        if connection.request.path.endswith("/tunnel"):
            mux = Mux(ServerTransport(connection), client=False, name="server", on_stream=self._stream)
            self.muxes.append(mux)
            await mux.run()
        elif self.on_exec is not None:
            try:
                first = json.loads(await connection.recv())
                await self.on_exec(connection, first)
            except ConnectionClosed:
                pass

    async def _stream(self, stream: MuxStream) -> None:
        header = b""
        while len(header) < 3:
            header += await stream.read(3 - len(header))
        port = int.from_bytes(header[1:], "big")
        self.dialled.append(port)
        if port in self.silent_ports:
            await self._stopping.wait()
        handler = self.ports.get(port)
        status = self.statuses.get(port, 0 if handler is not None else 2)
        await stream.write(bytes((status,)))
        if handler is not None and status == 0:
            await handler(stream)
        await stream.aclose()


def reply(body: Any, status: int = 200) -> Response:
    return Response(json.dumps(body), status, media_type="application/json")


def error(status: int, kind: str, message: str) -> Response:
    return reply({"detail": {"error": kind, "message": message}}, status)


async def echo(stream: MuxStream) -> None:
    """Sends back what comes, and ends when that ends."""
    while data := await stream.read():
        await stream.write(data)
    await stream.write_eof()


async def upper_at_eof(stream: MuxStream) -> None:
    """Answers only after the other side has ended its direction."""
    content = b""
    while data := await stream.read():
        content += data
    await stream.write(content.upper())
    await stream.write_eof()


async def until(true: Callable[[], object], what: str, deadline: float = 10.0) -> None:
    """Poll something that sends no event; fails when it is not true in time."""
    loop = asyncio.get_running_loop()
    end = loop.time() + deadline
    while not true():
        assert loop.time() < end, f"not within {deadline:.0f} s: {what}"
        await asyncio.sleep(0.005)

"""uvicorn, bent to our needs: tunnels leave ASGI after their upgrade, WebSockets close with 1001, nothing ticks when idle."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import socket
from collections.abc import Awaitable, Callable, Generator
from typing import Any, cast
from urllib.parse import unquote

import uvicorn
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

from gatewayd.local.boxes import Boxes
from gatewayd.local.envelope import ServiceError
from gatewayd.local.exec_ws import GONE
from gatewayd.local.guard import Guard
from gatewayd.local.tunnel import MAX_TUNNELS, Tunnel
from gatewayd.local.tunnel_ws import TunnelSocket
from gatewayd.tasks import TaskOwner

log = logging.getLogger(__name__)

GOING_AWAY = 1001  # RFC 6455 section 7.4.1; the protocol's "the server is reloading"
PING_INTERVAL = 5.0  # seconds between pings on /execute/ws; a client that has gone is noticed by the second
GRACEFUL = 2  # seconds for clients to take their last answers when the service ends, and again for requests to end
MAX_SALVAGE = 1024 * 1024  # bytes read from a connection that broke while we wrote
_TUNNEL_PATH = re.compile(r"/dataplane/([^/]+)/tunnel")


class Tunnels:
    """Takes tunnels over from uvicorn and ends them with the service."""

    def __init__(self, boxes: Boxes, guard: Guard) -> None:
        self._boxes = boxes
        self._guard = guard
        self._tasks = TaskOwner("tunnels")
        self._sockets: set[TunnelSocket] = set()  # open ones

    def take(self, protocol: DataplaneProtocol, box_id: str) -> None:
        """Serve the upgrade that `protocol` has just read."""

        def lost() -> None:
            self._sockets.discard(tunnel_socket)
            protocol.connections.discard(protocol)

        tunnel_socket = TunnelSocket(protocol.conn, protocol.request, protocol.transport, lost)
        self._sockets.add(tunnel_socket)
        # uvicorn sets the connection's protocol after this call returns, so ours must come after that
        protocol.loop.call_soon(protocol.transport.set_protocol, tunnel_socket)
        self._tasks.start(self._serve(protocol, tunnel_socket, box_id), box_id)

    async def _serve(self, protocol: DataplaneProtocol, tunnel_socket: TunnelSocket, box_id: str) -> None:
        try:
            headers = protocol.request.headers.raw_items()
            self._guard.check((name.encode("latin-1"), value.encode("latin-1")) for name, value in headers)
            sandbox = self._boxes.by_id(box_id)
            run = await self._boxes.running(sandbox)
            if len(run.tunnels) >= MAX_TUNNELS:
                raise ServiceError(429, "TooManyTunnels", f"a sandbox has at most {MAX_TUNNELS} tunnels")
        except ServiceError as exc:
            tunnel_socket.reject(exc)
            return
        if tunnel_socket.accept():
            await Tunnel(tunnel_socket, sandbox, run).run()

    def go_away(self) -> None:
        """From now on tunnels are closed with 1001."""
        for tunnel_socket in self._sockets:
            tunnel_socket.close_code = GOING_AWAY

    async def aclose(self) -> None:
        """End what is left; idempotent."""
        await self._tasks.aclose()


class DataplaneProtocol(WebSocketsSansIOProtocol):
    """A WebSocket: /tunnel is handed to `tunnels`, all others go to the application."""

    tunnels: Tunnels  # set on the subclass made for a server
    gone: asyncio.Event  # the connection is gone, whether or not its messages have been received
    taken = False  # it is a tunnel now, and none of this class's business any more

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.gone = asyncio.Event()

    def handle_connect(self, event: Any) -> None:
        """Look at the path before the upgrade is answered."""
        match = _TUNNEL_PATH.fullmatch(unquote(event.path.partition("?")[0]))
        if match is None:
            super().handle_connect(event)
            if self.handshake_initiated and not self.close_sent:
                self.scope["state"][GONE] = self.gone
            return
        self.request = event
        self.taken = True
        self.tunnels.take(self, match[1])

    async def send(self, message: Any) -> None:
        """A refused upgrade completes the handshake too: without this uvicorn logs a complaint about it."""
        await super().send(message)
        if message["type"] == "websocket.http.response.body" and not message.get("more_body", False):
            self.handshake_complete = True

    def connection_lost(self, exc: Exception | None) -> None:
        """A client may send a kill and hang up while we write to it: what is still there is read before it is given up."""
        if exc is not None and self.handshake_complete and not self.disconnected:
            self.read_paused = True  # so that a message does not pause a connection that is gone
            self._salvage()
        self.read_paused = False  # nor its reception resume it
        super().connection_lost(exc)
        self.gone.set()

    def _salvage(self) -> None:
        total = 0
        with contextlib.suppress(OSError):
            fd = self.transport.get_extra_info("socket").fileno()
            while total < MAX_SALVAGE and (data := os.read(fd, 65536)):
                total += len(data)
                self.data_received(data)

    def shutdown(self) -> None:
        """Close with 1001, so that clients come back at once instead of backing off; idempotent."""
        if self.taken:
            return
        if self.handshake_complete and not self.close_sent and not self.disconnected:
            self.stop_keepalive()
            self.queue.put_nowait({"type": "websocket.disconnect", "code": GOING_AWAY})
            self.conn.send_close(GOING_AWAY)
            self.transport.write(b"".join(self.conn.data_to_send()))
            self.close_sent = True
            self.transport.close()
        else:
            super().shutdown()


class Server(uvicorn.Server):
    """A uvicorn server that waits for `stop()` instead of polling, and leaves signals alone."""

    def __init__(self, config: uvicorn.Config, on_stop: Callable[[], Awaitable[None]]) -> None:
        super().__init__(config)
        self._on_stop = on_stop  # awaited after WebSockets were told to go and before requests are waited for
        self._stop = asyncio.Event()

    def stop(self) -> None:
        """Begin the orderly end; idempotent."""
        self._stop.set()

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Signals are the business of the program, not of its server."""
        yield

    async def main_loop(self) -> None:
        """Serve until `stop()`."""
        await self._stop.wait()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop accepting, tell connections, end the sandboxes (and with them running requests), then what uvicorn does."""
        for server in self.servers:
            server.close()
        for connection in list(self.server_state.connections):
            connection.shutdown()
        await self._on_stop()
        await self._drain()
        await super().shutdown(sockets)

    async def _drain(self) -> None:
        """Give clients a moment to take what was sent to them, and hang up on those who do not."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + GRACEFUL
        while self.server_state.connections and loop.time() < deadline:  # noqa: ASYNC110 - a set that uvicorn keeps
            await asyncio.sleep(0.02)
        for connection in list(self.server_state.connections):
            connection.transport.abort()


def make_server(app: Any, tunnels: Tunnels, on_stop: Callable[[], Awaitable[None]]) -> Server:
    """The server for `app`. Sockets are given to `serve()`."""
    protocol = type("BoundDataplaneProtocol", (DataplaneProtocol,), {"tunnels": tunnels})
    config = uvicorn.Config(
        app,
        loop="none",
        http="h11",
        ws=cast("type[asyncio.Protocol]", protocol),
        ws_per_message_deflate=False,
        ws_ping_interval=PING_INTERVAL,
        # while a command does not take its input the connection is not read, pongs neither: their absence proves nothing
        ws_ping_timeout=None,
        lifespan="off",
        interface="asgi3",
        log_config=None,
        log_level=logging.WARNING,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        date_header=False,
        timeout_graceful_shutdown=GRACEFUL,
    )
    return Server(config, on_stop)

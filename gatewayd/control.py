"""HTTP on control.sock: the routes of `frontends.routes` behind uvicorn's protocol, on a Unix socket that is already bound."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route as StarletteRoute
from starlette.routing import Router
from uvicorn.config import Config
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from gatewayd import api
from gatewayd.api import ErrorKind
from gatewayd.config import Caller
from gatewayd.errors import GatewayError, printable
from gatewayd.frontends.fields import Fields
from gatewayd.frontends.peer import peer_is_self
from gatewayd.frontends.routes import ROUTES, Call, Route, Services, openapi
from gatewayd.tasks import TaskOwner

log = logging.getLogger(__name__)

BODY_MAX = 1 << 20  # bytes of a request body
HEADERS_MAX = 65536  # bytes of a request's head
CONCURRENCY_MAX = 256  # connections at a time; uvicorn answers 503 beyond
KEEP_ALIVE = 75  # seconds an idle connection is kept
DRAIN_TIMEOUT = 2.0  # seconds at the stop for answers that are being written


class _OwnPeer(H11Protocol):
    """uvicorn's HTTP/1.1, for processes of this user only."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn itself declares it
        sock = transport.get_extra_info("socket")
        if sock is None or not peer_is_self(sock):
            log.warning("refused a connection to control.sock")
            transport.abort()
            self.conn.send_failed()
            return
        super().connection_made(transport)

    def connection_lost(self, exc: Exception | None) -> None:
        if self.transport is not None:
            super().connection_lost(exc)


class ControlServer:
    """Serves control.sock from `start` to `aclose`."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._tasks = TaskOwner("control")  # the watchers of disconnecting clients
        self._state = ServerState()  # uvicorn's: open connections, running requests
        self._server: asyncio.AbstractServer | None = None
        self._stopping = False  # requests are being cancelled: they are answered
        table = [(f"/v1{route.path}", self._endpoint(route), [route.verb]) for route in ROUTES]
        table += [(path, _openapi, ["GET"]) for path in ("/openapi.json", "/v1/openapi.json")]
        table += [
            (path, _wrong_method, ["GET", "POST", "PUT", "PATCH", "DELETE"]) for path in dict.fromkeys(row[0] for row in table)
        ]
        routes = [StarletteRoute(path, endpoint, methods=verbs, include_in_schema=False) for path, endpoint, verbs in table]
        self._router = Router(routes, redirect_slashes=False, default=_not_found)

    async def start(self, listener: socket.socket) -> None:
        """Accept on a listening Unix socket, which stays the caller's."""
        config = Config(
            self._router,
            http="h11",
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            date_header=False,
            limit_concurrency=CONCURRENCY_MAX,
            timeout_keep_alive=KEEP_ALIVE,
            h11_max_incomplete_event_size=HEADERS_MAX,
        )
        config.load()
        loop = asyncio.get_running_loop()
        # uvicorn's Server would wake up ten times a second for as long as the daemon lives; its protocol does not need it.
        self._server = await loop.create_unix_server(lambda: _OwnPeer(config, self._state, {}, loop), sock=listener.dup())

    async def aclose(self) -> None:
        """Stop accepting, let answers be written, close; idempotent."""
        server, self._server = self._server, None
        if server is None:
            return
        server.close()
        for connection in list(self._state.connections):
            connection.shutdown()
        if self._state.tasks:
            await asyncio.wait(set(self._state.tasks), timeout=DRAIN_TIMEOUT)
        self._stopping = True
        for task in list(self._state.tasks):
            task.cancel()
        if self._state.tasks:
            await asyncio.wait(set(self._state.tasks), timeout=DRAIN_TIMEOUT)
        for connection in list(self._state.connections):
            if connection.transport is not None:
                connection.transport.abort()
        await self._tasks.aclose()

    def _endpoint(self, route: Route) -> Any:
        async def endpoint(request: Request) -> Response:
            try:
                return await self._answer(route, request)
            except GatewayError as exc:
                return error_response(exc)
            except ClientDisconnect:
                return Response(status_code=api.HTTP_STATUS[ErrorKind.INTERRUPTED])
            except Exception:
                log.exception("%s %s failed", route.verb, route.path)
                return error_response(GatewayError("internal error, see the daemon's log", kind=ErrorKind.INTERNAL))

        return endpoint

    async def _answer(self, route: Route, request: Request) -> Response:
        """Run the handler; a client that disconnects cancels it."""
        body = await _body(request)
        call = Call(_caller(request), request.path_params, Fields(_query(request)), Fields(body))
        worker = asyncio.current_task()
        gone = False

        async def watch() -> None:
            nonlocal gone
            while (await request.receive())["type"] != "http.disconnect":
                pass
            gone = True
            if worker is not None:
                worker.cancel()

        watcher = self._tasks.start(watch(), "watch")
        try:
            reply = await route.handler(self._services, call)
        except asyncio.CancelledError:
            if worker is None or not (gone or self._stopping) or worker.uncancel():
                raise
            if gone:
                log.info("%s %s: the client is gone", route.verb, printable(request.url.path, 200))
                raise ClientDisconnect from None
            raise GatewayError("the daemon is stopping", kind=ErrorKind.UNAVAILABLE) from None
        finally:
            watcher.cancel()
        if reply.body is None:
            return Response(status_code=reply.status)
        return JSONResponse(reply.body, reply.status)


async def _body(request: Request) -> dict[str, Any]:
    """The JSON object a request carries; empty when it carries nothing. Raises GatewayError (usage)."""
    content = bytearray()
    async for chunk in request.stream():
        content += chunk
        if len(content) > BODY_MAX:
            raise GatewayError(f"the request is larger than {BODY_MAX} bytes", kind=ErrorKind.USAGE)
    if not content.strip():
        return {}
    try:
        data = json.loads(content)
    except (ValueError, RecursionError) as exc:
        raise GatewayError("the request body is not JSON", kind=ErrorKind.USAGE) from exc
    if not isinstance(data, dict):
        raise GatewayError("the request body is not a JSON object", kind=ErrorKind.USAGE)
    return data


def _query(request: Request) -> dict[str, str]:
    """Query parameters, each at most once."""
    query: dict[str, str] = {}
    for name, value in request.query_params.multi_items():
        if name in query:
            raise GatewayError(f"{printable(name, 64)} is given twice", kind=ErrorKind.USAGE)
        query[name] = value
    return query


def _caller(request: Request) -> Caller:
    headers = request.headers
    return Caller(
        profile=headers.get(api.HEADER_PROFILE, ""),
        endpoint=headers.get(api.HEADER_ENDPOINT, ""),
        api_key=headers.get(api.HEADER_API_KEY, ""),
        workspace=headers.get(api.HEADER_WORKSPACE, ""),
    )


def error_response(exc: GatewayError) -> JSONResponse:
    """The error object with the HTTP status of its kind."""
    body = api.error_body(exc.kind, exc.message, exc.hint)
    return JSONResponse(body, api.HTTP_STATUS[body["error"]["kind"]])


async def _openapi(_request: Request) -> Response:
    return JSONResponse(openapi())


async def _wrong_method(request: Request) -> Response:
    response = error_response(GatewayError(f"{request.method} does not go with this route", kind=ErrorKind.USAGE))
    response.status_code = 405
    return response


async def _not_found(scope: Any, receive: Any, send: Any) -> None:
    message = f"no such route: {printable(scope.get('method', ''), 16)} {printable(scope.get('path', ''), 200)}"
    await error_response(GatewayError(message, kind=ErrorKind.USAGE, hint="GET /openapi.json lists the routes"))(
        scope, receive, send
    )

"""The FastAPI application: routes, the door, and errors in the protocol's shape."""

from __future__ import annotations

from functools import partial
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.routing import Match

from gatewayd.local import (
    absent,
    dataplane,
    description,
    egress_routes,
    exec_sse,
    exec_ws,
    files,
    registry_routes,
    rest_server,
    search,
    snapshot_routes,
)
from gatewayd.local.boxes import Boxes
from gatewayd.local.envelope import STATUS_TYPES, ServiceError, error_response, validation_response
from gatewayd.local.guard import Guard, GuardMiddleware
from gatewayd.local.statedir import version

METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE")  # that any path has


def build_app(boxes: Boxes, guard: Guard) -> GuardMiddleware:
    """The service as an ASGI application."""
    app = FastAPI(title="gatewayd local", version=version() or "0", docs_url=None, redoc_url=None)
    app.state.boxes = boxes
    for prefix, tag in zip(rest_server.PREFIXES, description.TAGS, strict=False):
        for router in (rest_server.router, snapshot_routes.router, registry_routes.router, egress_routes.router, absent.router):
            app.include_router(router, prefix=prefix, tags=[tag["name"]])
    app.include_router(egress_routes.workspace_router, tags=["workspace"])
    app.include_router(absent.dataplane_router)
    for router in (dataplane.router, exec_sse.router, exec_ws.router, files.router, search.router):
        app.include_router(router, tags=["data plane"], responses=description.answers(None, 404))
    app.openapi = partial(description.describe, app)  # type: ignore[method-assign]  # the way FastAPI documents
    app.add_exception_handler(ServiceError, _service_error)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http_error)
    return GuardMiddleware(app, guard)


def _where(request: Request) -> str:
    return f"{request.method} {request.url.path}"


async def _service_error(request: Request, exc: Any) -> JSONResponse:
    return error_response(exc, _where(request))


async def _invalid(request: Request, exc: Any) -> JSONResponse:
    return validation_response(exc.errors(), _where(request))


async def _http_error(request: Request, exc: Any) -> JSONResponse:
    message, headers = str(exc.detail), exc.headers
    if exc.status_code == 404:
        message = f"there is nothing at {request.url.path[:200]}"
    elif exc.status_code == 405:
        allowed = _methods(request)
        message, headers = f"{request.method[:20]} is not possible here: use {allowed}", {"Allow": allowed}
    error = ServiceError(exc.status_code, STATUS_TYPES.get(exc.status_code, "InvalidRequest"), message)
    return error_response(error, _where(request), headers)


def _methods(request: Request) -> str:
    """Every method that the path of a request has (RFC 9110 section 10.2.1); each of them is a route of its own."""

    def has(method: str) -> bool:
        return any(route.matches({**request.scope, "method": method})[0] == Match.FULL for route in request.app.routes)

    return ", ".join(filter(has, METHODS))

"""The door: every request, WebSocket upgrades included, must name this host and carry the key."""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Iterable

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gatewayd.local.envelope import ServiceError, error_response, internal_response

MAX_BODY = 16 * 1024 * 1024  # bytes of a request body that is held in memory (everything but /upload)
WILDCARDS = ("0.0.0.0", "::", "")  # noqa: S104 - compared with, not bound to


class Guard:
    """Checks Host and key of requests.

    The Host check stops DNS rebinding: a web page can make a browser send requests here under the page's own host name, never
    under a loopback name. (It would lack the key too; two locks.)
    """

    def __init__(self, key: str, host: str) -> None:
        self._key = key.encode()  # what X-Api-Key must carry
        self._host = host.lower()  # the address the service is bound to

    def check(self, headers: Iterable[tuple[bytes, bytes]]) -> None:
        """Raise ServiceError unless the request may come in.

        Args:
            headers: as in an ASGI scope; names in any case.
        """
        host = key = b""
        for name, value in headers:
            lowered = name.lower()
            if lowered == b"host":
                host = value
            elif lowered == b"x-api-key":
                key = value
        if not self._host_allowed(host.decode("latin-1")):
            raise ServiceError(403, "Forbidden", "this service does not answer under that Host name")
        if not hmac.compare_digest(key, self._key):
            message = "the API key is wrong" if key else "no API key: send the X-Api-Key header"
            raise ServiceError(401, "Unauthorized", message)

    def _host_allowed(self, header: str) -> bool:
        host = host_of(header)
        if host in ("localhost", self._host):
            return True
        try:
            address = ipaddress.ip_address(host)
        except ValueError:
            return False
        # bound to every address, the request may name any of them; a name is still refused
        return address.is_loopback or self._host in WILDCARDS


def host_of(header: str) -> str:
    """The host part of a Host header, lowercase, without port and brackets."""
    if header.startswith("["):
        return header[1:].partition("]")[0].lower()
    return header.partition(":")[0].lower()


class GuardMiddleware:
    """Guards an ASGI application and turns what escapes it into an answer."""

    def __init__(self, app: ASGIApp, guard: Guard) -> None:
        self._app = app  # the application behind the door
        self._guard = guard

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        where = f"{scope.get('method', 'WS')} {scope['path']}"
        try:
            self._guard.check(scope["headers"])
        except ServiceError as exc:
            await error_response(exc, where)(scope, receive, send)
            return
        started = False

        async def watched_send(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        if scope["type"] == "http" and not scope["path"].endswith("/upload"):
            receive = limited(receive, scope["headers"])
        try:
            await self._app(scope, receive, watched_send)
        except Exception as exc:  # noqa: BLE001 - the last boundary of a request
            response = internal_response(exc, where)
            if not started:
                await response(scope, receive, send)


def limited(receive: Receive, headers: Iterable[tuple[bytes, bytes]]) -> Receive:
    """`receive`, ending with 413 when the body is larger than MAX_BODY."""
    declared = max((int(value) for name, value in headers if name == b"content-length" and value.isdigit()), default=0)
    received = 0

    async def receiving() -> Message:
        nonlocal received
        message = await receive() if declared <= MAX_BODY else {}
        received += len(message.get("body", b""))
        if max(declared, received) > MAX_BODY:
            raise HTTPException(413, f"a request body has at most {MAX_BODY} bytes")
        return message

    return receiving

"""The HTTP/1.1 requests of one connection, passed on one by one: headers set, bodies streamed, both directions at once."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from typing import Any, Final

import h11

from gatewayd.errors import GatewayError
from gatewayd.local.egress.journal import Journal
from gatewayd.local.egress.policy import PathTooLong, Policy, SecretMissing, same_host
from gatewayd.local.egress.streams import Replayed
from gatewayd.relay import ByteStream, relay
from gatewayd.tasks import TaskOwner

_MAX_HEAD = 128 * 1024  # bytes of a request's or answer's head
_LATE_BODY = 1.0  # seconds that the end of a request may come after the end of its answer
_PIECE = 64 * 1024  # bytes read at once
_FAILURES: Final = (OSError, GatewayError, h11.ProtocolError)
_ABSOLUTE = re.compile(r"(?i)https?://([^/?#]*)")


class _Refusal(Exception):
    """A request is not passed on."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class _Side:
    """One of the two connections: bytes in, events out, and back."""

    def __init__(self, role: type[h11.CLIENT] | type[h11.SERVER], stream: ByteStream) -> None:
        self.http = h11.Connection(role, _MAX_HEAD)
        self.stream = stream
        self.moved = 0  # bytes of bodies read, since the last request began

    async def next(self) -> Any:
        """The next event. Raises OSError, GatewayError, h11.RemoteProtocolError."""
        while (event := self.http.next_event()) is h11.NEED_DATA:
            self.http.receive_data(await self.stream.read(_PIECE))
        if isinstance(event, h11.Data):
            self.moved += len(event.data)
        return event

    async def send(self, event: Any) -> None:
        """Raises OSError, GatewayError, h11.LocalProtocolError."""
        if data := self.http.send(event):
            await self.stream.write(data)

    def rest(self) -> Replayed:
        """The stream after HTTP has left it."""
        return Replayed(self.stream, bytes(self.http.trailing_data[0]))


class Requests:
    """Passes the requests of one connection on."""

    def __init__(
        self,
        host: str,
        port: int,
        client: ByteStream,
        server: ByteStream,
        policy: Callable[[], Policy],
        journal: Journal,
        *,
        encrypted: bool,
    ) -> None:
        """Both streams stay their owner's. `host` is canonical; `policy` gives the present one."""
        self._host, self._port = host, port
        self._client = _Side(h11.SERVER, client)
        self._server = _Side(h11.CLIENT, server)
        self._policy = policy
        self._journal = journal
        self._encrypted = encrypted

    async def run(self) -> None:
        """Until either side ends, or something makes no sense. Raises nothing but what cancels it."""
        try:
            while await self._one():
                self._client.http.start_next_cycle()
                self._server.http.start_next_cycle()
        except _FAILURES:
            return  # noted where a request was under way; the owner ends both connections

    async def _one(self) -> bool:
        """One request and its answer; False when it was the last."""
        self._client.moved = self._server.moved = 0
        try:
            request = await self._request()
        except h11.RemoteProtocolError as exc:
            self._journal.note("http", self._host, self._port, "deny", "a request that is no HTTP/1.1")
            await self._refuse(_Refusal(exc.error_status_hint, "this is no HTTP/1.1"))
            return False
        if not isinstance(request, h11.Request):
            return False
        method, target = request.method.decode("latin-1")[:20], request.target.decode("latin-1")
        rules: list[str] = []
        status: int | None = None
        verdict, reason = "allow", ""
        try:
            head, rules = self._rewritten(request, target)
            await self._server.send(head)
            status = await self._exchange()
        except _Refusal as exc:
            verdict, reason, status = "deny", str(exc), exc.status
            await self._refuse(exc)
        except _FAILURES as exc:  # the text of a protocol error may hold what was set: it is not told
            reason = f"broken off: {type(exc).__name__}"
            raise
        finally:
            path = _path(target)
            fields = {"method": method, "path": path, "status": status, "rules": rules}
            sizes = {"sent": self._client.moved, "received": self._server.moved}
            self._journal.note("http", self._host, self._port, verdict, reason, **fields, **sizes)
        return verdict == "allow" and status != 101 and self._reusable()

    async def _request(self) -> Any:
        """The next request; None when the server ends the connection first, as it may between two."""
        owner = TaskOwner("requests")
        waiting = owner.start(_quiet(self._client.next), "request")
        ended = owner.start(_quiet(lambda: self._server.stream.read(1)), "server")
        try:
            await _first_of(waiting, ended)
            if waiting.done():
                event = waiting.result()
                if isinstance(event, Exception):
                    raise event
                return event
            return None  # end of file; or an answer to nothing, which nobody wants
        finally:
            await owner.aclose()

    def _rewritten(self, request: h11.Request, target: str) -> tuple[h11.Request, list[str]]:
        """The request as it goes on. Raises _Refusal."""
        policy = self._policy()
        self._check_host(request, target)
        if why := policy.denies(self._host):
            raise _Refusal(403, why)
        try:
            given, rules = policy.headers(self._host, _path(target), encrypted=self._encrypted)
        except SecretMissing as exc:
            raise _Refusal(403, str(exc)) from None
        except PathTooLong as exc:
            raise _Refusal(414, str(exc)) from None
        if given and request.method in (b"TRACE", b"CONNECT"):
            raise _Refusal(405, "the answer to this method would show what was set")
        chunked = any(name == b"transfer-encoding" for name, _ in request.headers)
        kept = [
            (raw, value)
            for (raw, value), (name, _) in zip(request.headers.raw_items(), request.headers, strict=True)
            if name not in given and not (chunked and name == b"content-length")  # RFC 9112 section 6.1
        ]
        return h11.Request(method=request.method, target=request.target, headers=[*kept, *given.items()]), rules

    def _check_host(self, request: h11.Request, target: str) -> None:
        """Every name in a request must be the one that the connection is for. Raises _Refusal."""
        named = [value.decode("latin-1") for name, value in request.headers if name == b"host"]
        if (absolute := _ABSOLUTE.match(target)) is not None:
            named.append(absolute[1])
        elif not target.startswith("/") and target != "*":
            raise _Refusal(400, "a target that is no path")
        if not named:
            raise _Refusal(400, "no Host header")
        for text in named:
            host, port = _authority(text)
            if not same_host(host, self._host) or (port and port != str(self._port)):
                raise _Refusal(421, "the Host header is not the host of this connection")

    async def _exchange(self) -> int:
        """Body one way and answer the other, at the same time; returns the answer's status."""
        owner = TaskOwner("exchange")
        sending = owner.start(_quiet(self._send_body), "body")
        answering = owner.start(_quiet(self._pass_answer), "answer")
        try:
            await _first_of(sending, answering)
            if sending.done() and isinstance(sending.result(), h11.RemoteProtocolError) and not answering.done():
                raise sending.result()
            await _first_of(answering)  # even when the server takes no more: it may say why
            await asyncio.wait({sending}, timeout=_LATE_BODY)
            result = answering.result()
            if isinstance(result, Exception):
                raise result
        finally:
            await owner.aclose()
        if result == 101:
            await relay(self._client.rest(), self._server.rest())
        return int(result)

    async def _send_body(self) -> None:
        while True:
            event = await self._client.next()
            if event is h11.PAUSED or isinstance(event, h11.ConnectionClosed):
                return
            await self._server.send(event)
            if isinstance(event, h11.EndOfMessage):
                return

    async def _pass_answer(self) -> int:
        """The answer's status; 101 after which both sides speak something else."""
        status = 0
        while True:
            event = await self._server.next()
            if isinstance(event, h11.ConnectionClosed) or event is h11.PAUSED:
                raise ConnectionResetError("the server ended the connection without an answer")
            if isinstance(event, h11.Response | h11.InformationalResponse):
                status = event.status_code
            if isinstance(event, h11.InformationalResponse) and status == 101:
                self._server.http.next_event()  # takes note of the switch
            await self._client.send(_copy(event))
            if isinstance(event, h11.EndOfMessage) or status == 101:
                return status

    def _reusable(self) -> bool:
        both = (self._client.http, self._server.http)
        return all(http.our_state is h11.DONE and http.their_state is h11.DONE for http in both)

    async def _refuse(self, refusal: _Refusal) -> None:
        text = f"gatewayd: {refusal}\n".encode()
        headers = [("Content-Type", "text/plain"), ("Content-Length", str(len(text))), ("Connection", "close")]
        await self._client.send(h11.Response(status_code=refusal.status, headers=headers, reason=b"Refused"))
        await self._client.send(h11.Data(data=text))
        await self._client.send(h11.EndOfMessage())


def _copy(event: Any) -> Any:
    """An answer's head with the names of its headers as the server wrote them."""
    if isinstance(event, h11.Response | h11.InformationalResponse):
        headers = list(event.headers.raw_items())
        return type(event)(status_code=event.status_code, headers=headers, reason=event.reason)
    return event


def _path(target: str) -> str:
    return _ABSOLUTE.sub("", target, count=1).partition("?")[0].partition("#")[0] or "/"


def _authority(text: str) -> tuple[str, str]:
    """Host and port of a Host header (RFC 9110 section 7.2); user information makes it no host at all."""
    if text.startswith("["):
        host, _, rest = text.partition("]")
        return host[1:], rest.removeprefix(":")
    host, _, port = text.partition(":")
    return host, port


async def _quiet(function: Callable[[], Any]) -> Any:
    """What it returns or raises, as a result: a task that fails is no defect here."""
    try:
        return await function()
    except _FAILURES as exc:
        return exc


async def _first_of(*tasks: Any) -> None:
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)

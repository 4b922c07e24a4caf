"""Connections made and accepted inside a sandbox by its guest: byte streams that survive the link they run over."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any

from gatewayd.errors import GatewayError
from gatewayd.guest import wire
from gatewayd.guest.events import Accepted
from gatewayd.guest.session import ClientSession
from gatewayd.relay import ByteStream
from gatewayd.sandbox.guest_host import GuestHost
from gatewayd.sandbox.guest_session import GuestSession
from gatewayd.sandbox.session import ABSENCE, STDOUT
from gatewayd.tasks import TaskOwner

log = logging.getLogger(__name__)

OnStream = Callable[[ByteStream, str], Coroutine[Any, Any, None]]  # an accepted connection, and the address of its peer
ACCEPTING_MAX = 256  # accepted connections of one listener that are being served at a time; more are closed


class GuestStream(GuestSession):
    """A connection inside the sandbox, as a `relay.ByteStream`."""

    def __init__(self, host: GuestHost, core: ClientSession, owner: TaskOwner, what: str) -> None:
        super().__init__(host, core, owner, what=what, streams=(STDOUT,), linger=ABSENCE, connection=True)
        self._broken: asyncio.Future[GatewayError] = asyncio.get_running_loop().create_future()  # handed out by broken()

    async def read(self, limit: int = 262144, _: int = 0, /) -> bytes:
        """1 to `limit` bytes, b"" at the end of the peer's direction. Raises GatewayError; StreamReset for a reset."""
        return await super().read(STDOUT, limit)

    def broken(self) -> asyncio.Future[GatewayError]:
        """Done once the connection was reset or its session lost; why."""
        return self._broken

    def _lose(self, error: GatewayError, *, only_exit: bool = False) -> None:
        super()._lose(error, only_exit=only_exit)
        if not only_exit and not self._broken.done():
            self._broken.set_result(error)

    async def write_eof(self) -> None:  # type: ignore[override]
        """End our direction; idempotent."""
        super().write_eof()

    def abort(self) -> None:
        """End both directions at once; idempotent."""
        self._abandon()

    async def aclose(self) -> None:
        """End our direction, read no more; what was written is still delivered, in the background. Idempotent."""
        self._core.input_eof()
        self._core.stop_output(STDOUT)
        self._finish()


class GuestListener:
    """A listening socket inside the sandbox; every connection is served by a task of its own. Close it with `aclose`."""

    def __init__(self, host: GuestHost, session: GuestSession, owner: TaskOwner, on_stream: OnStream) -> None:
        self.port = 0  # of a TCP listener
        self.path = ""  # of a Unix listener
        self._host = host
        self._session = session
        self._on_stream = on_stream
        self._sessions = owner  # of the tasks of accepted connections: they end with the guests
        self._tasks = TaskOwner(f"listener in {host.sandbox}")  # serve accepted connections
        self._full = False  # connections are being left unfetched
        session.on_accepted = self._accepted

    async def start(self, *, wake: bool = True) -> None:
        """Listen. Raises GatewayError."""
        await self._session.start(wake=wake)
        try:
            self.port = wire.number(self._session.fields.get("port", b"0"), 65535)
            self.path = self._session.fields.get("path", b"").decode("utf-8", "surrogateescape")[:4096]
        except ValueError as exc:
            await self._session.aclose()
            raise GatewayError(f"the guest in sandbox {self._host.sandbox!r} does not keep to its protocol: {exc}") from exc

    async def wait_closed(self) -> GatewayError | None:
        """Until nothing listens any more; why, unless `aclose` was called."""
        return await self._session.wait_over()

    async def aclose(self) -> None:
        """Stop listening, end what serves accepted connections; idempotent."""
        await self._session.aclose()
        await self._tasks.aclose()

    def _accepted(self, event: Accepted) -> None:
        if len(self._tasks) >= ACCEPTING_MAX:  # those that nobody fetches end inside by themselves
            if not self._full:
                log.warning("listener in %s: more than %d connections", self._host.sandbox, ACCEPTING_MAX)
            self._full = True
            return
        self._full = False
        try:
            self._tasks.start(self._serve(event.id, event.peer), "connection")
        except RuntimeError:  # closed meanwhile
            log.info("a connection from %s came too late", event.peer)

    async def _serve(self, session_id: bytes, peer: str) -> None:
        core = ClientSession.accepted(session_id, wire.WINDOW)
        stream = GuestStream(self._host, core, self._sessions, f"take a connection from {peer or 'somebody'}")
        try:
            await stream.start(wake=False)
        except GatewayError as exc:
            log.info("listener in %s: %s", self._host.sandbox, exc.message)
            return
        try:
            await self._on_stream(stream, peer)
        except (OSError, GatewayError) as exc:
            log.info("listener in %s: %s: %s", self._host.sandbox, peer, exc)
        except BaseException:
            stream.abort()
            raise
        finally:
            await asyncio.shield(stream.aclose())

"""Forwards of an SSH connection: what the client connects to inside, and what listens inside for the client."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

import asyncssh
from asyncssh.constants import OPEN_ADMINISTRATIVELY_PROHIBITED, OPEN_CONNECT_FAILED

from gatewayd.errors import GatewayError, printable
from gatewayd.frontends.ssh.stream import ChannelStream
from gatewayd.relay import ByteStream, relay

if TYPE_CHECKING:
    from gatewayd.frontends.ssh.engine import Connection
    from gatewayd.frontends.ssh.target import Target
    from gatewayd.frontends.ssh.work import Work
    from gatewayd.sandbox.guest_client import GuestListener

log = logging.getLogger(__name__)

LISTENERS_MAX = 256  # of one connection


class Listener(asyncssh.SSHListener):
    """A listener inside the sandbox, as asyncssh keeps it until the client cancels it or leaves."""

    def __init__(self, inner: GuestListener, work: Work, closed: Callable[[Listener], None]) -> None:
        super().__init__()
        self.inner = inner
        self._work = work
        self._closed: Callable[[Listener], None] | None = closed  # called once

    def get_port(self) -> int:
        """The port inside; 0 for a Unix socket."""
        return int(getattr(self.inner, "port", 0) or 0)

    def close(self) -> None:
        """Stop listening; connections go on. Idempotent."""
        if self._closed is not None:
            closed, self._closed = self._closed, None
            closed(self)
            self._work.start(self.inner.aclose(), "close a listener")

    async def wait_closed(self) -> None:
        """Nothing is left to wait for: the task belongs to the connection."""


class Forwards:
    """The forwards of one connection."""

    def __init__(self, connection: Connection, target: Target, work: Work, label: str) -> None:
        """`work`: of the connection; ends after all channels."""
        self._connection = connection
        self._target = target
        self._work = work
        self._label = label
        self._listeners: set[Listener] = set()  # that are open
        self._closed = False  # close was called

    # --- from the client into the sandbox -----------------------------------------------------------------------------

    async def to_tcp(self, host: str, port: int) -> ChannelStream:
        """direct-tcpip. Raises asyncssh.ChannelOpenError."""
        if not 0 < port < 65536:
            raise asyncssh.ChannelOpenError(OPEN_ADMINISTRATIVELY_PROHIBITED, f"{port} is no port")
        return await self._to(self._target.connect_tcp(host, port), f"{printable(host, 100)}:{port}")

    async def to_unix(self, path: str) -> ChannelStream:
        """direct-streamlocal. Raises asyncssh.ChannelOpenError."""
        return await self._to(self._target.connect_unix(path), printable(path, 100))

    async def _to(self, dial: Awaitable[ByteStream], where: str) -> ChannelStream:
        try:
            remote = await dial
        except GatewayError as exc:
            log.info("ssh %s: forward to %s failed: %s", self._label, where, exc.message)
            raise asyncssh.ChannelOpenError(OPEN_CONNECT_FAILED, printable(exc.message)) from exc
        stream = ChannelStream()
        try:
            self._work.start(self._join(stream, remote, f"forward to {where}"), "forward")
        except RuntimeError as exc:  # the connection has ended meanwhile
            remote.abort()
            raise asyncssh.ChannelOpenError(OPEN_CONNECT_FAILED, "the connection is closing") from exc
        return stream

    async def _join(self, stream: ChannelStream, remote: ByteStream, what: str) -> None:
        log.info("ssh %s: %s opened", self._label, what)
        result = await relay(stream, remote)
        because = "" if result.error is None else f": {printable(result.error, 200)}"
        log.info("ssh %s: %s closed, %d bytes up, %d bytes down%s", self._label, what, result.a_to_b, result.b_to_a, because)

    # --- from the sandbox to the client -------------------------------------------------------------------------------

    async def on_tcp(self, host: str, port: int) -> Listener | None:
        """tcpip-forward: a port inside. None: refused."""
        inside = {"localhost": "127.0.0.1", "": "0.0.0.0", "*": "0.0.0.0"}.get(host, host)  # noqa: S104 - the sandbox's own
        bound = port  # what the client is told: the port it asked for, or the one it got

        async def on_stream(stream: ByteStream, peer: str) -> None:
            peer_host, peer_port = split_peer(peer)

            async def open_channel(session: ChannelStream) -> None:
                await self._connection.create_connection(lambda: session, host, bound, peer_host, peer_port)

            await self.bring(stream, open_channel, f"connection to port {bound}")

        listener = await self._listen(self._target.listen_tcp(inside, port, on_stream), f"{printable(inside, 100)}:{port}")
        if listener is not None and not port:
            bound = listener.get_port()
        return listener

    async def on_unix(self, path: str) -> Listener | None:
        """streamlocal-forward: a socket inside. None: refused."""

        async def on_stream(stream: ByteStream, peer: str) -> None:
            async def open_channel(session: ChannelStream) -> None:
                await self._connection.create_unix_connection(lambda: session, path)

            await self.bring(stream, open_channel, f"connection to {printable(path, 100)}")

        if not path:
            return None
        return await self._listen(self._target.listen_unix(path, on_stream), printable(path, 100))

    async def on_agent(self) -> str:
        """A socket inside that leads to the client's agent: its path, or "" when there can be none."""

        async def on_stream(stream: ByteStream, peer: str) -> None:
            async def open_channel(session: ChannelStream) -> None:
                await self._connection.open_agent(lambda: session)

            await self.bring(stream, open_channel, "connection to the agent")

        listener = await self._listen(self._target.listen_unix("", on_stream), "the agent's socket")
        return "" if listener is None else str(listener.inner.path)

    async def on_display(self, port: int) -> Listener | None:
        """A port inside that leads to the client's display. None: it is taken, or nothing can listen."""

        async def on_stream(stream: ByteStream, peer: str) -> None:
            peer_host, peer_port = split_peer(peer)

            async def open_channel(session: ChannelStream) -> None:
                await self._connection.open_x11(lambda: session, peer_host, peer_port)

            await self.bring(stream, open_channel, "connection to the display")

        return await self._listen(self._target.listen_tcp("127.0.0.1", port, on_stream), f"display port {port}")

    async def _listen(self, opening: Awaitable[GuestListener], where: str) -> Listener | None:
        try:
            inner = await opening
        except GatewayError as exc:
            log.info("ssh %s: cannot listen on %s: %s", self._label, where, exc.message)
            return None
        if self._closed:  # the client left meanwhile
            await inner.aclose()
            return None
        listener = Listener(inner, self._work, self._listeners.discard)
        self._listeners.add(listener)
        if len(self._listeners) > LISTENERS_MAX:
            log.info("ssh %s: cannot listen on %s: %d listeners are open", self._label, where, LISTENERS_MAX)
            listener.close()
            return None
        log.info("ssh %s: listening on %s", self._label, where)
        return listener

    async def bring(self, stream: ByteStream, open_channel: Callable[[ChannelStream], Awaitable[Any]], what: str) -> None:
        """Join an accepted connection to a channel of the client's."""
        session = ChannelStream()
        try:
            await open_channel(session)
        except asyncssh.ChannelOpenError as exc:
            log.info("ssh %s: %s: the client refused: %s", self._label, what, printable(exc.reason, 200))
            stream.abort()
            return
        except BaseException:
            stream.abort()
            raise
        await self._join(session, stream, what)

    def close(self) -> None:
        """Close every listener, those included that are being opened; idempotent."""
        self._closed = True
        for listener in list(self._listeners):
            listener.close()


def split_peer(peer: str) -> tuple[str, int]:
    """``HOST:PORT`` as the guest writes it, checked: it comes out of a sandbox."""
    host, _, port = printable(peer, 100).rpartition(":")
    return (host.strip("[]") or "127.0.0.1", int(port) if port.isascii() and port.isdigit() and int(port) < 65536 else 0)

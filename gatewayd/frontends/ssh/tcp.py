"""ssh over TCP, for programs that cannot run a ProxyCommand: public keys and certificates decide who comes in."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import asyncssh

from gatewayd.api import ErrorKind
from gatewayd.errors import GatewayError, printable
from gatewayd.frontends.ssh.authorized import AuthorizedKeys
from gatewayd.frontends.ssh.engine import Connection
from gatewayd.frontends.ssh.keys import Keys
from gatewayd.frontends.ssh.server import USER, Server
from gatewayd.frontends.ssh.target import Target
from gatewayd.tasks import TaskOwner

if TYPE_CHECKING:
    from asyncssh.connection import SSHServerConnectionOptions

log = logging.getLogger(__name__)

CONNECTIONS_MAX = 512  # at a time
STRANGERS_MAX = 32  # of them, that have not logged in
BACKLOG = 128

Identify = Callable[[str, str], Target]  # sandbox and user inside ("": the image's own) → target; raises GatewayError


class TcpServer(Server):
    """A client from the network."""

    def __init__(self, listener: TcpListener) -> None:
        super().__init__(("127.0.0.1", 0), ("127.0.0.1", 22))
        self._listener = listener
        self._authorities: list[asyncssh.SSHKey] = []  # as of begin_auth
        self.known = False  # it has logged in

    def identify(self, username: str) -> Target:
        """``NAME`` or ``USER%NAME``."""
        user, _, name = username.rpartition("%")
        if USER.fullmatch(name) is None or (user and USER.fullmatch(user) is None):
            raise GatewayError(
                f"{printable(username, 100)!r} names no sandbox", kind=ErrorKind.USAGE, hint="log in as NAME or USER%NAME"
            )
        return self._listener.identify(name, user)

    def connection_made(self, conn: Any) -> None:
        """See Server."""
        super().connection_made(conn)
        peer, local = conn.get_extra_info("peername"), conn.get_extra_info("sockname")
        if peer and local:
            self._addresses = (*peer[:2], *local[:2])
        if not self._listener.admit(self):
            conn.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """See Server."""
        super().connection_lost(exc)
        self._listener.left(self)

    async def begin_auth(self, username: str) -> bool:
        """Somebody claims to be a user; the keys are what the files say now."""
        try:
            authorized, self._authorities = await self._listener.keys.current()
        except GatewayError as exc:
            log.warning("ssh %s: %s", self.label, exc.message)
            authorized, self._authorities = None, []
        if self._connection is not None:
            self._connection.set_authorized_keys(authorized or AuthorizedKeys())
        return True

    def public_key_auth_supported(self) -> bool:
        """The only way in."""
        return True

    def validate_ca_key(self, username: str, key: asyncssh.SSHKey) -> bool:
        """Whether certificates of `key` are believed; asyncssh checks that they are for `username`."""
        return key in self._authorities

    def auth_completed(self) -> None:
        """The client is who it says."""
        connection = self._connection
        if connection is None:
            return
        self.known = True
        username = str(connection.get_extra_info("username"))
        try:
            self.let_in(self.identify(username))
        except GatewayError as exc:
            log.info("ssh %s: refused: %s", self.label, exc.message)
            connection.disconnect(asyncssh.DISC_ILLEGAL_USER_NAME, f"{exc.message}; {exc.hint}" if exc.hint else exc.message)


class TcpListener:
    """A listening port, from `start` to `aclose`."""

    def __init__(self, host: str, port: int, keys: Keys, options: SSHServerConnectionOptions, identify: Identify) -> None:
        self._host = host
        self._port = port
        self._options = options
        self._server: asyncio.Server | None = None  # set by start
        self._clients: set[TcpServer] = set()  # that are connected
        self._tasks = TaskOwner("ssh over TCP")  # takes leave for those that are gone
        self.keys = keys
        self.identify = identify

    async def start(self) -> int:
        """Listen; the port. Raises GatewayError."""
        await self.keys.current()  # what is wrong with the files is told now
        loop = asyncio.get_running_loop()
        try:
            self._server = await loop.create_server(
                lambda: Connection(loop, self._options, TcpServer(self)), self._host, self._port, backlog=BACKLOG
            )
        except OSError as exc:
            raise GatewayError(
                f"cannot listen for ssh on {self._host}:{self._port}: {exc.strerror or exc}",
                kind=ErrorKind.PORT_IN_USE,
                hint="change ssh.listen in the configuration file",
            ) from exc
        bound: socket.socket = self._server.sockets[0]
        port = int(bound.getsockname()[1])
        log.info("ssh: listening on %s:%d", self._host, port)
        return port

    def admit(self, client: TcpServer) -> bool:
        """Whether there is room for another one."""
        if len(self._clients) >= CONNECTIONS_MAX or sum(not other.known for other in self._clients) >= STRANGERS_MAX:
            log.warning("ssh: refused a connection: %d are open", len(self._clients))
            return False
        self._clients.add(client)
        return True

    def left(self, client: TcpServer) -> None:
        """It is gone; what it did here ends."""
        if client in self._clients:
            self._clients.discard(client)
            self._tasks.start(client.aclose(), "close a connection")

    async def aclose(self) -> None:
        """Stop listening, end the connections; idempotent."""
        if self._server is not None:
            self._server.close()
        await asyncio.gather(*(client.aclose() for client in list(self._clients)))
        await self._tasks.aclose()

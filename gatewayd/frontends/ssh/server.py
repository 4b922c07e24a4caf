"""One SSH connection: who the client is, and what its requests mean for the sandbox."""

from __future__ import annotations

import asyncio
import itertools
import logging
import re
from abc import abstractmethod
from collections.abc import Coroutine
from typing import Any

import asyncssh
from asyncssh.constants import OPEN_ADMINISTRATIVELY_PROHIBITED

from gatewayd import api
from gatewayd.api import ErrorKind
from gatewayd.errors import GatewayError, printable
from gatewayd.frontends.ssh.authorized import PERMIT_LISTEN, PERMIT_OPEN, UNIX
from gatewayd.frontends.ssh.display import open_display
from gatewayd.frontends.ssh.engine import CIPHERS, PACKET_MAX, WINDOW, Connection, Gate
from gatewayd.frontends.ssh.forwards import Forwards
from gatewayd.frontends.ssh.shell import ShellSession
from gatewayd.frontends.ssh.target import Target
from gatewayd.frontends.ssh.work import Work
from gatewayd.tasks import TaskOwner

log = logging.getLogger(__name__)

USER = re.compile(r"[A-Za-z0-9_.][A-Za-z0-9_.@-]{0,63}")  # inside a sandbox
OWN_USER = "sandbox"  # what generated configurations write as User: the image's own
LOST_GRACE = 0.5  # seconds clients have to leave by themselves when their sandbox is gone
LOGIN_DEADLINE = 60  # seconds for key exchange and authentication
REKEY_BYTES = 16 << 30  # bytes sent with one key; clients may ask for a new one whenever they like
# Clients that see an OpenSSH tell it when nobody reads their output any more (eow@openssh.com), which others do not understand.
VERSION = f"OpenSSH_9.9 gatewayd_{api.VERSION}"
_numbers = itertools.count(1)


def options(host_key: bytes) -> asyncssh.SSHServerConnectionOptions:
    """What all connections share. Reads no configuration of other programs."""
    asyncssh.set_log_level(logging.ERROR)  # it would log commands
    return asyncssh.SSHServerConnectionOptions(
        config=None,
        server_version=VERSION,
        server_host_keys=[asyncssh.import_private_key(host_key)],
        encryption_algs=CIPHERS,
        compression_algs=None,
        rekey_bytes=REKEY_BYTES,
        rekey_seconds=None,
        login_timeout=LOGIN_DEADLINE,
        keepalive_interval=0,
        gss_host=None,
        host_based_auth=False,
        kbdint_auth=False,
        password_auth=False,
        public_key_auth=True,
        authorized_client_keys=None,
        agent_forwarding=False,
        x11_forwarding=False,
        encoding=None,
        line_editor=False,
        line_echo=False,
        window=WINDOW,
        max_pktsize=PACKET_MAX,
    )


class Server(Gate):
    """The owner of one connection. Subclasses know who may come in, and set `target`."""

    def __init__(self, peer: tuple[str, int], local: tuple[str, int]) -> None:
        """`peer`, `local`: addresses and ports that sessions are told."""
        self.number = next(_numbers)  # in log lines
        self.label = str(self.number)  # with the sandbox, once it is known
        self._addresses = (*peer, *local)
        self._work = Work(f"ssh {self.number}")  # sessions and forwards: they end with their channels
        self._background = TaskOwner(f"ssh {self.number}")  # what nobody waits for
        self._connection: Connection | None = None  # set by connection_made
        self._forwards: Forwards | None = None  # set by let_in
        self._agent_path = ""  # of the socket inside, once it was asked for
        self._agent_lock = asyncio.Lock()  # held while that socket is made
        self._lost = False  # the sandbox is gone, the connection will be closed
        self.closed = asyncio.get_running_loop().create_future()  # done when the connection is gone

    @abstractmethod
    def identify(self, username: str) -> Target:
        """Who and what an ssh user name means. Raises GatewayError."""

    # --- the connection -----------------------------------------------------------------------------------------------

    def connection_made(self, conn: Any) -> None:
        """A client is there; nothing is known about it."""
        self._connection = conn

    def let_in(self, target: Target) -> None:
        """The client may come in, and this is what it is about."""
        if self._connection is None:
            return
        self.target = target
        self.label = f"{self.number} {target.sandbox}" + (f" as {target.user}" if target.user else "")
        self._forwards = Forwards(self._connection, target, self._work, self.label)
        log.info("ssh %s: connected, %s", self.label, printable(self._connection.client_version, 80))
        self._background.start(self._prepare(target), "prepare")

    async def _prepare(self, target: Target) -> None:
        """Have the guest run by the time the first session comes."""
        try:
            await target.text_only()
        except GatewayError as exc:  # the sessions will meet it too, and tell it
            log.info("ssh %s: %s", self.label, exc.message)

    def begin(self, coro: Coroutine[Any, Any, None], name: str) -> None:
        """See Gate."""
        self._work.start(coro, name)

    def connection_lost(self, exc: Exception | None) -> None:
        """It is gone."""
        if self.closed.done():
            return
        because = "" if exc is None or isinstance(exc, asyncssh.ConnectionLost) else f": {printable(exc, 200)}"
        log.info("ssh %s: disconnected%s", self.label, because)
        if self._forwards is not None:
            self._forwards.close()
        self.closed.set_result(None)

    async def aclose(self) -> None:
        """End the connection and all it does; idempotent."""
        if self._connection is not None and not self.closed.done():
            for session in self._connection.sessions:  # ssh shows no reason once its last session has ended
                session.say("sandbox: the gateway is stopping")
            self._connection.disconnect(asyncssh.DISC_BY_APPLICATION, "the gateway is stopping")
            await asyncio.wait([self.closed], timeout=LOST_GRACE)
        await self._background.aclose()
        await self._work.aclose()

    def sandbox_lost(self) -> None:
        """Every session says so; then the connection is of no use."""
        if not self._lost:
            self._lost = True
            self._background.start(self._leave(), "leave")

    async def _leave(self) -> None:
        await asyncio.sleep(LOST_GRACE)
        if self._connection is not None:
            self._connection.disconnect(asyncssh.DISC_BY_APPLICATION, "the sandbox is gone")

    # --- sessions -----------------------------------------------------------------------------------------------------

    def environment(self) -> dict[str, str]:
        """As sshd sets it."""
        peer, peer_port, local, local_port = self._addresses
        env = {
            "SSH_CLIENT": f"{peer} {peer_port} {local_port}",
            "SSH_CONNECTION": f"{peer} {peer_port} {local} {local_port}",
        }
        if self._agent_path:
            env["SSH_AUTH_SOCK"] = self._agent_path
        return env

    def session_requested(self) -> Any:
        """session."""
        return ShellSession(self, self._work)

    # --- forwards: never True, which would have asyncssh act on this host ---------------------------------------------

    def connection_requested(self, dest_host: str, dest_port: int, orig_host: str, orig_port: int) -> Any:
        """direct-tcpip."""
        self._check_permitted(dest_host, dest_port)
        return self._forwards.to_tcp(dest_host, dest_port) if self._forwards is not None else False

    def unix_connection_requested(self, dest_path: str) -> Any:
        """direct-streamlocal."""
        self._check_permitted(dest_path, UNIX)
        return self._forwards.to_unix(dest_path) if self._forwards is not None else False

    async def server_requested(self, listen_host: str, listen_port: int) -> Any:
        """tcpip-forward."""
        if not self._permits(PERMIT_LISTEN, listen_host, listen_port) or self._forwards is None:
            return False
        return await self._forwards.on_tcp(listen_host, listen_port) or False

    async def unix_server_requested(self, listen_path: str) -> Any:
        """streamlocal-forward."""
        if not self._permits(PERMIT_LISTEN, listen_path, UNIX) or self._forwards is None:
            return False
        return await self._forwards.on_unix(listen_path) or False

    def _check_permitted(self, where: str, port: int) -> None:
        if not self._permits(PERMIT_OPEN, where, port):
            raise asyncssh.ChannelOpenError(OPEN_ADMINISTRATIVELY_PROHIBITED, "the key does not permit that forward")

    def _permits(self, option: str, where: str, port: int) -> bool:
        permitted = self._connection is not None and self._connection.permits(option, where, port)
        if not permitted:
            log.info("ssh %s: the key does not permit a forward: %s", self.label, printable(where, 100))
        return permitted

    async def agent_requested(self) -> bool:
        """auth-agent-req: one socket for all sessions of the connection."""
        if self._forwards is None:
            return False
        async with self._agent_lock:
            self._agent_path = self._agent_path or await self._forwards.on_agent()
        return bool(self._agent_path)

    async def x11_requested(self, session: Any, protocol: bytes, cookie: bytes, screen: int) -> str:
        """x11-req: a display for each session."""
        if self._forwards is None or not isinstance(session, ShellSession):
            return ""
        found = await open_display(self.target, self._forwards, protocol, cookie, screen)
        if found is None:
            return ""
        display, listener = found
        session.end_with(listener.close)
        return display


class LocalServer(Server):
    """A client on connect.sock: the peer's user was checked there, the sandbox named in the request."""

    def __init__(self, target: Target) -> None:
        super().__init__(("127.0.0.1", 0), ("127.0.0.1", 22))
        self._request = target

    def identify(self, username: str) -> Target:
        """The user name says who to be inside."""
        if username in ("", OWN_USER):
            return self._request
        if USER.fullmatch(username) is None:
            raise GatewayError(f"{printable(username, 64)!r} is no user name", kind=ErrorKind.USAGE)
        return self._request.as_user(username)

    def begin_auth(self, username: str) -> bool:
        """No further authentication is needed."""
        try:
            target = self.identify(username)
        except GatewayError as exc:
            raise asyncssh.IllegalUserName(exc.message) from exc
        self.let_in(target)
        return False


async def serve(connection_socket: Any, options: asyncssh.SSHServerConnectionOptions, server: Server, early: bytes = b"") -> None:
    """Serve one connected Unix socket until the connection is gone. `early`: bytes already read from it."""
    loop = asyncio.get_running_loop()
    try:
        _, connection = await loop.create_unix_connection(lambda: Connection(loop, options, server), sock=connection_socket)
        if early:
            connection.data_received(early)
        await asyncio.shield(server.closed)
    finally:
        await server.aclose()

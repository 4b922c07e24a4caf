"""The SSH front end as the daemon sees it. asyncssh costs a quarter of a second: it is loaded on a thread, at the first ssh."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from gatewayd.config import Caller
from gatewayd.errors import GatewayError
from gatewayd.frontends.peer import CancelOnHangup
from gatewayd.frontends.ssh.hostkey import private_host_key
from gatewayd.frontends.ssh.target import Target

if TYPE_CHECKING:
    from asyncssh.connection import SSHServerConnectionOptions

    from gatewayd.config import Settings, SshSettings
    from gatewayd.frontends.peer import Client
    from gatewayd.frontends.ssh.target import Ways
    from gatewayd.frontends.ssh.tcp import TcpListener
    from gatewayd.sandbox.accounts import Account, Accounts
    from gatewayd.sandbox.boxes import Notice

log = logging.getLogger(__name__)


class Library(NamedTuple):
    """What is there once asyncssh is loaded."""

    server: Any  # the module gatewayd.frontends.ssh.server
    options: SSHServerConnectionOptions


def _load(state_dir: Path) -> Library:
    """Runs on a thread. Raises GatewayError (config)."""
    key = private_host_key(state_dir)
    from gatewayd.frontends.ssh import server

    return Library(server, server.options(key))


class SshFront:
    """ssh on connect.sock, and over TCP when it is configured."""

    def __init__(self, settings: Settings, accounts: Accounts, ways: Ways) -> None:
        self._settings = settings
        self._accounts = accounts
        self._ways = ways
        self._library: asyncio.Future[Library] | None = None  # loading or loaded
        self._listener: TcpListener | None = None  # set by start, when [ssh] says so

    async def start(self) -> None:
        """Listen over TCP, if the configuration says so. What is wrong with it is logged: everything else works without."""
        config = self._settings.current().ssh
        if not config.host:
            return
        try:
            await self._listen(config)
        except GatewayError as exc:
            log.warning("%s%s", exc.message, f" ({exc.hint})" if exc.hint else "")

    async def _listen(self, config: SshSettings) -> None:
        _, options = await self._loaded()
        from gatewayd.frontends.ssh.keys import Keys
        from gatewayd.frontends.ssh.tcp import TcpListener

        def identify(sandbox: str, user: str) -> Target:
            current = self._settings.current()
            account = self._accounts.select(Caller(profile=config.profile))
            return Target(self._ways, account, sandbox, user, wake=current.start_on_connect)

        keys = Keys(config.authorized_keys, config.trusted_user_ca_keys)
        listener = TcpListener(config.host, config.port, keys, options, identify)
        await listener.start()
        self._listener = listener

    async def serve(self, client: Client, account: Account, sandbox: str, *, wake: bool, notice: Notice) -> None:
        """Answer a request of connect.sock, then speak SSH until the connection is gone.

        Raises:
            GatewayError: nothing was answered yet.
        """
        self._load()  # while the sandbox is being reached
        target = Target(self._ways, account, sandbox, "", wake=wake)
        with CancelOnHangup(client.sock):
            await self._ways.pool.warm(account, sandbox, notice, wake=wake)
            server, options = await self._loaded()
        await client.send({"ok": {}})
        await server.serve(client.sock, options, server.LocalServer(target), client.take_early())

    async def _loaded(self) -> Library:
        """The modules that need asyncssh, and its options. Raises GatewayError (config)."""
        library = self._load()
        try:
            return await asyncio.shield(library)
        except GatewayError:
            if self._library is library:
                self._library = None  # what is wrong may be put right
            raise

    def _load(self) -> asyncio.Future[Library]:
        if self._library is None:
            loop = asyncio.get_running_loop()
            self._library = loop.run_in_executor(None, _load, self._settings.current().state_dir)
            self._library.add_done_callback(lambda library: library.cancelled() or library.exception())  # somebody has seen it
        return self._library

    async def aclose(self) -> None:
        """Stop listening over TCP; idempotent. Connections on connect.sock end with their tasks."""
        if self._listener is not None:
            await self._listener.aclose()

"""connect.sock: one request line, reply lines, then the stream that was asked for (`gatewayd.api`)."""

from __future__ import annotations

import asyncio
import functools
import logging
import socket

from gatewayd import api
from gatewayd.api import ErrorKind
from gatewayd.config import Caller, Settings
from gatewayd.errors import DialRefused, GatewayError, printable
from gatewayd.frontends.execution import serve_exec
from gatewayd.frontends.fields import Fields
from gatewayd.frontends.guest import may_wake, serve_guest
from gatewayd.frontends.peer import CancelOnHangup, Client, HungUp, peer_is_self
from gatewayd.frontends.ssh.front import SshFront
from gatewayd.frontends.suggest import hint_nearest
from gatewayd.frontends.tcp import Forwards
from gatewayd.relay import ByteStream, relay
from gatewayd.sandbox import sshd
from gatewayd.sandbox.accounts import Account, Accounts
from gatewayd.sandbox.boxes import Directory, Notice
from gatewayd.sandbox.guest_client import Guests
from gatewayd.sandbox.pool import Pool
from gatewayd.tasks import TaskOwner

log = logging.getLogger(__name__)

CLIENTS_MAX = 4096  # connections at a time
REPLY_DEADLINE = 10.0  # seconds a client has to take a reply line


class ConnectServer:
    """Serves connect.sock from `start` to `aclose`."""

    def __init__(
        self,
        settings: Settings,
        accounts: Accounts,
        directory: Directory,
        pool: Pool,
        forwards: Forwards,
        guests: Guests,
        ssh: SshFront,
    ) -> None:
        self._settings = settings
        self._accounts = accounts
        self._directory = directory
        self._pool = pool
        self._forwards = forwards
        self._guests = guests
        self._ssh = ssh
        self._tasks = TaskOwner("connect")

    def start(self, listener: socket.socket) -> None:
        """Accept on a listening Unix socket, which stays the caller's."""
        listener.setblocking(False)
        self._tasks.start(self._accept(listener), "accept")

    async def aclose(self) -> None:
        """Stop accepting and end every connection; idempotent."""
        await self._tasks.aclose()

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                sock, _ = await loop.sock_accept(listener)
            except OSError as exc:
                log.warning("cannot accept on connect.sock: %s", exc.strerror)
                await asyncio.sleep(0.1)
                continue
            if not peer_is_self(sock) or len(self._tasks) > CLIENTS_MAX:
                log.warning("refused a connection to connect.sock")
                sock.close()
                continue
            sock.setblocking(False)
            self._tasks.start(self._serve(sock), "client")

    async def _serve(self, sock: socket.socket) -> None:
        """One connection, from the request line to its end."""
        client = Client(sock)
        try:
            try:
                async with asyncio.timeout(api.LINE_DEADLINE):
                    line = await client.read_line()
            except TimeoutError:
                raise GatewayError(f"no request line within {api.LINE_DEADLINE:g} s", kind=ErrorKind.USAGE) from None
            try:
                request = Fields(api.decode_line(line))
            except ValueError as exc:
                raise GatewayError(f"the request line is {exc}", kind=ErrorKind.USAGE) from exc
            await self._dispatch(client, request)
        except GatewayError as exc:
            await self._tell(client, exc)
        except (OSError, EOFError, HungUp):
            pass  # nobody is left to be told
        except asyncio.CancelledError:
            if not client.accepted:
                client.post(api.error_body(ErrorKind.UNAVAILABLE, "the daemon is stopping"))
            raise
        except Exception:
            log.exception("a request on connect.sock failed")
            await self._tell(client, GatewayError("internal error, see the daemon's log", kind=ErrorKind.INTERNAL))
        finally:
            client.close()

    async def _tell(self, client: Client, exc: GatewayError) -> None:
        try:
            async with asyncio.timeout(REPLY_DEADLINE):
                await client.send(api.error_body(exc.kind, exc.message, exc.hint))
        except (OSError, TimeoutError, ValueError):
            pass

    async def _dispatch(self, client: Client, request: Fields) -> None:
        op = request.text("op")
        sandbox = request.text("sandbox")
        if not sandbox:
            raise GatewayError("sandbox is empty", kind=ErrorKind.USAGE)
        account = self._accounts.select(caller_of(request))
        try:
            await self._perform(op, client, account, sandbox, request)
        except GatewayError as exc:
            await hint_nearest(exc, account, sandbox)
            raise

    async def _perform(self, op: str, client: Client, account: Account, sandbox: str, request: Fields) -> None:
        wake = may_wake(request, self._settings.current().start_on_connect)
        if op == api.OP_CONNECT:
            port = request.port("port")
            with CancelOnHangup(client.sock):
                remote: ByteStream = await self._pool.dial(account, sandbox, port, _notices(client), wake=wake)
            await self._join(client, remote, sandbox, port)
        elif op == api.OP_SSH and not request.flag(api.FIELD_DIRECT):
            await self._ssh.serve(client, account, sandbox, wake=wake, notice=_notices(client))
        elif op == api.OP_SSH:
            with CancelOnHangup(client.sock):
                remote = await self._dial_sshd(account, sandbox, client, wake)
            await self._join(client, remote, sandbox, sshd.PORT)
        elif op == api.OP_FORWARD:
            await self._forward(client, account, sandbox, request, wake)
        elif op == api.OP_GUEST:
            await serve_guest(client, account, self._guests, sandbox, request, _notices(client), wake=wake)
        elif op == api.OP_EXEC:
            check = None if wake else functools.partial(self._pool.check, account, sandbox)
            await serve_exec(client, account, self._directory, sandbox, request, _notices(client), check)
        else:
            hint = "connect, ssh, forward, guest or exec"
            raise GatewayError(f"unknown op {printable(op, 32)!r}", kind=ErrorKind.USAGE, hint=hint)

    async def _dial_sshd(self, account: Account, sandbox: str, client: Client, wake: bool) -> ByteStream:
        """Port 22; sshd is started when it does not listen, so that ssh works after a stop and start."""
        notice = _notices(client)
        try:
            return await self._pool.dial(account, sandbox, sshd.PORT, notice, wake=wake)
        except DialRefused:
            notice(f"starting sshd in sandbox {sandbox!r}")
        await sshd.ensure_running(account, self._directory, sandbox)
        return await self._pool.dial(account, sandbox, sshd.PORT, notice)

    async def _join(self, client: Client, remote: ByteStream, sandbox: str, port: int) -> None:
        """Reply and relay until both directions have ended."""
        try:
            await client.send({"ok": {}})
        except BaseException:
            remote.abort()
            raise
        log.info("connect %s:%d opened", sandbox, port)
        result = await relay(client.stream(), remote)
        because = "" if result.error is None else f": {result.error}"
        log.info("connect %s:%d closed, %d bytes sent, %d bytes received%s", sandbox, port, result.a_to_b, result.b_to_a, because)

    async def _forward(self, client: Client, account: Account, sandbox: str, request: Fields, wake: bool) -> None:
        """A forward that lives as long as the client's connection."""
        resumable = request.flag("resumable")
        remote_port = request.port("remote_port")
        local_port = request.port("local_port", 0, least=0)
        address = request.text("address", "127.0.0.1")

        def report(event: str, peer: str, message: str) -> None:
            client.post({"event": event, "peer": peer, "message": message})

        with CancelOnHangup(client.sock):
            if resumable:
                await self._guests.ready(account, sandbox, _notices(client), wake=wake)
            await self._pool.warm(account, sandbox, _notices(client), wake=wake)
        forward = await self._forwards.open(
            account, sandbox, remote_port, address, local_port, report, resumable=resumable, wake=wake
        )
        try:
            await client.send({"ok": {"address": forward.address, "port": forward.port}})
            while await client.read():
                pass  # a client has nothing to say here; its end is the end of the forward
        finally:
            await self._forwards.close(forward)


def caller_of(request: Fields) -> Caller:
    """Profile and credentials of a request line."""
    return Caller(
        profile=request.text(api.FIELD_PROFILE, ""),
        endpoint=request.text(api.FIELD_ENDPOINT, ""),
        api_key=request.text(api.FIELD_API_KEY, ""),
        workspace=request.text(api.FIELD_WORKSPACE, ""),
    )


def _notices(client: Client) -> Notice:
    """Sends what takes long to the client while its request is being worked on."""

    def notice(text: str) -> None:
        client.post({"notice": text})

    return notice

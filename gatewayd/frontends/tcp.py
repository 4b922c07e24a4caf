"""Forwards: a listening TCP port on this machine's loopback, each connection to a port inside a sandbox."""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import itertools
import logging
import socket
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from gatewayd.api import ErrorKind
from gatewayd.errors import GatewayError
from gatewayd.frontends.peer import CancelOnHangup, HungUp
from gatewayd.frontends.portowner import port_owner
from gatewayd.relay import ByteStream, SocketStream, relay
from gatewayd.sandbox.accounts import Account
from gatewayd.sandbox.guest_client import Guests
from gatewayd.sandbox.pool import Pool
from gatewayd.tasks import TaskOwner

if TYPE_CHECKING:
    from gatewayd.api import ForwardStatus

log = logging.getLogger(__name__)

CONNECTIONS_MAX = 1024  # of one forward; more wait in the kernel's backlog
LISTEN_BACKLOG = 256

# Called for every connection: "opened", "closed" or "failed", the peer's address, and a message or "".
Report = Callable[[str, str, str], None]
Dial = Callable[[], Awaitable[ByteStream]]


class Forwards:
    """The forwards of this daemon."""

    def __init__(self, pool: Pool, guests: Guests) -> None:
        self._pool = pool
        self._guests = guests
        self._ids = itertools.count(1)
        self._open: dict[int, Forward] = {}

    async def open(
        self,
        account: Account,
        sandbox: str,
        remote_port: int,
        address: str,
        port: int,
        report: Report,
        *,
        resumable: bool = False,
        wake: bool = True,
    ) -> Forward:
        """Listen.

        Args:
            resumable: connections are made by the sandbox's guest, and go on when the link is lost and found again.
            wake: whether a connection starts a stopped sandbox.

        Raises:
            GatewayError: kind port_in_use, usage or failed.
        """

        async def dial() -> ByteStream:
            if resumable:
                return await self._guests.connect_tcp(account, sandbox, "localhost", remote_port, wake=wake)
            return await self._pool.dial(account, sandbox, remote_port, wake=wake)

        forward = Forward(dial, sandbox, remote_port, listen(address, port), report)
        forward.id = next(self._ids)
        self._open[forward.id] = forward
        log.info("forward %d: %s:%d → %s:%d", forward.id, forward.address, forward.port, sandbox, remote_port)
        return forward

    async def close(self, forward: Forward) -> None:
        """Stop listening and end its connections; idempotent."""
        if self._open.pop(forward.id, None) is not None:
            log.info("forward %d: closed", forward.id)
        await forward.aclose()

    def status(self) -> list[ForwardStatus]:
        """All that are open."""
        return [forward.status() for forward in self._open.values()]

    async def aclose(self) -> None:
        """Close all; idempotent."""
        for forward in list(self._open.values()):
            await self.close(forward)


class Forward:
    """One listening port."""

    def __init__(self, dial: Dial, sandbox: str, remote_port: int, listener: socket.socket, report: Report) -> None:
        self.id = 0  # given by Forwards
        self.address, self.port = listener.getsockname()[:2]
        self._dial = dial  # a connection to the remote port
        self._sandbox = sandbox
        self._remote_port = remote_port
        self._listener = listener
        self._report = report
        self._connections = 0  # open or being connected
        self._free = asyncio.Event()  # set while another connection may be accepted
        self._free.set()
        self._tasks = TaskOwner(f"forward {sandbox}:{remote_port}")
        self._tasks.start(self._accept(), "accept")

    def status(self) -> ForwardStatus:
        """For GET /v1/status."""
        return {
            "id": self.id,
            "sandbox": self._sandbox,
            "address": self.address,
            "port": self.port,
            "remote_port": self._remote_port,
            "connections": self._connections,
        }

    async def aclose(self) -> None:
        """Stop listening, end the connections; idempotent."""
        try:
            await self._tasks.aclose()
        finally:
            self._listener.close()

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._free.wait()
            try:
                sock, peer = await loop.sock_accept(self._listener)
            except OSError as exc:  # out of descriptors, or the peer gave up in the backlog
                log.warning("forward %d: cannot accept: %s", self.id, exc.strerror)
                await asyncio.sleep(0.1)
                continue
            self._connections += 1
            if self._connections >= CONNECTIONS_MAX:
                self._free.clear()
            self._tasks.start(self._serve(sock, f"{peer[0]}:{peer[1]}"), f"connection {peer[1]}")

    async def _serve(self, sock: socket.socket, peer: str) -> None:
        local = SocketStream.from_socket(sock)
        done = False
        try:
            with CancelOnHangup(sock):
                remote = await self._dial()
            log.info("forward %d: %s opened", self.id, peer)
            self._report("opened", peer, "")
            result = await relay(local, remote)
            done = True
            message = f"{result.a_to_b} bytes sent, {result.b_to_a} bytes received"
            if result.error is not None:
                message += f": {result.error}"
            log.info("forward %d: %s closed, %s", self.id, peer, message)
            self._report("closed", peer, message)
        except HungUp:
            log.info("forward %d: %s gave up", self.id, peer)
        except GatewayError as exc:
            log.info("forward %d: %s failed: %s", self.id, peer, exc.message)
            self._report("failed", peer, exc.message)
        finally:
            if not done:
                local.abort()  # RST: the client sees that this was no orderly end
            self._connections -= 1
            self._free.set()


def listen(address: str, port: int) -> socket.socket:
    """A non-blocking listening socket on a loopback address. Raises GatewayError."""
    if address == "localhost":
        address = "127.0.0.1"
    try:
        ip = ipaddress.ip_address(address)
    except ValueError as exc:
        raise GatewayError(f"{address[:64]!r} is no address to listen on", kind=ErrorKind.USAGE) from exc
    if not ip.is_loopback:
        raise GatewayError(f"cannot listen on {address}: forwards listen on this machine's loopback only", kind=ErrorKind.USAGE)
    sock = socket.socket(socket.AF_INET6 if ip.version == 6 else socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections in TIME_WAIT do not hold the port
        sock.bind((str(ip), port))
        sock.listen(LISTEN_BACKLOG)
    except OSError as exc:
        sock.close()
        raise _cannot_listen(exc, str(ip), port) from exc
    return sock


def _cannot_listen(exc: OSError, address: str, port: int) -> GatewayError:
    what = f"cannot listen on {address}:{port}"
    if exc.errno == errno.EADDRINUSE:
        owner = port_owner(port)
        return GatewayError(
            f"{what}: the port is in use" + (f" by {owner}" if owner else ""),
            kind=ErrorKind.PORT_IN_USE,
            hint="choose another local port, or 0 for any that is free",
        )
    if exc.errno == errno.EACCES:
        return GatewayError(
            f"{what}: permission denied", kind=ErrorKind.FAILED, hint="ports below 1024 need root: choose a higher one"
        )
    return GatewayError(f"{what}: {exc.strerror}", kind=ErrorKind.FAILED)

"""A sandbox's way out, on the service's side: every connection it makes and every name it looks up comes through here."""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
import struct
from collections.abc import Callable
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address

from gatewayd.errors import GatewayError
from gatewayd.local.egress import nametable
from gatewayd.local.egress.addresses import Address, Reach
from gatewayd.local.egress.hello import Endless, Hello, Plain, classify
from gatewayd.local.egress.journal import Journal
from gatewayd.local.egress.nameserver import Nameserver
from gatewayd.local.egress.outward import Refused, dial
from gatewayd.local.egress.policy import Policy, same_host
from gatewayd.local.egress.requests import Requests
from gatewayd.local.egress.resolver import Lookup, Resolver
from gatewayd.local.egress.streams import Replayed, TlsStream
from gatewayd.relay import ByteStream, SocketStream, relay
from gatewayd.tasks import TaskOwner

log = logging.getLogger(__name__)

MAX_CONNECTIONS = 1024  # of one sandbox at once; more wait in the kernel's queue
_HELLO_DEADLINE = 15.0  # seconds from the first byte of a client to where it can be said what it speaks
_TLS_DEADLINE = 15.0  # seconds for a handshake
_RETRY = 1.0  # seconds without accepting after this process ran out of descriptors
_DNS = 53
_SO_ORIGINAL_DST = 80  # linux/netfilter_ipv4.h and, the same, netfilter_ipv6/ip6_tables.h


@dataclass(frozen=True)
class World:
    """What the gates of all sandboxes share."""

    reach: Reach
    lookup: Lookup
    leaf: Callable[[str], ssl.SSLContext]  # the server's side of a connection in the name of a host
    upstream: Callable[[], ssl.SSLContext]  # the client's side: checks certificates


@dataclass(eq=False)
class _Connection:
    """One that is open."""

    host: str  # canonical name, or address
    port: int
    client: ByteStream
    address: str | None = None  # what was dialled


class Gate:
    """The way out of one running sandbox. A `sandbox.Closable`."""

    busy = False  # what keeps a sandbox awake is the command that makes connections

    def __init__(self, name: str, socks: list[socket.socket], world: World, policy: Policy, journal: Journal) -> None:
        """Takes the sockets (`runtime.base.Box.gates`) over."""
        self._name = name
        self._world = world
        self.policy = policy
        self._journal = journal
        self._names = nametable.NameTable()
        self._resolver = Resolver(world.lookup)
        self._nameserver = Nameserver(self._names, self._resolver, world.reach, lambda: self.policy, journal)
        self._tasks = TaskOwner("egress")  # one for each connection
        self._open: set[_Connection] = set()
        self._loop = asyncio.get_running_loop()
        self._listeners = [sock for sock in socks if sock.type == socket.SOCK_STREAM]
        self._waiting: set[socket.socket] = set()  # listeners not listened on now
        self._closed = False
        for sock in socks:
            if sock.type == socket.SOCK_DGRAM:
                self._nameserver.listen(sock)
        for sock in self._listeners:
            self._loop.add_reader(sock.fileno(), self._accept, sock)

    def change(self, policy: Policy) -> None:
        """From now on this one counts; connections that it denies end."""
        self.policy = policy
        for connection in list(self._open):
            if why := policy.denies(connection.host, connection.address):
                self._journal.note("tcp", connection.host, connection.port, "deny", f"{why}, since now")
                connection.client.abort()

    async def aclose(self) -> None:
        """End everything; idempotent."""
        if self._closed:
            return
        self._closed = True
        for sock in self._listeners:
            self._loop.remove_reader(sock.fileno())
            sock.close()
        await self._nameserver.aclose()
        await self._tasks.aclose()
        await self._resolver.aclose()

    # -- one connection

    def _accept(self, listener: socket.socket) -> None:
        """One a pass: a sandbox that connects all the time must not keep the loop to itself."""
        if len(self._tasks) >= MAX_CONNECTIONS:
            self._pause(listener)
            return
        try:
            sock, _ = listener.accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):
            return
        except OSError:
            self._pause(listener)
            return
        sock.setblocking(False)
        self._tasks.start(self._serve(sock), "connection")

    def _pause(self, listener: socket.socket) -> None:
        self._loop.remove_reader(listener.fileno())
        self._loop.call_later(_RETRY, self._resume, listener)

    def _resume(self, listener: socket.socket) -> None:
        if not self._closed:
            self._loop.add_reader(listener.fileno(), self._accept, listener)

    async def _serve(self, sock: socket.socket) -> None:
        client = SocketStream.from_socket(sock)
        connection = None
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            address, port = _destination(sock)
            if port == _DNS:
                await self._nameserver.converse(client)
                return
            connection = _Connection(self._host(address, port), port, client)
            self._open.add(connection)
            await self._connect(connection)
        except Refused as exc:
            host = connection.host if connection is not None else exc.args[1]
            self._journal.note("tcp", host, port, "deny", str(exc.args[0]))
        except (OSError, GatewayError) as exc:
            if connection is not None:
                self._journal.note("tcp", connection.host, connection.port, "allow", f"failed: {_said(exc)}")
        finally:
            if connection is not None:
                self._open.discard(connection)
            client.abort()  # nothing, after an orderly end

    def _host(self, address: Address, port: int) -> str:
        """What a connection is for. Raises Refused."""
        if nametable.stands_for_a_name(address):
            host = self._names.name(address)
            if host is None:
                raise Refused("no name was given that address", str(address))
        else:
            host = str(address)
        return host

    async def _connect(self, connection: _Connection) -> None:
        """Judge, dial, look at what is spoken if that matters, and pass it on. Raises Refused, OSError, GatewayError."""
        host, client = connection.host, connection.client
        if why := self.policy.denies(host):
            raise Refused(why)
        sock, connection.address = await dial(host, connection.port, self._resolver, self._world.reach, lambda: self.policy)
        server: ByteStream = SocketStream.from_socket(sock)
        try:
            intercepts = self.policy.intercepts(host)
            if intercepts or self.policy.restricts:
                spoken, early, late = await _overture(client, server)
                client, server = Replayed(client, early), Replayed(server, late)
                if isinstance(spoken, Endless):
                    raise Refused("a TLS ClientHello that is too long, or in too many pieces")
                if isinstance(spoken, Hello):
                    _check_name(spoken, host)
                    if intercepts:
                        await self._intercept(connection, client, server)
                        return
                elif spoken.http and intercepts:
                    await self._pass_requests(connection, client, server, encrypted=False)
                    return
            went = await relay(client, server)
            failed = f"broken off: {_said(went.error)}" if went.error is not None else ""
            self._journal.note("tcp", host, connection.port, "allow", failed, sent=went.a_to_b, received=went.b_to_a)
        finally:
            server.abort()

    async def _intercept(self, connection: _Connection, client: Replayed, server: Replayed) -> None:
        """TLS on both sides: the server's certificate first, so that a client is promised nothing that is not so."""
        host = connection.host
        outer = TlsStream(server, self._world.upstream(), server=False, name=host)
        try:
            async with asyncio.timeout(_TLS_DEADLINE):
                await outer.handshake()
        except (ssl.SSLError, TimeoutError) as exc:
            why = exc.verify_message if isinstance(exc, ssl.SSLCertVerificationError) else _said(exc)
            self._journal.note("tls", host, connection.port, "deny", f"the server's TLS: {why}")
            return
        inner = TlsStream(client, self._world.leaf(host), server=True)
        try:
            async with asyncio.timeout(_TLS_DEADLINE):
                await inner.handshake()
        except (ssl.SSLError, TimeoutError) as exc:
            self._journal.note("tls", host, connection.port, "deny", f"the sandbox's TLS: {_said(exc)}")
            return
        await self._pass_requests(connection, inner, outer, encrypted=True)

    async def _pass_requests(self, connection: _Connection, client: ByteStream, server: ByteStream, *, encrypted: bool) -> None:
        port = connection.port
        requests = Requests(connection.host, port, client, server, lambda: self.policy, self._journal, encrypted=encrypted)
        await requests.run()
        await server.aclose()
        await client.aclose()


def _destination(sock: socket.socket) -> tuple[Address, int]:
    """Where a connection was going before it was led here. Raises OSError."""
    if sock.family == socket.AF_INET:
        port, packed = struct.unpack_from(">2xH4s", sock.getsockopt(socket.IPPROTO_IP, _SO_ORIGINAL_DST, 16))
        return IPv4Address(packed), port
    port, packed = struct.unpack_from(">2xH4x16s", sock.getsockopt(socket.IPPROTO_IPV6, _SO_ORIGINAL_DST, 28))
    return IPv6Address(packed), port


def _check_name(hello: Hello, host: str) -> None:
    """The name in a ClientHello must be the one that the connection is for. Raises Refused."""
    try:
        ip_address(host)
    except ValueError:
        if hello.name is None:
            raise Refused("TLS without a server name") from None
    if hello.name is not None and not same_host(hello.name, host):
        raise Refused("the server name in TLS is not the host of this connection")


async def _overture(client: ByteStream, server: ByteStream) -> tuple[Hello | Plain | Endless, bytes, bytes]:
    """What a client begins with, unless the server speaks first; and what was read of both by then."""
    owner = TaskOwner("overture")
    try:
        theirs = owner.start(_read(client), "client")
        ours = owner.start(_read(server), "server")
        await asyncio.wait({theirs, ours}, return_when=asyncio.FIRST_COMPLETED)
        if not theirs.done():
            theirs.cancel()
        ours.cancel()
        await asyncio.wait({theirs, ours})
        early, late = (b"" if task.cancelled() else task.result() for task in (theirs, ours))
    finally:
        await owner.aclose()
    for data in (early, late):
        if isinstance(data, Exception):
            raise data
    if not early:
        return Plain(http=False), b"", late
    async with asyncio.timeout(_HELLO_DEADLINE):
        while (spoken := classify(early)) is None:
            data = await client.read()
            if not data:
                return Plain(http=False), early, late
            early += data
    return spoken, early, late


async def _read(stream: ByteStream) -> bytes | Exception:
    try:
        return await stream.read()
    except (OSError, GatewayError) as exc:
        return exc


def _said(exc: BaseException | None) -> str:
    """A cause without anything that passed through the connection."""
    if isinstance(exc, ssl.SSLError):
        return (exc.reason or "TLS").replace("_", " ").lower()
    if isinstance(exc, OSError) and exc.strerror:
        return exc.strerror
    return str(exc) or type(exc).__name__

"""The DNS server of one sandbox: names that may be reached get addresses of their own, all others none."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable
from typing import Any

from gatewayd.local.egress import dnswire, nametable
from gatewayd.local.egress.addresses import Reach
from gatewayd.local.egress.hostnames import canonical
from gatewayd.local.egress.journal import Journal
from gatewayd.local.egress.policy import Policy
from gatewayd.local.egress.resolver import NameUnknown, Resolver
from gatewayd.relay import ByteStream
from gatewayd.tasks import TaskOwner

_TTL = 60  # seconds a program may keep an answer
_MAX_QUERIES = 64  # being answered at once; more are dropped, and asked again by whoever asked
_PER_TURN = 32  # datagrams taken at a time
_IDLE = 30.0  # seconds a TCP connection may be silent


class Nameserver:
    """Answers queries. `policy` gives the present one."""

    def __init__(
        self, names: nametable.NameTable, resolver: Resolver, reach: Reach, policy: Callable[[], Policy], journal: Journal
    ) -> None:
        self._names = names
        self._resolver = resolver
        self._reach = reach
        self._policy = policy
        self._journal = journal
        self._tasks = TaskOwner("dns")  # queries being answered
        self._socks: list[socket.socket] = []
        self._loop = asyncio.get_running_loop()

    def listen(self, sock: socket.socket) -> None:
        """Answer what comes in on a UDP socket, which is taken over."""
        self._socks.append(sock)
        self._loop.add_reader(sock.fileno(), self._datagrams, sock)

    def _datagrams(self, sock: socket.socket) -> None:
        for _ in range(_PER_TURN):
            try:
                data, sender = sock.recvfrom(dnswire.MAX_MESSAGE + 1)
            except OSError:
                return
            if len(self._tasks) < _MAX_QUERIES:
                self._tasks.start(self._reply(sock, data, sender), "query")

    async def _reply(self, sock: socket.socket, data: bytes, sender: Any) -> None:
        answered = await self.answer(data)
        if answered is not None and sock.fileno() >= 0:
            with contextlib.suppress(OSError):  # whoever asked has gone, or the buffer is full: it is asked again
                sock.sendto(answered, sender)

    async def converse(self, stream: ByteStream) -> None:
        """Answer the queries of one TCP connection (RFC 1035 section 4.2.2) until it ends or is silent. Raises OSError."""
        pending = b""
        while True:
            while len(pending) < 2 or len(pending) < 2 + int.from_bytes(pending[:2], "big"):
                try:
                    async with asyncio.timeout(_IDLE):
                        data = await stream.read(dnswire.MAX_MESSAGE)
                except TimeoutError:
                    return
                if not data:
                    return
                pending += data
            size = int.from_bytes(pending[:2], "big")
            answered = await self.answer(pending[2 : 2 + size])
            pending = pending[2 + size :]
            if answered is None:
                return
            await stream.write(len(answered).to_bytes(2, "big") + answered)

    async def answer(self, data: bytes) -> bytes | None:
        """The answer to one query; None: it gets none."""
        query = dnswire.parse(data)
        if not isinstance(query, dnswire.Query):
            return query
        try:
            name = canonical(query.name)
        except ValueError:
            return dnswire.answer(query, dnswire.NXDOMAIN)
        if query.kind == dnswire.PTR or name.endswith(".arpa"):
            return dnswire.answer(query, dnswire.NXDOMAIN)
        if why := self._policy().denies(name):
            self._journal.note("dns", name, None, "deny", why)
            return dnswire.answer(query, dnswire.REFUSED)
        try:
            addresses = await self._resolver.addresses(name)
        except NameUnknown:
            return dnswire.answer(query, dnswire.NXDOMAIN)
        except OSError as exc:
            self._journal.note("dns", name, None, "allow", f"no answer: {exc.strerror or exc}")
            return dnswire.answer(query, dnswire.SERVFAIL)
        reasons = [self._reach.refusal(address) for address in addresses]
        if all(reasons):
            self._journal.note("dns", name, None, "deny", f"{addresses[0]}: {reasons[0]}")
            return dnswire.answer(query, dnswire.REFUSED)
        if query.kind not in (dnswire.A, dnswire.AAAA):
            return dnswire.answer(query, dnswire.NOERROR)  # there is such a name, and nothing of that type is told
        number = self._names.number(name)
        address = nametable.ipv4(number) if query.kind == dnswire.A else nametable.ipv6(number)
        return dnswire.answer(query, dnswire.NOERROR, address.packed, _TTL)

    async def aclose(self) -> None:
        """Idempotent."""
        for sock in self._socks:
            self._loop.remove_reader(sock.fileno())
            sock.close()
        self._socks.clear()
        await self._tasks.aclose()

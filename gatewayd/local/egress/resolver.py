"""Names looked up as this machine does it (getaddrinfo), for sandboxes: with a deadline, few at a time, kept for a moment."""

from __future__ import annotations

import asyncio
import socket
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from ipaddress import ip_address

from gatewayd.local.egress.addresses import Address

_DEADLINE = 10.0  # seconds for one name
_KEEP = 10.0  # seconds an answer is used again: a query and the connection that follows it ask twice
_MAX_KEPT = 4096  # names
_MAX_LOOKUPS = 3  # at once, of one sandbox: fewer than uvloop has threads for, so that others find one
_MAX_ADDRESSES = 16  # of a name that are looked at

Lookup = Callable[[str], Awaitable[list[Address]]]  # raises NameUnknown, OSError


class NameUnknown(Exception):
    """There is no such name."""


async def system_lookup(name: str) -> list[Address]:
    """The addresses of a name as this machine sees it. Raises NameUnknown, OSError."""
    asked = name + "." if "." in name else name  # a final dot: without this machine's search domains
    try:
        found = await asyncio.get_running_loop().getaddrinfo(asked, None, type=socket.SOCK_STREAM)
    except socket.gaierror as exc:
        if exc.errno in (socket.EAI_NONAME, getattr(socket, "EAI_NODATA", socket.EAI_NONAME)):
            raise NameUnknown(name) from None
        raise
    return [ip_address(str(entry[4][0]).partition("%")[0]) for entry in found]


class Resolver:
    """The lookups of one sandbox."""

    def __init__(self, lookup: Lookup = system_lookup) -> None:
        self._lookup = lookup
        self._slots = asyncio.Semaphore(_MAX_LOOKUPS)
        self._kept: OrderedDict[str, tuple[float, list[Address]]] = OrderedDict()  # name → (until, addresses), oldest first

    async def addresses(self, name: str) -> list[Address]:
        """In the order in which they are to be tried, at least one. Raises NameUnknown, OSError."""
        kept = self._kept.get(name)
        if kept is not None and kept[0] > time.monotonic():
            return kept[1]
        async with self._slots:
            try:
                async with asyncio.timeout(_DEADLINE):
                    found = list(dict.fromkeys(await self._lookup(name)))[:_MAX_ADDRESSES]
            except TimeoutError:
                raise OSError(f"{name} was not found within {_DEADLINE:.0f} s") from None
        if not found:
            raise NameUnknown(name)
        self._kept.pop(name, None)
        self._kept[name] = (time.monotonic() + _KEEP, found)
        if len(self._kept) > _MAX_KEPT:
            self._kept.popitem(last=False)
        return found

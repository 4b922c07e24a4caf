"""Names looked up as this machine does it (getaddrinfo), for sandboxes: with a deadline, few at a time, kept for a moment."""

from __future__ import annotations

import asyncio
import socket
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from ipaddress import ip_address

from gatewayd.local.egress.addresses import Address
from gatewayd.tasks import TaskOwner

_DEADLINE = 10.0  # seconds that somebody waits for one name
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
    """The lookups of one sandbox.

    A lookup cannot be broken off: its thread goes on until the system's resolver gives up. So it goes on here too when nobody
    waits for it any more, and counts among those that are allowed at once for as long as it takes.
    """

    def __init__(self, lookup: Lookup = system_lookup) -> None:
        self._lookup = lookup
        self._slots = asyncio.Semaphore(_MAX_LOOKUPS)  # one is taken for as long as a thread is
        self._tasks = TaskOwner("resolver")  # lookups
        self._kept: OrderedDict[str, tuple[float, list[Address]]] = OrderedDict()  # name → (until, addresses), oldest first

    async def addresses(self, name: str) -> list[Address]:
        """In the order in which they are to be tried, at least one. Raises NameUnknown, OSError."""
        if (known := self._known(name)) is not None:
            return known
        try:
            async with asyncio.timeout(_DEADLINE):
                await self._slots.acquire()
                if (known := self._known(name)) is not None:  # found for somebody else meanwhile
                    self._slots.release()
                    return known
                found = await asyncio.shield(self._start(name))
        except TimeoutError:
            raise OSError(f"{name} was not found within {_DEADLINE:.0f} s") from None
        if isinstance(found, Exception):
            raise found
        return found

    async def aclose(self) -> None:
        """Look nothing up any more; idempotent."""
        await self._tasks.aclose()

    def _known(self, name: str) -> list[Address] | None:
        kept = self._kept.get(name)
        return kept[1] if kept is not None and kept[0] > time.monotonic() else None

    def _start(self, name: str) -> asyncio.Task[list[Address] | Exception]:
        """A lookup, in the slot that was taken for it."""
        try:
            task = self._tasks.start(self._look_up(name), "lookup")
        except RuntimeError:
            self._slots.release()
            raise
        task.add_done_callback(lambda _: self._slots.release())
        return task

    async def _look_up(self, name: str) -> list[Address] | Exception:
        """What is found, or what `addresses` raises: without anybody who waits, that is no defect."""
        try:
            found = list(dict.fromkeys(await self._lookup(name)))[:_MAX_ADDRESSES]
        except (NameUnknown, OSError) as exc:
            return exc
        if not found:
            return NameUnknown(name)
        self._kept.pop(name, None)
        self._kept[name] = (time.monotonic() + _KEEP, found)
        if len(self._kept) > _MAX_KEPT:
            self._kept.popitem(last=False)
        return found

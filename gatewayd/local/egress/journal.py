"""What was decided about a sandbox's traffic: the last decisions, and new ones for whoever follows."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass, field
from typing import Any

from gatewayd.local.clock import Clock
from gatewayd.local.envelope import printable

KEPT = 1000  # decisions of one sandbox
_BACKLOG = 1000  # decisions that a follower may be behind; older ones are left out, and counted
_MAX_PATH = 200  # characters of a path that are kept


@dataclass
class Decision:
    """One DNS query, connection or HTTP request. A path is told without its query string, which may hold secrets."""

    serial: int  # of this sandbox's decisions, from 1 on
    time: str  # ISO 8601, UTC
    kind: str  # dns, tcp, tls (intercepted: see its requests), http
    host: str  # name, or address when there was no name
    port: int | None
    verdict: str  # allow, deny
    reason: str = ""  # why it was denied, or how the connection failed
    method: str | None = None  # http
    path: str | None = None  # http
    status: int | None = None  # http: of the answer
    rules: list[str] = field(default_factory=list)  # names of the rules whose headers were set
    sent: int | None = None  # bytes that the sandbox sent; known at the end
    received: int | None = None


class Journal:
    """The decisions about one sandbox. An entry is told once, when all of it is known."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._kept: deque[dict[str, Any]] = deque(maxlen=KEPT)
        self._followers: set[asyncio.Queue[dict[str, Any] | None]] = set()
        self._closed = False
        self._serial = 0  # of the last one

    def note(self, kind: str, host: str, port: int | None, verdict: str, reason: str = "", **more: Any) -> None:
        """Record a decision; the rest as `Decision`."""
        if (path := more.get("path")) is not None:
            more["path"] = printable(path.partition("?")[0], _MAX_PATH)
        self._serial += 1
        seen = (printable(host, 255), port, verdict, printable(reason, 300))
        entry = asdict(Decision(self._serial, self._clock.stamp(), kind, *seen, **more))
        self._kept.append(entry)
        for queue in self._followers:
            if queue.full():
                queue.get_nowait()
            queue.put_nowait(entry)

    def entries(self) -> list[dict[str, Any]]:
        """The last decisions, oldest first."""
        return list(self._kept)

    async def follow(self) -> AsyncIterator[dict[str, Any]]:
        """The last decisions, and each new one as it is made, until the sandbox is gone."""
        queue: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue(_BACKLOG)
        for entry in self._kept:
            queue.put_nowait(entry)
        if not self._closed:
            self._followers.add(queue)
        try:
            while not (self._closed and queue.empty()) and (got := await queue.get()) is not None:
                yield got
        finally:
            self._followers.discard(queue)

    async def after(self, serial: int, wait: float) -> list[dict[str, Any]]:
        """Those that came after one; if there is none, what comes within `wait` seconds."""
        found = [entry for entry in self._kept if entry["serial"] > serial]
        if found or wait <= 0 or self._closed:
            return found
        queue: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue(_BACKLOG)
        self._followers.add(queue)
        try:
            async with asyncio.timeout(wait):
                await queue.get()
        except TimeoutError:
            return []
        finally:
            self._followers.discard(queue)
        return [entry for entry in self._kept if entry["serial"] > serial]

    def close(self) -> None:
        """No more will come; idempotent."""
        self._closed = True
        for queue in self._followers:
            if queue.full():
                queue.get_nowait()
            queue.put_nowait(None)

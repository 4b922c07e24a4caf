"""One sandbox as the service holds it: its record, and what belongs to its present run."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Protocol

from gatewayd.local.egress.gate import Gate
from gatewayd.local.registry import CommandRegistry
from gatewayd.local.runtime.base import Box
from gatewayd.local.store import Record


class Closable(Protocol):
    """A connection into a sandbox that ends with its run."""

    @property
    def busy(self) -> bool:
        """Somebody uses it now: the sandbox is not idle."""

    async def aclose(self) -> None:
        """End it in order; idempotent, with a deadline of its own."""


class Run:
    """One run of a sandbox, from start to stop."""

    def __init__(self, box: Box, name: str) -> None:
        self.box = box
        self.commands = CommandRegistry(name)
        self.gate: Gate | None = None  # its way out; None: it has none
        self.tunnels: set[Closable] = set()  # open tunnels; each adds and removes itself


class Sandbox:
    """A sandbox. Its record is replaced, never changed, and always what the store holds."""

    def __init__(self, record: Record, monotonic: Callable[[], float] = time.monotonic) -> None:
        self.record = record
        self.run: Run | None = None  # set while the sandbox is ready
        self.lock = asyncio.Lock()  # held for each change of state: start, stop, delete
        self.starting: asyncio.Task[None] | None = None  # the start everybody waits for
        self.deleting: asyncio.Task[None] | None = None  # the deletion everybody waits for
        self._users = 0  # requests and attached clients now
        self.storage_full = False  # its last start or deletion failed for lack of space
        self._monotonic = monotonic  # the clock that lack of use is measured with
        self._last_use = monotonic()  # when the last of them ended, or the sandbox became ready

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """While a request or an attached client uses the sandbox it is not idle."""
        self._users += 1
        try:
            yield
        finally:
            self._users -= 1
            self.touch()

    def touch(self) -> None:
        """The sandbox is in use right now."""
        self._last_use = self._monotonic()

    def idle_for(self, now: float) -> float:
        """Seconds without use at monotonic time `now`; a command that runs is use, an open tunnel without a stream is not."""
        if self._users or (self.run is not None and (self.run.commands.running or any(t.busy for t in self.run.tunnels))):
            self._last_use = now
        return max(0.0, now - self._last_use)

"""The tasks of one connection: at its end they get the time to take leave of the sandbox."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

from gatewayd.tasks import TaskOwner

LEAVE_DEADLINE = 3.0  # seconds for sessions and listeners to be closed inside


class Work:
    """Like `TaskOwner`, but what runs at the end is waited for before it is cancelled."""

    def __init__(self, name: str) -> None:
        self._owner = TaskOwner(name)
        self._tasks: set[asyncio.Task[Any]] = set()  # running

    def start(self, coro: Coroutine[Any, Any, Any], name: str) -> asyncio.Task[Any]:
        """See TaskOwner. Raises RuntimeError after `aclose`."""
        task = self._owner.start(coro, name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def aclose(self) -> None:
        """Everything here has been told to end; wait for it, then end it. Idempotent."""
        if tasks := self._tasks - {asyncio.current_task()}:
            await asyncio.wait(tasks, timeout=LEAVE_DEADLINE)
        await self._owner.aclose()

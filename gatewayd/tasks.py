"""The only place that creates tasks: every task has a name and an owner, and no failure goes unseen."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any

log = logging.getLogger(__name__)


class TaskOwner:
    """Owns the background tasks of one object and ends them with it.

    Not thread-safe; use from the event loop only.
    """

    def __init__(self, name: str) -> None:
        self._name = name  # prefix of every task's name
        self._tasks: set[asyncio.Task[Any]] = set()  # running tasks; a task leaves when it is done
        self._closed = False  # set by aclose(); later starts are refused

    def __len__(self) -> int:
        return len(self._tasks)

    def start(self, coro: Coroutine[Any, Any, Any], name: str) -> asyncio.Task[Any]:
        """Run `coro` as an owned task called ``OWNER/name``.

        Raises:
            RuntimeError: the owner is closed (the coroutine is closed unrun).
        """
        if self._closed:
            coro.close()
            raise RuntimeError(f"cannot start {self._name}/{name}: its owner is closed")
        task = asyncio.get_running_loop().create_task(coro, name=f"{self._name}/{name}")
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (exc := task.exception()) is not None:
            log.error("task %s failed", task.get_name(), exc_info=exc)

    async def aclose(self, deadline: float = 5.0) -> None:
        """Cancel every task and wait for them, at most `deadline` seconds; idempotent.

        The calling task may itself be owned: it is left running.
        """
        self._closed = True
        current = asyncio.current_task()
        tasks = [task for task in self._tasks if task is not current]
        for task in tasks:
            task.cancel()
        if tasks:
            _, pending = await asyncio.wait(tasks, timeout=deadline)
            for task in pending:
                log.error("task %s did not end within %.1f s", task.get_name(), deadline)

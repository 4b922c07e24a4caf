"""The only place that creates tasks: every task has a name and an owner, and no failure goes unseen."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any, Generic, TypeVar

log = logging.getLogger(__name__)

T = TypeVar("T")


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


class _Run(Generic[T]):
    """One run of a `SingleFlight`."""

    def __init__(self, task: asyncio.Task[T | Exception]) -> None:
        self.task = task
        self.waiters = 0  # who waits for its outcome


class SingleFlight(Generic[T]):
    """One run of a coroutine for everybody who wants its outcome at the same time."""

    def __init__(self, owner: TaskOwner, name: str, *, keep: bool = False) -> None:
        self._owner = owner  # of the task that runs it
        self._name = name  # of that task
        self._keep = keep  # whether it goes on when nobody waits any more
        self._run: _Run[T] | None = None  # the run in progress

    @property
    def running(self) -> bool:
        """Whether a run is in progress."""
        return self._run is not None and not self._run.task.done()

    async def join(self, function: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """The outcome of the run in progress, or of a new one of `function`.

        A waiter that is cancelled leaves; the run is cancelled with the last one. The run's exception is raised in every waiter.

        Raises:
            RuntimeError: the owner is closed, or was closed meanwhile.
        """
        run = self._run
        if run is None or run.task.done():
            run = self._run = _Run(self._owner.start(_outcome(function), self._name))
        run.waiters += 1
        try:
            await asyncio.wait([run.task])
        finally:
            run.waiters -= 1
            if run.waiters == 0 and not self._keep:
                run.task.cancel()  # nothing, when it is done
            if self._run is run and (run.task.done() or (run.waiters == 0 and not self._keep)):
                self._run = None
        if run.task.cancelled():
            raise RuntimeError(f"{self._name} was stopped")
        outcome = run.task.result()
        if isinstance(outcome, Exception):
            raise outcome
        return outcome


async def _outcome(function: Callable[[], Coroutine[Any, Any, T]]) -> T | Exception:
    """An exception is an outcome like any other: several may want it, and the task itself has not failed."""
    try:
        return await function()
    except Exception as exc:  # noqa: BLE001 - raised in every waiter
        return exc

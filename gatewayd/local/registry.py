"""The commands of one running sandbox: get-or-create by id, kept for a while after their end, forgotten within bounds."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import uuid
from collections import OrderedDict
from collections.abc import Callable, Coroutine
from typing import Any

from gatewayd.local.agentforward import AgentForward
from gatewayd.local.commands import CommandOptions, CommandSession
from gatewayd.local.envelope import printable
from gatewayd.local.pipes import Drains
from gatewayd.local.ring import RING_CAPACITY
from gatewayd.local.runtime.base import Process, RuntimeFailure
from gatewayd.tasks import TaskOwner

log = logging.getLogger(__name__)

MAX_RUNNING = 1024  # commands running at the same time in one sandbox
MAX_KEPT = 64 * 1024 * 1024  # bytes of output of finished commands kept together
MAX_FINISHED = 1024  # finished commands kept
MAX_FORGOTTEN = 4096  # ids remembered after a session is forgotten, to tell "expired" from "never existed"
CLOSE_DEADLINE = 2.0  # seconds given to finish, and again to deliver the ends, when the sandbox stops


class UnknownCommand(Exception):
    """No command has that id."""


class ExpiredCommand(UnknownCommand):
    """A command had that id, and its session is forgotten."""


class TooManyCommands(Exception):
    """MAX_RUNNING commands run already."""


class CommandRegistry:
    """All sessions of one run of a sandbox."""

    def __init__(self, name: str, capacity: int = RING_CAPACITY) -> None:
        self._tasks = TaskOwner(f"commands {name}")
        self._capacity = capacity  # bytes kept of each stream of a command
        self._sessions: dict[str, CommandSession] = {}  # by command id, running and finished
        self._starting: dict[str, asyncio.Task[CommandSession | Exception]] = {}  # commands being started, by command id
        self._finished: OrderedDict[str, None] = OrderedDict()  # ids of finished commands, longest finished first
        self._forgotten: OrderedDict[str, None] = OrderedDict()  # ids of forgotten commands, oldest first
        self._timers: dict[str, asyncio.TimerHandle] = {}  # ends of ttl, by command id
        self._drains = Drains()
        self._loop = asyncio.get_running_loop()

    @property
    def running(self) -> int:
        """Number of commands that run."""
        return len(self._sessions) - len(self._finished) + len(self._starting)

    def get(self, command_id: str) -> CommandSession:
        """The session with that id.

        Raises:
            ExpiredCommand: it is forgotten.
            UnknownCommand: there never was one.
        """
        session = self._sessions.get(command_id)
        if session is not None:
            return session
        if command_id in self._forgotten:
            raise ExpiredCommand(command_id)
        raise UnknownCommand(command_id)

    async def get_or_start(
        self,
        command_id: str | None,
        options: CommandOptions,
        spawn: Callable[[], Coroutine[Any, Any, Process]],
        agent: AgentForward | None = None,
    ) -> CommandSession:
        """The session with that id, starting the command if there is none: a repeated request never runs it twice.

        Args:
            command_id: none: one is made up.
            options: of a command that is started.
            spawn: starts the process, and opens `agent` before.
            agent: forwards SSH agents to a command that is started.

        Raises:
            ExpiredCommand: a command of that id ran and is forgotten.
            TooManyCommands: MAX_RUNNING run.
            OSError, RuntimeFailure: from `spawn`.
        """
        command_id = command_id or uuid.uuid4().hex
        if command_id in self._forgotten:
            raise ExpiredCommand(command_id)
        if command_id in self._sessions:
            return self._sessions[command_id]
        starting = self._starting.get(command_id)
        if starting is None:
            if self.running >= MAX_RUNNING:
                raise TooManyCommands(f"{MAX_RUNNING} commands run in this sandbox already")
            starting = self._tasks.start(self._start(command_id, options, spawn, agent), "start command")
            self._starting[command_id] = starting
            starting.add_done_callback(lambda _: self._starting.pop(command_id, None))
        try:
            # shielded: a client that goes away while its command starts does not take it from a second one that waits for it
            started = await asyncio.shield(starting)
        except asyncio.CancelledError:
            if starting.cancelled():
                raise RuntimeFailure("the sandbox was stopped") from None
            raise
        if isinstance(started, Exception):
            raise started
        return started

    async def _start(
        self,
        command_id: str,
        options: CommandOptions,
        spawn: Callable[[], Coroutine[Any, Any, Process]],
        agent: AgentForward | None,
    ) -> CommandSession | Exception:
        try:
            process = await spawn()
        except (OSError, RuntimeFailure) as exc:
            return exc
        session = CommandSession(
            command_id,
            process,
            options,
            tasks=self._tasks,
            drains=self._drains,
            on_finished=self._on_finished,
            capacity=self._capacity,
            agent=agent,
        )
        self._sessions[command_id] = session
        return session

    def _on_finished(self, session: CommandSession) -> None:
        command_id = session.command_id
        self._finished[command_id] = None
        ttl = session.options.ttl
        if ttl is not None:
            self._timers[command_id] = self._loop.call_later(ttl, self._forget, command_id)
        while len(self._finished) > MAX_FINISHED or self._kept() > MAX_KEPT:
            oldest = next(iter(self._finished))
            if oldest == command_id:
                break
            self._forget(oldest)

    def _kept(self) -> int:
        return sum(self._sessions[command_id].kept for command_id in self._finished)

    def _forget(self, command_id: str) -> None:
        timer = self._timers.pop(command_id, None)
        if timer is not None:
            timer.cancel()
        self._finished.pop(command_id, None)
        if self._sessions.pop(command_id, None) is not None:
            self._forgotten[command_id] = None
            while len(self._forgotten) > MAX_FORGOTTEN:
                self._forgotten.popitem(last=False)

    async def aclose(self) -> None:
        """End every session, once the sandbox's processes are dead; clients still get output and exit. Idempotent."""
        await self._wait_for(lambda: [s.finished for s in self._sessions.values() if s.outcome is None])
        for session in list(self._sessions.values()):
            if session.outcome is None:
                log.warning("command %s: gave up waiting for its end", printable(session.command_id))
                session.abandon()
        await self._wait_for(lambda: [s.unwatched for s in self._sessions.values() if s.attached])
        for command_id in list(self._sessions):
            self._forget(command_id)
        self._drains.close()
        await self._tasks.aclose()

    async def _wait_for(self, pending: Callable[[], list[asyncio.Event]]) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_DEADLINE):
                while events := pending():
                    await events[0].wait()

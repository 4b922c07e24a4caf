"""Pipes in place of a sandbox's process: the test holds the other ends."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from gatewayd.local.commands import CommandOptions, CommandSession
from gatewayd.local.pipes import Drains
from gatewayd.local.runtime.base import Process
from gatewayd.tasks import TaskOwner


class PipedProcess:
    """A `runtime.base.Process` whose output the test writes and whose input it reads."""

    def __init__(self) -> None:
        self.pid = 4242
        self.their_stdin, self.stdin = os.pipe()
        self.stdout, self.their_stdout = os.pipe()
        err, self.their_stderr = os.pipe()
        self.stderr: int | None = err
        for fd in (self.stdin, self.stdout, err):
            os.set_blocking(fd, False)
        self.exited: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self.signals: list[int] = []  # what signal() was called with
        self.sizes: list[tuple[int, int]] = []  # what resize() was called with
        self._open = {self.their_stdin, self.their_stdout, self.their_stderr}

    async def signal(self, number: int) -> None:
        """A SIGKILL ends it, as it would a real one."""
        self.signals.append(number)
        if number == 9:
            self.end(137)

    async def resize(self, cols: int, rows: int) -> None:
        """Noted."""
        self.sizes.append((cols, rows))

    def end(self, code: int) -> None:
        """Exit, closing every descriptor."""
        for fd in list(self._open):
            self.close(fd)
        self.exit(code)

    def exit(self, code: int) -> None:
        """Exit while somebody else still holds the pipes."""
        if not self.exited.done():
            self.exited.set_result(code)

    def close(self, fd: int) -> None:
        """Close one of the process's own ends."""
        if fd in self._open:
            self._open.discard(fd)
            os.close(fd)


class Spawner:
    """Spawns processes over pipes, when it is let to."""

    def __init__(self) -> None:
        self.spawned: list[PipedProcess] = []
        self.gate = asyncio.Event()  # a spawn waits for it
        self.gate.set()
        self.error: Exception | None = None  # raised in place of a process

    async def __call__(self) -> Process:
        await self.gate.wait()
        if self.error is not None:
            raise self.error
        process = PipedProcess()
        self.spawned.append(process)
        return process


def open_descriptors() -> int:
    """How many descriptors this process has open; what earlier tests left to the collector is not among them."""
    gc.collect()
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


MakeSession = Callable[..., tuple[CommandSession, PipedProcess]]


@pytest.fixture
async def make_session() -> AsyncIterator[MakeSession]:
    """Start sessions over pipes; everything is closed after the test, and nothing may be left open."""
    before = open_descriptors()
    tasks = TaskOwner("test")
    drains = Drains()
    made: list[tuple[CommandSession, PipedProcess]] = []

    def make(capacity: int = 1 << 20, **options: Any) -> tuple[CommandSession, PipedProcess]:
        process = PipedProcess()
        session = CommandSession(
            f"command-{len(made)}",
            process,
            CommandOptions(**options),
            tasks=tasks,
            drains=drains,
            on_finished=lambda _: None,
            capacity=capacity,
        )
        made.append((session, process))
        return session, process

    yield make
    for session, process in made:
        process.end(0)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(5):
                await session.finished.wait()
    drains.close()
    await tasks.aclose()
    assert open_descriptors() <= before


@pytest.fixture
async def spawner() -> AsyncIterator[Spawner]:
    """Spawns processes; those still running are ended after the test, and nothing may be left open."""
    before = open_descriptors()
    made = Spawner()
    yield made
    for process in made.spawned:
        process.end(0)
    assert open_descriptors() <= before

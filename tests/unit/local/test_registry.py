"""The registry: one command for one id, kept and forgotten within bounds."""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING

import pytest

from gatewayd.local import registry as module
from gatewayd.local.commands import CommandOptions, CommandSession
from gatewayd.local.registry import CommandRegistry, ExpiredCommand, TooManyCommands, UnknownCommand
from gatewayd.local.runtime.base import RuntimeFailure

if TYPE_CHECKING:
    from tests.unit.local.conftest import Spawner

OPTIONS = CommandOptions()


async def finished(session: CommandSession) -> None:
    async with asyncio.timeout(5):
        await session.finished.wait()


async def test_one_command_for_one_id(spawner: Spawner) -> None:
    registry = CommandRegistry("box")
    spawner.gate.clear()
    asked = [asyncio.ensure_future(registry.get_or_start("id", OPTIONS, spawner)) for _ in range(5)]
    await asyncio.sleep(0)
    asked.pop().cancel()  # one client goes while the command starts
    spawner.gate.set()
    sessions = await asyncio.gather(*asked)
    assert len({id(session) for session in sessions}) == len(spawner.spawned) == 1
    assert await registry.get_or_start("id", OPTIONS, spawner) is sessions[0] is registry.get("id")
    assert registry.running == 1
    spawner.spawned[0].end(0)
    await finished(sessions[0])
    assert registry.running == 0
    assert registry.get("id") is sessions[0]  # kept for those who come back
    await registry.aclose()


async def test_ids_are_made_up_when_missing(spawner: Spawner) -> None:
    registry = CommandRegistry("box")
    one = await registry.get_or_start(None, OPTIONS, spawner)
    two = await registry.get_or_start(None, OPTIONS, spawner)
    assert one.command_id != two.command_id
    for process in spawner.spawned:
        process.end(0)
    await registry.aclose()


async def test_failed_starts_leave_nothing(spawner: Spawner) -> None:
    registry = CommandRegistry("box")
    for error in (FileNotFoundError(2, "No such file or directory"), RuntimeFailure("no")):
        spawner.error = error
        with pytest.raises(type(error)):
            await registry.get_or_start("id", OPTIONS, spawner)
    spawner.error = None
    assert registry.running == 0
    await registry.get_or_start("id", OPTIONS, spawner)
    spawner.spawned[0].end(0)
    await registry.aclose()


async def test_unknown_and_expired(spawner: Spawner) -> None:
    registry = CommandRegistry("box")
    with pytest.raises(UnknownCommand):
        registry.get("id")
    session = await registry.get_or_start("id", CommandOptions(ttl=0.0), spawner)
    spawner.spawned[0].end(0)
    await finished(session)
    async with asyncio.timeout(5):
        while True:
            try:
                registry.get("id")
            except ExpiredCommand:
                break
            await asyncio.sleep(0.001)
    with pytest.raises(ExpiredCommand):
        await registry.get_or_start("id", OPTIONS, spawner)  # never run twice, not even later
    await registry.aclose()


async def test_running_commands_have_a_limit(spawner: Spawner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_RUNNING", 2)
    registry = CommandRegistry("box")
    first = await registry.get_or_start(None, OPTIONS, spawner)
    await registry.get_or_start(None, OPTIONS, spawner)
    with pytest.raises(TooManyCommands):
        await registry.get_or_start(None, OPTIONS, spawner)
    spawner.spawned[0].end(0)
    await finished(first)
    await registry.get_or_start(None, OPTIONS, spawner)
    for process in spawner.spawned:
        process.end(0)
    await registry.aclose()


async def test_kept_output_has_a_limit(spawner: Spawner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_KEPT", 100)
    registry = CommandRegistry("box")
    for number in range(4):
        session = await registry.get_or_start(f"id-{number}", OPTIONS, spawner)
        os.write(spawner.spawned[-1].their_stdout, b"x" * 40)
        spawner.spawned[-1].end(0)
        await finished(session)
    for number in range(2):
        with pytest.raises(ExpiredCommand):
            registry.get(f"id-{number}")
    assert registry.get("id-2").kept == registry.get("id-3").kept == 40
    await registry.aclose()


async def test_the_end_of_the_sandbox_reaches_the_clients(spawner: Spawner) -> None:
    registry = CommandRegistry("box")
    session = await registry.get_or_start("id", OPTIONS, spawner)
    attachment = session.attach()
    closing = asyncio.ensure_future(registry.aclose())
    os.write(spawner.spawned[0].their_stdout, b"bye")
    spawner.spawned[0].end(137)
    got = ""
    while chunks := await attachment.read():
        got += "".join(chunk.text for chunk in chunks)
    assert got == "bye"
    assert session.outcome is not None
    assert session.outcome.exit_code == 137
    assert not closing.done()  # it waits for the client to have heard
    attachment.close()
    await closing
    await registry.aclose()


async def test_a_process_that_does_not_end_is_abandoned(spawner: Spawner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CLOSE_DEADLINE", 0.05)
    registry = CommandRegistry("box")
    session = await registry.get_or_start("id", OPTIONS, spawner)
    session.attach()
    await registry.aclose()
    assert session.outcome is not None


async def test_closed_while_starting(spawner: Spawner) -> None:
    registry = CommandRegistry("box")
    spawner.gate.clear()
    asked = asyncio.ensure_future(registry.get_or_start("id", OPTIONS, spawner))
    await asyncio.sleep(0)
    await registry.aclose()
    with pytest.raises(RuntimeFailure):
        await asked

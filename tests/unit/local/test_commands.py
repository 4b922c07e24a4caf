"""Command sessions: offsets, replay, back-pressure, timers, ends."""

from __future__ import annotations

import asyncio
import os
import random
from typing import TYPE_CHECKING

import pytest

from gatewayd.local import commands
from gatewayd.local.attachment import Attachment
from gatewayd.local.commands import CommandSession, TooManyClients

if TYPE_CHECKING:
    from tests.unit.local.conftest import MakeSession


async def drain(attachment: Attachment) -> dict[str, str]:
    """Everything to the end, checking that offsets are gapless."""
    texts = {"stdout": "", "stderr": ""}
    at: dict[str, int] = {}
    async with asyncio.timeout(10):
        while chunks := await attachment.read():
            for chunk in chunks:
                assert at.setdefault(chunk.stream, chunk.offset) == chunk.offset
                at[chunk.stream] += chunk.size
                texts[chunk.stream] += chunk.text
    attachment.close()
    return texts


async def until(session: CommandSession, end: int) -> None:
    """Wait until that much of stdout was read."""
    async with asyncio.timeout(5):
        while session.stdout.ring.end < end:  # noqa: ASYNC110 - reading sends no event to others
            await asyncio.sleep(0.001)


async def test_output_and_exit(make_session: MakeSession) -> None:
    session, process = make_session()
    attachment = session.attach()
    os.write(process.their_stdout, "grüße\n".encode())
    os.write(process.their_stderr, b"oh\n")
    process.end(3)
    assert await drain(attachment) == {"stdout": "grüße\n", "stderr": "oh\n"}
    assert session.outcome == commands.Outcome(3)


async def test_a_character_is_held_back_until_it_is_whole(make_session: MakeSession) -> None:
    session, process = make_session()
    attachment = session.attach()
    data = "a€b".encode()
    os.write(process.their_stdout, data[:2])
    [chunk] = await attachment.read()
    assert (chunk.text, chunk.offset, chunk.size) == ("a", 0, 1)
    os.write(process.their_stdout, data[2:])
    [chunk] = await attachment.read()
    assert (chunk.text, chunk.offset, chunk.size) == ("€b", 1, 4)
    os.write(process.their_stdout, data[1:3])  # never completed
    process.end(0)
    [chunk] = await attachment.read()
    assert (chunk.text, chunk.offset, chunk.size) == ("\ufffd", 5, 2)
    assert await attachment.read() == []
    attachment.close()


async def test_a_second_client_reads_from_its_own_offset(make_session: MakeSession) -> None:
    session, process = make_session()
    os.write(process.their_stdout, b"0123456789")
    await until(session, 10)
    late = session.attach(stdout_offset=4)
    first = session.attach()
    past = session.attach(stdout_offset=10**9)
    process.end(0)
    assert (await drain(late))["stdout"] == "456789"
    assert (await drain(first))["stdout"] == "0123456789"
    assert (await drain(past))["stdout"] == ""


async def test_with_nobody_attached_the_oldest_bytes_go(make_session: MakeSession) -> None:
    session, process = make_session(capacity=1000)
    for _ in range(10):
        os.write(process.their_stdout, b"x" * 300)
    os.write(process.their_stdout, b"end")
    await until(session, 3003)
    attachment = session.attach(stdout_offset=5)
    [chunk] = await attachment.read()
    assert chunk.offset == 3003 - 1000
    assert chunk.text == "x" * 997 + "end"
    attachment.close()


async def test_a_client_that_does_not_read_blocks_the_command(make_session: MakeSession) -> None:
    session, process = make_session(capacity=1000)
    attachment = session.attach()
    os.set_blocking(process.their_stdout, False)
    data = random.Random(1).randbytes(400_000).hex().encode()  # noqa: S311 - no secret
    sent = 0
    async with asyncio.timeout(5):
        while not session.stdout.paused:
            sent += os.write(process.their_stdout, data[sent : sent + 4096])
            await asyncio.sleep(0)
    assert sent < len(data)
    got = ""
    loop = asyncio.get_running_loop()

    def write() -> None:
        nonlocal sent
        sent += os.write(process.their_stdout, data[sent : sent + 4096])
        if sent >= len(data):
            loop.remove_writer(process.their_stdout)
            process.end(0)

    loop.add_writer(process.their_stdout, write)
    async with asyncio.timeout(20):
        while chunks := await attachment.read():
            for chunk in chunks:
                assert chunk.offset == len(got)
                got += chunk.text
    assert got.encode() == data
    attachment.close()


async def test_a_client_that_goes_lets_the_command_run_on(make_session: MakeSession) -> None:
    session, process = make_session(capacity=1000)
    attachment = session.attach()
    os.write(process.their_stdout, b"x" * 1000)
    await until(session, 1000)
    os.write(process.their_stdout, b"y" * 1000)
    attachment.close()
    attachment.close()
    await until(session, 2000)
    assert session.stdout.ring.start == 1000


async def test_the_foremost_of_two_clients_sets_the_pace(make_session: MakeSession) -> None:
    session, process = make_session(capacity=1000)
    stuck = session.attach()
    quick = session.attach()
    got = ""
    for index in range(5):
        os.write(process.their_stdout, f"{index:1000d}".encode())
        async with asyncio.timeout(5):
            while len(got) < 1000 * (index + 1):
                got += "".join(chunk.text for chunk in await quick.read())
    process.end(0)
    assert await drain(quick) == {"stdout": "", "stderr": ""}
    [chunk] = await stuck.read()
    assert (chunk.offset, chunk.size) == (4000, 1000)  # what it missed is gone, and the offset says so
    stuck.close()


async def test_input_and_its_end(make_session: MakeSession) -> None:
    session, process = make_session()
    await session.send_input(b"some ")
    await session.send_input(b"input")
    session.close_stdin()
    session.close_stdin()
    assert os.read(process.their_stdin, 100) == b"some input"
    assert os.read(process.their_stdin, 100) == b""
    await session.resize(100, 40)
    assert process.sizes == [(100, 40)]


async def test_timeout_kills_and_is_an_error(make_session: MakeSession) -> None:
    session, process = make_session(timeout=0.02)
    attachment = session.attach()
    os.write(process.their_stdout, b"partial")
    assert (await drain(attachment))["stdout"] == "partial"
    assert session.outcome is not None
    assert session.outcome.error_type == "CommandTimeout"
    assert process.signals == [9]


async def test_the_timeout_ends_with_the_command(make_session: MakeSession) -> None:
    session, process = make_session(timeout=0.05)
    process.exit(0)  # its pipes stay open in a background process
    async with asyncio.timeout(5):
        await session.finished.wait()
    assert session.outcome == commands.Outcome(0)
    assert process.signals == []


async def test_a_command_without_clients_is_killed_after_its_idle_timeout(make_session: MakeSession) -> None:
    session, process = make_session(idle_timeout=0.02)
    session.attach().close()
    async with asyncio.timeout(5):
        await session.finished.wait()
    assert process.signals == [9]
    assert session.outcome == commands.Outcome(137)


async def test_an_attached_client_keeps_it_alive(make_session: MakeSession) -> None:
    session, process = make_session(idle_timeout=0.02)
    one = session.attach()
    two = session.attach()
    one.close()
    await asyncio.sleep(0.1)
    assert process.signals == []
    two.close()
    async with asyncio.timeout(5):
        await session.finished.wait()


async def test_kill_on_disconnect(make_session: MakeSession) -> None:
    session, process = make_session(kill_on_disconnect=True, idle_timeout=None)
    one = session.attach()
    two = session.attach()
    one.close()
    assert not session.unwatched.is_set()
    two.close()
    async with asyncio.timeout(5):
        await session.finished.wait()
    assert process.signals == [9]


async def test_pipes_held_by_others_do_not_delay_the_exit(make_session: MakeSession, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands, "LINGER", 0.05)
    session, process = make_session()
    attachment = session.attach()
    os.write(process.their_stdout, b"mine")
    process.exit(0)
    assert (await drain(attachment))["stdout"] == "mine"
    os.set_blocking(process.their_stdout, False)
    for _ in range(10):  # and the one who holds them neither blocks nor gets SIGPIPE
        while True:
            try:
                os.write(process.their_stdout, b"x" * 60000)
                break
            except BlockingIOError:
                await asyncio.sleep(0.001)


async def test_a_background_process_that_never_stops_writing(make_session: MakeSession, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands, "LINGER_LIMIT", 0.1)
    session, process = make_session()
    os.set_blocking(process.their_stdout, False)
    process.exit(0)
    async with asyncio.timeout(10):
        while not session.finished.is_set():
            try:
                os.write(process.their_stdout, b"x" * 60000)
            except BlockingIOError:
                await asyncio.sleep(0)


async def test_late_output_of_a_child_still_belongs(make_session: MakeSession) -> None:
    session, process = make_session()
    attachment = session.attach()
    process.exit(0)
    await asyncio.sleep(0.05)
    os.write(process.their_stdout, b"late")
    process.close(process.their_stdout)
    process.close(process.their_stderr)
    assert (await drain(attachment))["stdout"] == "late"


async def test_clients_have_a_limit(make_session: MakeSession, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands, "MAX_ATTACHMENTS", 2)
    session, _ = make_session()
    one, two = session.attach(), session.attach()
    with pytest.raises(TooManyClients):
        session.attach()
    one.close()
    session.attach().close()
    two.close()


async def test_abandoned_with_its_sandbox(make_session: MakeSession) -> None:
    session, process = make_session()
    attachment = session.attach()
    os.write(process.their_stdout, b"last words")
    await until(session, 10)
    session.abandon()
    session.abandon()
    assert (await drain(attachment))["stdout"] == "last words"
    assert session.outcome == commands.Outcome(137)
    process.end(0)

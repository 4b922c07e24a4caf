"""Programs in a real sandbox, carried by its guest."""

from __future__ import annotations

import asyncio
import hashlib
import os

import pytest

from gatewayd.errors import GatewayError, StreamClosed
from gatewayd.guest import wire
from gatewayd.sandbox.guest_session import GuestSession
from gatewayd.sandbox.session import STDERR, STDOUT, ExitStatus, ProcessSpec, Session
from tests.guest.conftest import World

DEADLINE = 30.0  # seconds any of this may take


async def run(world: World, **spec: object) -> Session:
    return await world.guests.process(world.account, world.sandbox, ProcessSpec(**spec))  # type: ignore[arg-type]


async def read_all(session: Session, stream: int = STDOUT) -> bytes:
    parts = []
    while data := await session.read(stream):
        parts.append(data)
    return b"".join(parts)


async def output(world: World, command: str) -> bytes:
    session = await run(world, command=command)
    try:
        async with asyncio.timeout(DEADLINE):
            return await read_all(session)
    finally:
        await session.aclose()


async def test_input_output_and_exit(world: World) -> None:
    session = await run(world, command="cat; echo oops >&2; exit 3")
    assert session.pid > 1
    await session.write(b"\0\xff\x80binary\r\n")
    session.write_eof()
    session.write_eof()
    async with asyncio.timeout(DEADLINE):
        assert await read_all(session) == b"\0\xff\x80binary\r\n"
        assert await read_all(session, STDERR) == b"oops\n"
        assert await session.wait() == ExitStatus(3)
        assert await session.wait() == ExitStatus(3)
    with pytest.raises(StreamClosed):
        await session.write(b"x")
    await session.aclose()
    await session.aclose()
    assert world.guests.carrier(world.account, world.sandbox) == "guest"


async def test_much_both_ways_at_once(world: World) -> None:
    session = await run(world, argv=("cat",))
    data = os.urandom(1 << 20) * 20

    async def feed() -> None:
        for pos in range(0, len(data), 100_000):
            await session.write(data[pos : pos + 100_000])
        session.write_eof()

    async with asyncio.timeout(60):
        _, answer = await asyncio.gather(feed(), read_all(session))
    assert hashlib.sha256(answer).digest() == hashlib.sha256(data).digest()
    await session.aclose()


async def test_arguments_environment_and_folder_are_bytes(world: World) -> None:
    session = await run(
        world,
        argv=("sh", "-c", 'printf "%s|%s|%s" "$1" "$X" "$PWD"', "sh", "a b\n'\"\udcff"),
        env={"X": "ü\udc80"},
        cwd="/tmp",
    )
    async with asyncio.timeout(DEADLINE):
        assert await read_all(session) == b"a b\n'\"\xff|\xc3\xbc\x80|/tmp"
    await session.aclose()


@pytest.mark.parametrize("name", ["TERM", "KILL", "USR1"])
async def test_signals(world: World, name: str) -> None:
    session = await run(world, argv=("sleep", "1000"))
    session.signal(name)
    async with asyncio.timeout(DEADLINE):
        assert await session.wait() == ExitStatus(None, name, core=False)
    session.signal("TERM")
    await session.aclose()


async def test_signals_that_are_none(world: World) -> None:
    session = await run(world, argv=("cat",))
    with pytest.raises(GatewayError) as caught:
        session.signal("no such")
    assert caught.value.kind == "usage"
    await session.aclose()


async def test_a_terminal(world: World) -> None:
    command = "tty; stty size; read line; stty size; echo $TERM"
    session = await run(world, command=command, pty=True, term="vt100", cols=90, rows=33)
    async with asyncio.timeout(DEADLINE):
        said = b""
        while b"33 90" not in said:
            said += await session.read()
        assert b"/dev/pts/" in said
        session.resize(101, 44)
        await session.write(b"\n")
        rest = await read_all(session)
        assert b"44 101" in rest
        assert b"vt100" in rest
        assert await session.read(STDERR) == b""
        assert await session.wait() == ExitStatus(0)
    await session.aclose()


async def test_input_that_is_not_read_does_not_hold_up_anything(world: World) -> None:
    session = await run(world, command="exec <&-; echo closed; sleep 1000")
    async with asyncio.timeout(DEADLINE):
        assert await session.read() == b"closed\n"
        for _ in range(20):
            await session.write(bytes(100_000))
        await session.input_stopped
    session.signal("KILL")
    assert (await session.wait()).signal == "KILL"
    await session.aclose()


async def test_a_writer_waits_for_a_program_that_does_not_read(world: World) -> None:
    session = await run(world, command="sleep 1000")
    accepted = 0

    async def feed() -> None:
        nonlocal accepted
        while True:
            await session.write(bytes(65536))
            accepted += 65536
            await asyncio.sleep(0)  # at the end nothing waits any more

    feeder = asyncio.ensure_future(feed())
    done, _ = await asyncio.wait([feeder], timeout=1.0)
    assert not done
    assert accepted <= wire.INPUT_WINDOW + (2 << 20)  # the window, and what pipes and the guest take
    session.signal("KILL")
    async with asyncio.timeout(DEADLINE):
        assert (await session.wait()).signal == "KILL"
        await session.input_stopped
    feeder.cancel()
    await asyncio.wait([feeder])
    await session.aclose()


async def test_a_slow_reader_slows_the_program_and_nothing_else(world: World) -> None:
    await world.sh("rm -f /tmp/written")
    loop = "i=0; while [ $i -lt 64 ]; do head -c 1048576 /dev/zero; i=$((i+1)); echo $i > /tmp/written; done"
    session = await run(world, command=loop)
    assert len(await session.read()) > 0
    other = await output(world, "echo there")
    assert other == b"there\n"
    before = await world.sh("cat /tmp/written 2>/dev/null || echo 0")
    assert int(before) < 16
    assert isinstance(session, GuestSession)
    assert sum(len(chunk) for buffer in session._buffers.values() for chunk in buffer.chunks) <= wire.WINDOW
    async with asyncio.timeout(DEADLINE):
        await read_all(session)
        assert await session.wait() == ExitStatus(0)
    assert int(await world.sh("cat /tmp/written")) == 64
    await session.aclose()


async def test_output_that_nobody_wants(world: World) -> None:
    session = await run(world, command="yes")
    await session.read()
    session.stop_output(STDOUT)
    assert await session.read() == b""
    async with asyncio.timeout(DEADLINE):
        assert (await session.wait()).signal == "PIPE"
    await session.aclose()


async def test_closing_ends_the_program(world: World) -> None:
    quiet = "rm -f /tmp/hup; exec 2> /dev/null; "  # a shell that reports the end of its child would die of the closed pipe
    session = await run(world, command=f"{quiet}trap 'echo hup > /tmp/hup; exit' HUP; echo ready; while :; do sleep 0.05; done")
    async with asyncio.timeout(DEADLINE):
        assert await session.read() == b"ready\n"
        await session.aclose()
        await session.aclose()
        while "hup" not in await world.sh("cat /tmp/hup 2>/dev/null || true"):  # noqa: ASYNC110 - the sandbox sends no event
            await asyncio.sleep(0.05)
    with pytest.raises(GatewayError):
        await session.read()
    with pytest.raises(GatewayError):
        await session.wait()


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        ({"argv": ("/no/such/program",)}, "/no/such/program"),
        ({"argv": ("true",), "user": "nobody-of-that-name"}, "nobody-of-that-name"),
        ({"argv": ("true",), "cwd": "/no/such/folder"}, "/no/such/folder"),
    ],
)
async def test_what_cannot_be_started(world: World, spec: dict[str, object], text: str) -> None:
    with pytest.raises(GatewayError, match=text) as caught:
        await run(world, **spec)
    assert caught.value.message.startswith("cannot run a command in sandbox")
    assert not world.guests._sessions


async def test_arguments_that_are_too_long(world: World) -> None:
    with pytest.raises(GatewayError, match="longer than 256 KiB") as caught:
        await run(world, argv=("echo", "x" * 300_000))
    assert caught.value.kind == "usage"


async def test_a_list_of_sessions(world: World) -> None:
    assert await world.guests.sessions(world.account, world.sandbox) == []
    session = await run(world, argv=("sleep", "1000"), name="my label")
    (item,) = await world.guests.sessions(world.account, world.sandbox)
    assert (item.kind, item.name, item.pid, item.attached, item.pty) == ("process", "my label", session.pid, True, False)
    assert "sleep" in item.command
    assert (item.code, item.signal) == (None, "")
    session.signal("TERM")
    await session.wait()
    (item,) = await world.guests.sessions(world.account, world.sandbox)
    assert item.signal == "TERM"
    await session.aclose()
    assert await world.guests.sessions(world.account, world.sandbox) == []


async def test_many_at_once(world: World) -> None:
    async def one(number: int) -> bytes:
        return await output(world, f"sleep 0.{number % 10}; echo {number}")

    async with asyncio.timeout(60):
        answers = await asyncio.gather(*(one(number) for number in range(40)))
    assert answers == [b"%d\n" % number for number in range(40)]
    assert len(world.pool.status()) == 1


async def test_sftp(world: World) -> None:
    session = await world.guests.sftp(world.account, world.sandbox)
    await session.write(b"\0\0\0\5\1\0\0\0\3")  # INIT, version 3
    async with asyncio.timeout(DEADLINE):
        answer = await session.read()
    assert answer[4:9] == b"\2\0\0\0\3"  # VERSION 3
    session.write_eof()
    async with asyncio.timeout(DEADLINE):
        assert (await session.wait()).code == 0
    await session.aclose()


async def test_the_end_of_the_daemon_ends_programs(world: World) -> None:
    session = await run(world, command="echo $$ > /tmp/pid; exec sleep 1000")
    waiting = asyncio.ensure_future(session.wait())
    async with asyncio.timeout(DEADLINE):
        while not await world.sh("cat /tmp/pid 2>/dev/null || true"):  # noqa: ASYNC110 - the sandbox sends no event
            await asyncio.sleep(0.05)
        await world.guests.aclose()
        with pytest.raises(GatewayError):
            await waiting
        while "gone" not in await world.sh("kill -0 $(cat /tmp/pid) 2>/dev/null || echo gone"):  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    with pytest.raises(GatewayError, match="the daemon is stopping"):
        await run(world, argv=("true",))

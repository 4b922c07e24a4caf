"""Sessions of the guest, and what may happen to the link that carries them."""

from __future__ import annotations

import asyncio
import os
import signal

import pytest

from gatewayd.errors import GatewayError
from gatewayd.guest import wire
from gatewayd.relay import ByteStream
from gatewayd.sandbox import guest_client, guest_session, guest_streams
from gatewayd.sandbox.boxes import Directory
from gatewayd.sandbox.guest_client import Guests
from gatewayd.sandbox.pool import Pool
from gatewayd.sandbox.session import ABSENCE, ExitStatus, ProcessSpec, Session
from tests.guest.conftest import World
from tests.guest.test_processes import DEADLINE, read_all, run

STUBBORN = "trap '' TERM HUP; exec cat"  # else its own end may be told before the sandbox's


async def counting(world: World, lines: int) -> Session:
    loop = f"i=0; while [ $i -lt {lines} ]; do i=$((i+1)); echo line $i; done"
    return await run(world, command=f"{loop}; read last; echo got $last")


async def lost(session: Session) -> GatewayError:
    """How a session that goes wrong does so."""
    async with asyncio.timeout(DEADLINE):
        with pytest.raises(GatewayError) as caught:
            await session.wait()
        with pytest.raises(GatewayError):
            await read_all(session)
        with pytest.raises(GatewayError):
            await session.write(b"x")
        await session.aclose()
    return caught.value


async def test_cut_again_and_again_in_both_directions(world: World) -> None:
    session = await run(world, argv=("cat",))
    data = os.urandom(1 << 20) * 16
    world.cutter.after = 2_000_000
    received = bytearray()

    async def feed() -> None:
        for pos in range(0, len(data), 77_777):
            await session.write(data[pos : pos + 77_777])
        session.write_eof()

    feeder = asyncio.ensure_future(feed())
    async with asyncio.timeout(60):
        while piece := await session.read():
            received += piece
        await feeder
        assert await session.wait() == ExitStatus(0)
    assert received == data
    assert world.cutter.cuts >= 5
    world.cutter.after = 1 << 40
    await session.aclose()


async def test_cut_while_idle(world: World) -> None:
    session = await counting(world, 3)
    async with asyncio.timeout(DEADLINE):
        while b"line 3\n" not in await session.read():
            pass
        world.cutter.cut()
        await session.write(b"after all\n")
        assert await read_all(session) == b"got after all\n"
        assert await session.wait() == ExitStatus(0)
    await session.aclose()


async def test_a_program_ends_while_nobody_is_connected(world: World) -> None:
    session = await run(world, command="read x; sleep 0.3; echo done; exit 7")
    await session.write(b"\n")
    world.cutter.refusing = True
    world.cutter.cut()
    await asyncio.sleep(0.6)
    world.cutter.refusing = False
    async with asyncio.timeout(DEADLINE):
        assert await read_all(session) == b"done\n"
        assert await session.wait() == ExitStatus(7)
    await session.aclose()


@pytest.mark.parametrize("late", [False, True])
async def test_the_guest_is_told_that_all_was_read(world: World, late: bool) -> None:
    session = await run(world, command="echo done", name="to be forgotten")
    async with asyncio.timeout(DEADLINE):
        assert await read_all(session) == b"done\n"
        assert await session.wait() == ExitStatus(0)
        world.cutter.cut()
        if late:
            world.cutter.refusing = True
            await asyncio.sleep(0.2)
            world.cutter.refusing = False
        await session.aclose()
        assert await session.wait() == ExitStatus(0)
        while any(item.name == "to be forgotten" for item in await world.guests.sessions(world.account, world.sandbox)):  # noqa: ASYNC110
            await asyncio.sleep(0.05)


async def test_many_sessions_share_the_new_link(world: World) -> None:
    sessions = [await run(world, argv=("cat",)) for _ in range(20)]
    world.cutter.cut()
    async with asyncio.timeout(DEADLINE):
        for session in sessions:
            await session.write(b"still there")
            session.write_eof()
        assert await asyncio.gather(*(read_all(session) for session in sessions)) == [b"still there"] * 20
    assert len(world.pool.status()) == 1
    for session in sessions:
        await session.aclose()


async def test_longer_than_the_guest_waits(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guest_session, "BACKOFF_MAX", 0.1)
    session = await world.guests.process(world.account, world.sandbox, ProcessSpec(argv=("cat",), linger=1))
    world.cutter.refusing = True
    world.cutter.cut()
    error = await lost(session)
    assert error.kind == "unavailable"
    assert "cannot be reached" in error.message
    world.cutter.refusing = False


async def test_how_long_streams_and_listeners_are_kept(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ABSENCE == 24 * 60 * 60
    for module in (guest_client, guest_streams):
        monkeypatch.setattr(module, "ABSENCE", 1)
    monkeypatch.setattr(guest_session, "BACKOFF_MAX", 0.1)

    async def hold(stream: ByteStream, peer: str) -> None:
        await stream.read(1)

    place = (world.account, world.sandbox)
    listeners = [await world.guests.listen_tcp(*place, "localhost", 0, "", hold)]
    listeners.append(await world.guests.listen_unix(*place, "/tmp/kept", "", hold))
    sftp = await world.guests.sftp(*place)
    streams = [await world.guests.connect_unix(*place, "/tmp/kept")]
    streams.append(await world.guests.connect_tcp(*place, "localhost", listeners[0].port))
    pool = Pool(Directory())
    past = Guests(Directory(), pool)  # sees the guest while the relay lets nobody through
    kinds = {item.kind for item in await past.sessions(world.control, world.sandbox)}
    assert kinds == {"listen-tcp", "listen-unix", "sftp", "tcp", "unix"}
    world.cutter.refusing = True
    world.cutter.cut()
    async with asyncio.timeout(DEADLINE):
        while await past.sessions(world.control, world.sandbox):  # noqa: ASYNC110
            await asyncio.sleep(0.05)
        assert "cannot be reached" in (await lost(sftp)).message
        for stream in streams:
            assert isinstance(stream, guest_streams.GuestStream)
            assert "cannot be reached" in (await stream.broken()).message
            stream.abort()
        for listener in listeners:
            error = await listener.wait_closed()
            assert error is not None
            assert "cannot be reached" in error.message
            await listener.aclose()
    await past.aclose()
    await pool.aclose()
    world.cutter.refusing = False


async def test_the_guest_is_killed(own: World) -> None:
    session = await run(own, argv=("cat",))
    await own.sh("kill -9 $(ps -eo pid,args | awk '/guest-[0-9a-f]+.py start/ && !/awk/ {print $1}')")
    error = await lost(session)
    assert "restarted, or its guest ended: the session is gone" in error.message
    again = await run(own, argv=("echo", "here"))
    assert await read_all(again) == b"here\n"
    await again.aclose()


async def test_the_sandbox_is_stopped(own: World) -> None:
    session = await run(own, argv=("sh", "-c", STUBBORN))
    idle = asyncio.ensure_future(session.read())
    stop = asyncio.ensure_future(own.control.rest.stop(own.sandbox))
    error = await lost(session)
    assert error.kind == "stopped"
    assert error.message == f"sandbox {own.sandbox!r} was stopped: the session is over"
    with pytest.raises(GatewayError):
        await idle
    await stop
    assert await own.status() == "stopped"
    for wanted in (own.guests.ready, own.guests.sessions):
        with pytest.raises(GatewayError, match="is stopped") as caught:
            await wanted(own.account, own.sandbox, wake=False)
        assert caught.value.kind == "stopped"
    with pytest.raises(GatewayError) as caught:
        await own.pool.dial(own.account, own.sandbox, 80, wake=False)
    assert caught.value.kind == "stopped"
    assert await own.status() == "stopped"
    again = await run(own, argv=("echo", "woken"))
    assert await read_all(again) == b"woken\n"
    await again.aclose()


async def test_the_sandbox_is_restarted_behind_our_back(own: World) -> None:
    session = await run(own, argv=("cat",))
    own.cutter.refusing = True
    own.cutter.cut()
    await own.control.rest.stop(own.sandbox)
    await own.control.rest.start(own.sandbox)
    own.cutter.refusing = False
    error = await lost(session)
    assert "the session is gone" in error.message


async def test_the_sandbox_is_deleted(own: World) -> None:
    session = await run(own, argv=("sh", "-c", STUBBORN))
    deletion = asyncio.ensure_future(own.control.rest.delete(own.sandbox))
    error = await lost(session)
    await deletion
    # It stops first, and may be seen in any of these states.
    assert any(word in error.message for word in ("was stopped", "is deleting", "was deleted")), error.message
    with pytest.raises(GatewayError) as caught:
        await run(own, argv=("true",))
    assert caught.value.kind == "not_found"


async def test_closing_while_the_link_is_down(world: World) -> None:
    await world.sh("rm -f /tmp/alive")
    session = await run(world, command="trap 'rm /tmp/alive' EXIT; echo > /tmp/alive; echo ready; read x")
    assert await session.read() == b"ready\n"
    world.cutter.refusing = True
    world.cutter.cut()
    await session.aclose()
    world.cutter.refusing = False
    async with asyncio.timeout(DEADLINE):
        while "yes" in await world.sh("[ -e /tmp/alive ] && echo yes || true"):  # noqa: ASYNC110 - the sandbox sends no event
            await asyncio.sleep(0.05)


async def test_another_client_takes_over(world: World) -> None:
    session = await run(world, argv=("cat",), pty=True)
    stream, answer = await world.guests.connect(
        world.account,
        world.sandbox,
        session_id=session._core.id,  # type: ignore[attr-defined]
        mode=2,
        received=0,
        wake=False,
    )
    assert answer.status == 0
    error = await lost(session)
    assert "taken over" in error.message
    await stream.write(wire.encode_frame(wire.Kind.CLOSE))
    async with asyncio.timeout(DEADLINE):
        while await stream.read():
            pass
    await stream.aclose()


async def test_the_guest_is_stopped_for_a_while(world: World) -> None:
    """Nothing but time passes for a session whose guest does not run."""
    session = await run(world, argv=("cat",))
    await world.sh("kill -STOP $(ps -eo pid,args | awk '/guest-[0-9a-f]+.py start/ && !/awk/ {print $1}')")
    await session.write(bytes(1000))
    world.cutter.cut()
    await asyncio.sleep(0.3)
    await world.sh("kill -CONT $(ps -eo pid,args | awk '/guest-[0-9a-f]+.py start/ && !/awk/ {print $1}')")
    async with asyncio.timeout(DEADLINE):
        assert len(await session.read()) == 1000
    session.signal(signal.Signals.SIGTERM.name[3:])
    assert (await session.wait()).signal == "TERM"
    await session.aclose()

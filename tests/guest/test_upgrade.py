"""Sessions that were opened by an earlier version of the gateway, whose guest is another file."""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import AsyncIterator, Callable

import pytest

from gatewayd.errors import GatewayError
from gatewayd.guest.events import Event, Exit, Output, OutputEof
from gatewayd.guest.session import ClientSession
from gatewayd.guest.wire import Mode, Status
from gatewayd.relay import ByteStream
from gatewayd.sandbox import guest_boot
from gatewayd.sandbox.guest_client import Guests
from tests.guest.conftest import World
from tests.guest.test_processes import DEADLINE, read_all, run

pytestmark = pytest.mark.e2e


class Command:
    """A session as `sandbox exec` has it: its numbers are the client's own, and outlive the daemon."""

    def __init__(self, world: World, core: ClientSession) -> None:
        self.world = world
        self.core = core
        self.output = bytearray()  # of stream 1
        self.events: list[Event] = []  # all others
        self.stream: ByteStream | None = None

    async def connect(self, guests: Guests) -> None:
        world, core = self.world, self.core
        stream, answer = await guests.connect(
            world.account, world.sandbox, session_id=core.id, mode=core.mode, received=core.received, wake=False
        )
        self.stream = stream
        core.connected(answer)
        await self.send()

    async def send(self) -> None:
        assert self.stream is not None
        if frames := self.core.data_to_send():
            await self.stream.write(b"".join(frames))

    async def until(self, what: Callable[[], object]) -> None:
        """Receive until `what` is true."""
        async with asyncio.timeout(DEADLINE):
            while not what():
                assert self.stream is not None
                data = await self.stream.read()
                assert data
                for event in self.core.receive(data, 0.0):
                    if isinstance(event, Output):
                        self.core.grant(event.stream, len(event.data))
                        self.output += event.data
                    else:
                        self.events.append(event)
                await self.send()

    def leave(self) -> None:
        """The daemon ends."""
        assert self.stream is not None
        self.stream.abort()
        self.core.disconnected()

    async def close(self) -> None:
        self.core.close()
        await self.send()
        await self.until(lambda: not self.core.unacknowledged)
        self.leave()


def use(monkeypatch: pytest.MonkeyPatch, version: bytes) -> None:
    """Let guests be started from the real file, with a comment."""
    content = guest_boot.guest_file()[2] + b"# %s\n" % version
    digest = hashlib.sha256(content).hexdigest()
    monkeypatch.setattr(guest_boot, "guest_file", lambda: (f"guest-{digest[:16]}.py", digest, content))


@pytest.fixture
async def upgraded(own: World, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Guests]:
    """The guests of a daemon of the present version; the world's own are those of an earlier one."""
    with monkeypatch.context() as patch:
        use(patch, b"an earlier version")
        await own.guests.ready(own.account, own.sandbox)
    guests = Guests(own.directory, own.pool)
    yield guests
    await guests.aclose()


async def test_a_program_goes_on_without_loss(own: World, upgraded: Guests) -> None:
    core = ClientSession()
    core.open([("kind", b"process"), ("command", b"cat; exit 4"), ("name", b"of old")])
    command = Command(own, core)
    await command.connect(own.guests)
    data = os.urandom(1 << 20) * 3
    await command.until(lambda: core.opened)
    given = core.send_input(data)
    await command.send()
    await command.until(lambda: len(command.output) > 100_000)
    command.leave()
    await own.guests.aclose()

    await command.connect(upgraded)
    while given < len(data):
        given += core.send_input(memoryview(data)[given:])
        await command.send()
        await command.until(lambda: core.input_credit)
    core.input_eof()
    await command.send()
    ends: list[Event] = [OutputEof(1), OutputEof(2), Exit(4, "", False)]
    await command.until(lambda: all(end in command.events for end in ends))
    assert bytes(command.output) == data
    await command.close()
    assert await upgraded.sessions(own.account, own.sandbox) == []


async def test_lists_and_attach_find_both(own: World, upgraded: Guests) -> None:
    old = await run(own, argv=("cat",), name="old")
    own.guests, earlier = upgraded, own.guests
    new = await run(own, argv=("cat",), name="new")
    items = {item.name: item for item in await upgraded.sessions(own.account, own.sandbox)}
    assert set(items) == {"old", "new"}
    assert (items["old"].pid, items["new"].pid) == (old.pid, new.pid)
    (port,) = upgraded.others(own.account, own.sandbox)

    core = ClientSession.attach(bytes.fromhex(items["old"].id))
    command = Command(own, core)
    await command.connect(upgraded)
    core.send_input(b"hello")
    core.input_eof()
    await command.send()
    await command.until(lambda: Exit(0, "", False) in command.events and OutputEof(1) in command.events)
    assert bytes(command.output) == b"hello"
    with pytest.raises(GatewayError, match="taken over"):
        await old.wait()
    await command.close()
    assert [item.name for item in await upgraded.sessions(own.account, own.sandbox)] == ["new"]

    await own.sh("kill -9 $(ps -eo pid,args | awk '/guest-[0-9a-f]+.py start/ && !/awk/ {print $1}' | head -n 1)")
    own.guests = earlier
    with pytest.raises(GatewayError) as caught:
        await upgraded.connect(
            own.account, own.sandbox, session_id=bytes(16), mode=Mode.ATTACH, received=0, wake=False, port=port
        )
    assert caught.value.kind == "not_found"
    assert caught.value.message == f"sandbox {own.sandbox!r} has no other guest on port {port}"
    assert [item.name for item in await upgraded.sessions(own.account, own.sandbox)] == ["new"]
    assert upgraded.others(own.account, own.sandbox) == []
    await new.write(b"still there")
    new.write_eof()
    assert await read_all(new) == b"still there"
    await new.aclose()
    await old.aclose()


async def test_a_guest_that_was_started_later_is_found_too(own: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two gateways of different versions share a sandbox."""
    monkeypatch.setattr("gatewayd.sandbox.guest_host.OTHERS_MEMORY", 0.0)
    await own.guests.ready(own.account, own.sandbox)
    other = Guests(own.directory, own.pool)
    with monkeypatch.context() as patch:
        use(patch, b"of another machine")
        await other.ready(own.account, own.sandbox)
    mine, own.guests = own.guests, other
    session = await run(own, argv=("cat",), name="theirs")
    (item,) = await other.sessions(own.account, own.sandbox)
    own.guests = mine
    command = Command(own, ClientSession.attach(bytes.fromhex(item.id)))
    await command.connect(mine)
    await command.close()
    await session.aclose()
    await other.aclose()


async def test_a_session_that_no_guest_knows(own: World, upgraded: Guests) -> None:
    stream, answer = await upgraded.connect(
        own.account, own.sandbox, session_id=bytes(16), mode=Mode.RESUME, received=0, wake=False
    )
    assert answer.status == Status.NO_SESSION
    stream.abort()
    assert len(upgraded.others(own.account, own.sandbox)) == 1

"""Channels to a client's SSH agent, over socket pairs in place of a sandbox's listener."""

from __future__ import annotations

import asyncio
import base64
import socket
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from gatewayd.local import agentchannel, agentforward
from gatewayd.local.agentforward import MAX_CHANNELS, MAX_DATA, AgentClient, AgentForward, AgentMessage, decoded
from gatewayd.local.runtime.base import RuntimeFailure

from .conftest import open_descriptors


class Listening:
    """A `runtime.base.Box` and its listener: only what they are asked for here."""

    def __init__(self, failure: Exception | None = None) -> None:
        self.path = "/tmp/inside"
        self.failure = failure  # raised in place of listening
        self.user: str | None = None
        self.on_connection: Callable[[socket.socket], None] = socket.socket.close
        self.closed = False
        self._ends: list[socket.socket] = []

    async def listen_unix(self, user: str | None, on_connection: Callable[[socket.socket], None]) -> Listening:
        if self.failure is not None:
            raise self.failure
        self.user, self.on_connection = user, on_connection
        return self

    def connect(self) -> socket.socket:
        """A program inside connects."""
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        theirs.setblocking(False)
        self._ends.append(ours)
        self.on_connection(theirs)
        return ours

    def close(self) -> None:
        self.closed = True

    async def removed(self) -> None:
        assert self.closed

    def clean(self) -> None:
        """Close the programs' ends."""
        for sock in self._ends:
            sock.close()


@pytest.fixture
async def box() -> AsyncIterator[Listening]:
    before = open_descriptors()
    made = Listening()
    yield made
    made.clean()
    assert open_descriptors() == before


@pytest.fixture
async def forward(box: Listening) -> AsyncIterator[AgentForward]:
    made = AgentForward()
    assert await made.open(box, "user") == box.path  # type: ignore[arg-type]  # a part of a box
    assert box.user == "user"
    yield made
    made.close()
    made.close()
    await made.removed()


async def get(client: AgentClient) -> AgentMessage:
    """The next message for the client, taken."""
    message = await asyncio.wait_for(client.next(), 5)
    client.sent(message)
    return message


async def read(sock: socket.socket) -> bytes:
    return await asyncio.wait_for(asyncio.get_running_loop().sock_recv(sock, 1 << 20), 5)


def data(channel_id: object, content: bytes) -> dict[str, Any]:
    return {"type": "ssh_agent_data", "channel_id": channel_id, "data": base64.b64encode(content).decode()}


def close(channel_id: object) -> dict[str, Any]:
    return {"type": "ssh_agent_close", "channel_id": channel_id}


async def test_question_and_answer(box: Listening, forward: AgentForward) -> None:
    client = forward.attach()
    program = box.connect()
    program.send(b"question")
    assert await get(client) == AgentMessage("1", b"question")
    assert client.receive(data("1", b"answer")) is None
    assert client.receive(data(1, b"!")) is None
    assert await read(program) == b"answer!"
    program.close()
    assert await get(client) == AgentMessage("1", None)
    assert client.receive(data("1", b"late")) is None


async def test_nothing_is_told_of_a_connection_without_data(box: Listening, forward: AgentForward) -> None:
    client = forward.attach()
    box.connect().close()
    program = box.connect()
    assert client.receive(data("2", b"too early: nobody has told of it")) is None
    program.send(b"x")
    assert await get(client) == AgentMessage("2", b"x")
    assert client.receive(data("2", b"in time")) is None
    assert await read(program) == b"in time"


async def test_one_piece_is_under_way(box: Listening, forward: AgentForward) -> None:
    client = forward.attach()
    program = box.connect()
    sending = asyncio.ensure_future(asyncio.get_running_loop().sock_sendall(program, bytes(4 << 20)))
    first = await asyncio.wait_for(client.next(), 5)
    with pytest.raises(TimeoutError):  # its turn comes when the first is taken
        await asyncio.wait_for(client.next(), 0.1)
    assert not sending.done()
    client.sent(first)
    total = len(first.data or b"")
    while total < 4 << 20:
        total += len((await get(client)).data or b"")
    await sending
    assert total == 4 << 20


async def test_the_client_closes_after_its_answer(box: Listening, forward: AgentForward) -> None:
    client = forward.attach()
    program = box.connect()
    program.send(b"question")
    await get(client)
    program.send(b"another")
    async with asyncio.timeout(5):
        while not client._queue:  # noqa: ASYNC110 - it is not sent after the client's close: it would open the channel anew there
            await asyncio.sleep(0)
    for _ in range(2):
        assert client.receive(data("1", b"a" * 250_000)) is None
    assert client.receive(close("1")) is None
    assert client.receive(close("1")) is None
    answer = b""
    while piece := await read(program):
        answer += piece
    assert answer == b"a" * 500_000
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(client.next(), 0.05)


async def test_a_close_that_nobody_takes_is_over_after_a_while(
    box: Listening, forward: AgentForward, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agentchannel, "LINGER", 0.05)
    client = forward.attach()
    program = box.connect()
    program.send(b"question")
    await get(client)
    for _ in range(4):
        client.receive(data("1", bytes(250_000)))
    client.receive(close("1"))
    client.receive(data("1", b"after the close"))
    async with asyncio.timeout(5):
        while client._channels:  # noqa: ASYNC110 - the end of a channel that the client closed is told to nobody
            await asyncio.sleep(0.01)
    received = b""
    while piece := await read(program):
        received += piece
    assert 0 < len(received) < 1_000_000


async def test_a_half_close_waits_for_the_answer_and_then_for_the_close(box: Listening, forward: AgentForward) -> None:
    client = forward.attach()
    program = box.connect()
    program.send(b"question")
    program.shutdown(socket.SHUT_WR)
    assert await get(client) == AgentMessage("1", b"question")
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(client.next(), 0.05)
    client.receive(data("1", b"answer"))
    assert await read(program) == b"answer"
    program.close()
    assert await get(client) == AgentMessage("1", None)


async def test_a_client_that_does_not_answer(box: Listening, forward: AgentForward, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agentchannel, "ANSWER_DEADLINE", 0.05)
    client = forward.attach()
    program = box.connect()
    program.send(b"question")
    assert await get(client) == AgentMessage("1", b"question")
    assert await get(client) == AgentMessage("1", None)
    assert await read(program) == b""


async def test_places_are_free_again_when_the_client_knows(box: Listening, forward: AgentForward) -> None:
    client = forward.attach()
    programs = [box.connect() for _ in range(MAX_CHANNELS)]
    assert await read(box.connect()) == b""
    programs[0].send(b"x")
    assert await get(client) == AgentMessage("1", b"x")
    programs[0].close()
    message = await asyncio.wait_for(client.next(), 5)
    assert message == AgentMessage("1", None)
    assert await read(box.connect()) == b""  # the client has not taken it yet
    client.sent(message)
    program = box.connect()
    program.send(b"y")
    assert (await get(client)).data == b"y"


async def test_clients_come_and_go(box: Listening, forward: AgentForward) -> None:
    first = forward.attach()
    program = box.connect()
    program.send(b"for the first")
    assert (await get(first)).data == b"for the first"
    second = forward.attach()
    other = box.connect()
    other.send(b"for the second")
    message = await get(second)
    assert message.data == b"for the second"
    assert first.receive(data(message.channel_id, b"not its own")) is None
    second.close()
    second.close()
    assert await read(other) == b""
    first.receive(data("1", b"still there"))
    assert await read(program) == b"still there"
    first.close()
    assert await read(program) == b""
    assert await read(box.connect()) == b""
    second.connected("9", (pair := socket.socketpair())[0])  # too late
    assert pair[0].fileno() == -1
    pair[1].close()


async def test_a_command_faster_than_its_client(box: Listening, forward: AgentForward) -> None:
    programs = [box.connect() for _ in range(MAX_CHANNELS)]
    assert await read(box.connect()) == b""  # more do not wait
    programs[0].send(b"question")
    client = forward.attach()
    assert await get(client) == AgentMessage("1", b"question")
    for program in programs:
        program.close()
    client.close()
    assert await read(box.connect()) == b""  # it was there


async def test_a_first_client_that_never_comes(box: Listening, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agentforward, "FIRST_CLIENT", 0.05)
    forward = AgentForward()
    await forward.open(box, None)  # type: ignore[arg-type]  # a part of a box
    assert await read(box.connect()) == b""
    assert await read(box.connect()) == b""
    forward.close()


async def test_a_command_that_ends_before_its_client_comes(box: Listening, forward: AgentForward) -> None:
    program = box.connect()
    forward.close()
    assert await read(program) == b""


async def test_the_end_of_the_command(box: Listening, forward: AgentForward) -> None:
    client = forward.attach()
    program = box.connect()
    program.send(b"x")
    await get(client)
    forward.close()
    await forward.removed()
    assert await read(program) == b""
    assert await get(client) == AgentMessage("1", None)
    assert await read(box.connect()) == b""


@pytest.mark.parametrize(
    "failure", [PermissionError(13, "Permission denied", "/tmp"), RuntimeFailure("the sandbox has ended"), OSError("odd")]
)
async def test_where_there_is_no_socket(failure: Exception) -> None:
    forward = AgentForward()
    with pytest.raises(RuntimeFailure, match=r"no socket for the SSH agent: \w"):
        await forward.open(Listening(failure), None)  # type: ignore[arg-type]  # a part of a box
    forward.close()
    await forward.removed()


def test_base64() -> None:
    assert decoded("") == b""
    assert decoded(base64.b64encode(bytes(MAX_DATA)).decode()) == bytes(MAX_DATA)
    wrongs: list[object] = ["A", "AA=A", "AAA", "A\nAA=", "ä===", "\ud800", None, 1, b"AAAA", []]
    for wrong in (base64.b64encode(bytes(MAX_DATA + 3)).decode(), *wrongs):
        assert isinstance(decoded(wrong), str)

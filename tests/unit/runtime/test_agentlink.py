"""The service's end of the agent's channel, against an agent that has been taken over."""

from __future__ import annotations

import array
import asyncio
import contextlib
import errno
import json
import os
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from gatewayd.local.runtime.agentlink import AgentLink
from gatewayd.local.runtime.base import RuntimeFailure
from gatewayd.local.runtime.inside import packets


def descriptors() -> set[str]:
    return {entry.name for entry in Path("/proc/self/fd").iterdir()}


class Agent:
    """The other end, which sends what a test tells it to."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        theirs.setblocking(False)
        self.sock = theirs
        self.lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.link = AgentLink(ours, self.lost.set_result)

    def send(self, data: bytes | dict[str, Any], fds: int = 0) -> None:
        """One packet, with that many descriptors."""
        null = os.open("/dev/null", os.O_RDONLY)
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [null] * fds))] if fds else []
        try:
            self.sock.sendmsg([data if isinstance(data, bytes) else json.dumps(data).encode()], rights)
        finally:
            os.close(null)

    async def asked(self) -> dict[str, Any]:
        """The next request."""
        return dict(json.loads(await asyncio.get_running_loop().sock_recv(self.sock, packets.MAX_PACKET)))

    def close(self) -> None:
        self.link.close()
        self.sock.close()


@pytest.fixture
async def agent() -> AsyncIterator[Agent]:
    before = descriptors()
    agent = Agent()
    yield agent
    agent.close()
    assert descriptors() == before


@pytest.mark.parametrize(
    "garbage",
    [
        *(b"\0", b"not json", b"[]", b"null", b"{", b"\xff\xfe", b"[" * 150_000, b'{"id":' + b"9" * 5000 + b"}"),
        *(b"{}", b'{"id": 7}', b'{"id": true}', b'{"id": "1"}', b'{"event": "exit", "pid": 1, "code": 0}'),
        *(b'{"event": "exit", "pid": [], "code": {}}', b'{"event": ["hello"]}', b"x" * (packets.MAX_PACKET + 1)),
    ],
    ids=lambda garbage: repr(garbage[:24]),
)
@pytest.mark.parametrize("fds", [0, 1, 200])
async def test_garbage_ends_the_channel_and_nothing_else(agent: Agent, garbage: bytes, fds: int) -> None:
    agent.send(garbage, fds)
    async with asyncio.timeout(5):
        assert await agent.lost
    with pytest.raises(RuntimeFailure, match="has ended"):
        await agent.link.request("spawn")


async def test_too_many_descriptors_are_an_error_of_that_request(agent: Agent) -> None:
    async with asyncio.timeout(5), asyncio.TaskGroup() as group:
        request = group.create_task(_failed(agent.link, "open_read"))
        agent.send({"id": (await agent.asked())["id"], "ok": {}}, 200)
        assert await request == errno.EMFILE
    assert not agent.lost.done()


async def _failed(link: AgentLink, op: str) -> int | None:
    with pytest.raises(OSError) as caught:
        await link.request(op)
    return caught.value.errno


async def test_an_answer_counts_once(agent: Agent) -> None:
    async with asyncio.timeout(5), asyncio.TaskGroup() as group:
        request = group.create_task(agent.link.request("terminate"))
        number = (await agent.asked())["id"]
        agent.send({"id": number, "ok": "no object"})
        agent.send({"id": number, "ok": {}}, 3)
        assert await request == ({}, [])
        assert "nobody asked" in await agent.lost


async def test_an_exit_right_behind_the_answer_is_not_missed(agent: Agent) -> None:
    async with asyncio.timeout(5), asyncio.TaskGroup() as group:
        request = group.create_task(agent.link.request("spawn"))
        agent.send({"id": (await agent.asked())["id"], "ok": {"pid": 7, "exited": "forged"}})
        agent.send({"event": "exit", "pid": 7, "code": 3})
        answer, _ = await request
        assert await answer["exited"] == 3


async def test_a_process_of_a_lost_agent_counts_as_killed(agent: Agent) -> None:
    async with asyncio.timeout(5), asyncio.TaskGroup() as group:
        request = group.create_task(agent.link.request("spawn"))
        agent.send({"id": (await agent.asked())["id"], "ok": {"pid": 7}})
        answer, _ = await request
        agent.sock.shutdown(socket.SHUT_RDWR)
        assert await answer["exited"] == 137


async def test_what_a_cancelled_request_got_is_given_back(agent: Agent) -> None:
    unwanted: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
    async with asyncio.timeout(5), asyncio.TaskGroup() as group:
        request = group.create_task(agent.link.request("spawn", unwanted=unwanted.set_result))
        number = (await agent.asked())["id"]
        request.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await request
        agent.send({"id": number, "ok": {"pid": 7}}, 3)
        assert (await unwanted)["pid"] == 7
    assert not agent.lost.done()


async def test_a_flood_is_one_packet(agent: Agent) -> None:
    sent = 0
    with contextlib.suppress(BlockingIOError):
        while sent < 1000:
            agent.send({"event": "exit", "pid": sent, "code": 0}, 3)
            sent += 1
    assert sent > 1
    async with asyncio.timeout(5):
        await agent.lost  # and the descriptors of the others went with the socket: the fixture counts


async def test_a_silent_agent_takes_a_limited_number_of_requests(agent: Agent, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gatewayd.local.runtime.agentlink._MAX_PENDING", 100)
    for _ in range(100):
        agent.link.tell("signal", pid=1, signal=9)
    with pytest.raises(RuntimeFailure, match="too many"):
        await agent.link.request("spawn")

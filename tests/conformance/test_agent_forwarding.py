"""A real ssh-agent on this machine answers a real ssh-add inside, with every runtime."""

from __future__ import annotations

import asyncio
import base64
import os
import shutil
import subprocess
from collections.abc import Iterator

import pytest

from gatewayd.local.agentforward import VARIABLE, AgentClient, AgentForward
from gatewayd.local.runtime.base import Box

from .conftest import run

pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.skipif(shutil.which("ssh-agent") is None, reason="ssh-agent is not installed"),
]

DEADLINE = 30.0  # seconds for one ssh-add


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The socket of an agent with a key."""
    folder = tmp_path_factory.mktemp("agent")
    path = str(folder / "socket")
    process = subprocess.Popen(["ssh-agent", "-D", "-a", path], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()  # it listens
    key = str(folder / "key")
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "held outside", "-f", key], check=True)
    subprocess.run(["ssh-add", "-q", key], check=True, env={**os.environ, VARIABLE: path})
    yield path
    process.terminate()
    process.wait(10)
    process.stdout.close()


async def pass_on(client: AgentClient, agent: str) -> None:
    """Connect channels with the agent, as a client of the protocol does."""
    writers: dict[str, asyncio.StreamWriter] = {}
    answering: list[asyncio.Future[None]] = []

    async def answer(channel_id: str, reader: asyncio.StreamReader) -> None:
        while data := await reader.read(16384):
            message = {"type": "ssh_agent_data", "channel_id": channel_id, "data": base64.b64encode(data).decode()}
            assert client.receive(message) is None

    try:
        while True:
            message = await client.next()
            if message.data is None:
                writers.pop(message.channel_id).close()
            else:
                if message.channel_id not in writers:
                    reader, writers[message.channel_id] = await asyncio.open_unix_connection(agent)
                    answering.append(asyncio.ensure_future(answer(message.channel_id, reader)))
                writers[message.channel_id].write(message.data)
            client.sent(message)
    finally:
        for writer in writers.values():
            writer.close()
        await asyncio.gather(*answering)


@pytest.mark.parametrize("user", [None, "user"])
async def test_keys_are_listed(box: Box, agent: str, user: str | None) -> None:
    forward = AgentForward()
    env = {VARIABLE: await forward.open(box, user)}
    passing = asyncio.ensure_future(pass_on(forward.attach(), agent))
    try:
        ran = await asyncio.wait_for(run(box, "ssh-add", "-l", env=env, user=user), DEADLINE)
        assert ran.code == 0, ran
        assert b"held outside" in ran.out
        script = "cd; ssh-keygen -q -t ed25519 -N '' -f new -C made; ssh-add -q new && ssh-add -L && ssh-add -q -d new; rm new*"
        ran = await asyncio.wait_for(run(box, "/bin/sh", "-c", script, env=env, user=user), DEADLINE)
        assert (ran.out.count(b"ssh-ed25519"), ran.out.split()[-1]) == (2, b"made"), ran
    finally:
        forward.close()
        await forward.removed()
        passing.cancel()
        await asyncio.wait([passing])
    assert (await run(box, "ssh-add", "-l", env=env, user=user)).code == 2  # no agent there


async def test_without_a_client_nobody_answers(box: Box, agent: str) -> None:
    forward = AgentForward()
    env = {VARIABLE: await forward.open(box, None)}
    client = forward.attach()
    client.close()
    assert (await asyncio.wait_for(run(box, "ssh-add", "-l", env=env), DEADLINE)).code in (1, 2, 141)
    forward.close()
    await forward.removed()

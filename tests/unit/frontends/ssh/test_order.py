"""Forwards begin at once, are answered in their order, and sessions wait for them."""

from __future__ import annotations

import asyncio
import socket

import asyncssh
from asyncssh.constants import MSG_REQUEST_FAILURE, MSG_REQUEST_SUCCESS
from asyncssh.packet import String, UInt32

from tests.unit.frontends.ssh.parts import Front
from tests.unit.frontends.ssh.test_server import connected


def free_ports(count: int) -> list[int]:
    socks = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [sock.getsockname()[1] for sock in socks]
    for sock in socks:
        sock.close()
    return ports


async def ask(client: asyncssh.SSHClientConnection, port: int, name: bytes = b"tcpip-forward") -> int:
    """The type of the answer."""
    answer, _ = await client._make_global_request(name, String("127.0.0.1"), UInt32(port))
    return answer


async def requested(front: Front, count: int) -> list[int]:
    """The ports that the sandbox was asked for next."""
    async with asyncio.timeout(20):
        return [await front.guests.listening.get() for _ in range(count)]


async def test_listeners_are_opened_side_by_side_and_sessions_wait(front: Front) -> None:
    ports = free_ports(3)
    async with connected(front) as client:
        front.guests.answers.clear()
        async with asyncio.TaskGroup() as group:
            answers = [group.create_task(ask(client, port)) for port in ports]
            running = group.create_task(client.run("echo ran"))
            assert await requested(front, 3) == ports
            assert not front.guests.sessions
            front.guests.answers.set()
        assert [answer.result() for answer in answers] == [MSG_REQUEST_SUCCESS] * 3
        assert running.result().stdout == "ran\n"


async def test_the_first_one_gets_a_port_that_two_want(front: Front) -> None:
    one, two = free_ports(2)
    async with connected(front) as client:
        front.guests.answers.clear()
        async with asyncio.TaskGroup() as group:
            answers = [group.create_task(ask(client, port)) for port in (one, two, one)]
            assert await requested(front, 2) == [one, two]
            assert front.guests.listening.empty()
            front.guests.answers.set()
        assert [answer.result() for answer in answers] == [MSG_REQUEST_SUCCESS, MSG_REQUEST_SUCCESS, MSG_REQUEST_FAILURE]


async def test_what_comes_after_a_cancellation_waits_for_it(front: Front) -> None:
    one, two, three = free_ports(3)
    async with connected(front) as client:
        assert await ask(client, one) == MSG_REQUEST_SUCCESS
        await requested(front, 1)
        front.guests.answers.clear()
        async with asyncio.TaskGroup() as group:
            first = group.create_task(ask(client, two))
            cancelled = group.create_task(ask(client, one, b"cancel-tcpip-forward"))
            last = group.create_task(ask(client, three))
            assert await requested(front, 1) == [two]
            assert front.guests.listening.empty()
            front.guests.answers.set()
        assert [task.result() for task in (first, cancelled, last)] == [MSG_REQUEST_SUCCESS] * 3
        assert front.guests.listeners[0].closed


async def test_a_command_does_not_begin_when_a_forward_fails(front: Front) -> None:
    [port] = free_ports(1)
    for _ in range(3):
        wanted = [word for host in ("127.0.0.1", "localhost") for word in ("-R", f"{host}:{port}:127.0.0.1:1")]
        code, out, _ = await front.run("ssh", *wanted, "-o", "ExitOnForwardFailure=yes", "box", "echo ran")
        assert (code, out) == (255, b"")


async def test_a_client_that_leaves_meanwhile_leaves_no_listener(front: Front) -> None:
    [port] = free_ports(1)
    async with connected(front) as client:
        front.guests.answers.clear()
        asked = asyncio.ensure_future(ask(client, port))
        await requested(front, 1)
        client.abort()
        assert await asked == MSG_REQUEST_FAILURE
    front.guests.answers.set()
    async with asyncio.timeout(20):
        while not front.guests.listeners or not front.guests.listeners[0].closed:  # noqa: ASYNC110 - it is ours, and tells nobody
            await asyncio.sleep(0.01)


async def test_who_speaks_no_ssh_is_told(front: Front) -> None:
    for greeting in (b"\r\n", b"GET / HTTP/1.1\r\n", b"SSH-1.5-old\r\n", b"SSH-2.0-\xff\r\n"):
        sock = front.dial()
        sock.setblocking(False)
        reader, writer = await asyncio.open_unix_connection(sock=sock)
        writer.write(greeting)
        async with asyncio.timeout(20):
            assert (await reader.readline()).startswith(b"SSH-2.0-")
            assert await reader.read() == b"Invalid SSH identification string.\r\n"
        writer.close()

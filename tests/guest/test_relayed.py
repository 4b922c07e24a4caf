"""What a relay learns from a connection inside a sandbox that it neither reads nor writes."""

from __future__ import annotations

import asyncio
import socket

from gatewayd.relay import SocketStream, relay
from tests.guest.conftest import World
from tests.guest.test_processes import DEADLINE
from tests.guest.test_streams import everything, server


async def test_a_loss_behind_the_end_of_one_direction(own: World) -> None:
    """The relay waits for what its own side may still send."""
    async with server(own, "tcp") as port:
        remote = await own.guests.connect_tcp(own.account, own.sandbox, "127.0.0.1", int(port))
        ours, theirs = socket.socketpair()
        relaying = asyncio.ensure_future(relay(SocketStream.from_socket(theirs), remote))
        near = SocketStream.from_socket(ours)
        await near.write(b"half")
        assert await everything(near) == b"first"
        await own.control.rest.stop(own.sandbox)
        async with asyncio.timeout(DEADLINE):
            result = await relaying
        assert "was stopped" in str(result.error)
        await near.aclose()

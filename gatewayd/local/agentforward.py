"""Forwarding a client's SSH agent into a sandbox (protocol section 2, *ssh_agent_forward*).

A command that asks for it finds a Unix socket in SSH_AUTH_SOCK. Each connection to it is a channel: its bytes go to the client as
``ssh_agent_data``, the client's come back the same way, and ``ssh_agent_close`` of either side ends it. A client learns of a
channel by its first data. The agent is that of the client attached last; channels end when their client goes, and without one
connections are closed at once, which ssh takes for an agent that is not there.
"""

from __future__ import annotations

import asyncio
import base64
import socket
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gatewayd.local.agentchannel import Channel
from gatewayd.local.runtime.base import Box, RuntimeFailure, UnixListener

VARIABLE = "SSH_AUTH_SOCK"  # where ssh-add(1) and all others look for an agent's socket
MAX_CHANNELS = 32  # of one client at the same time
FIRST_CLIENT = 30.0  # seconds that connections wait for the client that starts the command: the command may be faster than it
MAX_DATA = 256 * 1024 + 4  # bytes of one message: OpenSSH's longest, with its length before it


@dataclass(frozen=True)
class AgentMessage:
    """What a client is to be told."""

    channel_id: str
    data: bytes | None  # None: the channel is closed

    def fields(self) -> dict[str, str]:
        """The message as the protocol has it."""
        if self.data is None:
            return {"type": "ssh_agent_close", "channel_id": self.channel_id}
        return {"type": "ssh_agent_data", "channel_id": self.channel_id, "data": base64.b64encode(self.data).decode()}


class AgentClient:
    """One attached client of a command, whose agent is asked. Close it when the client goes."""

    def __init__(self, forward: AgentForward) -> None:
        self._forward = forward
        self._channels: dict[str, Channel] = {}  # by channel id, until the client has been told of the end, or told us
        self._told: set[str] = set()  # ids of channels that the client knows of
        self._queue: deque[AgentMessage] = deque()  # at most one piece and one close of each channel
        self._wake = asyncio.Event()  # set while something is queued
        self._closed = False  # the client has gone

    def connected(self, channel_id: str, sock: socket.socket) -> None:
        """Take a connection over; it is closed when there are MAX_CHANNELS already."""
        if self._closed or len(self._channels) >= MAX_CHANNELS:
            sock.close()
            return
        self._channels[channel_id] = Channel(channel_id, sock, self._said, self._ended)

    async def next(self) -> AgentMessage:
        """The next message for the client, as they come. Call `sent` when the connection has taken it."""
        while not self._queue:
            self._wake.clear()
            await self._wake.wait()
        return self._queue.popleft()

    def sent(self, message: AgentMessage) -> None:
        """The connection has taken a message: its channel may go on."""
        channel = self._channels.get(message.channel_id)
        if channel is None:
            return
        if message.data is None:
            del self._channels[message.channel_id]
        else:
            channel.resume()

    def receive(self, message: Mapping[str, Any]) -> str | None:
        """Act on the client's ``ssh_agent_data`` or ``ssh_agent_close``; what is wrong with it, if anything.

        A channel that is not there (any more) is nothing wrong: both sides may close it at the same time. Data that cannot be
        passed on end their channel, for its bytes would not be an agent's answer any more.
        """
        channel_id = message.get("channel_id")
        if type(channel_id) is int:  # the clients there are send what they got: text
            channel_id = str(channel_id) if abs(channel_id) < 1 << 63 else ""
        if not isinstance(channel_id, str):
            return "channel_id is text"
        channel = self._channels.get(channel_id)
        if channel is None or channel_id not in self._told:
            return None
        if message.get("type") == "ssh_agent_close":
            self._forget(channel)
            channel.finish()
            return None
        data = decoded(message.get("data"))
        if isinstance(data, str):
            channel.close()
            return f"{data}; agent channel {channel_id} closed"
        if not channel.feed(data):
            return f"nobody reads agent channel {channel_id}: closed"
        return None

    def _said(self, channel: Channel, data: bytes) -> None:
        self._told.add(channel.number)
        self._queue.append(AgentMessage(channel.number, data))
        self._wake.set()

    def _ended(self, channel: Channel) -> None:
        if channel.number in self._told:
            self._told.discard(channel.number)
            self._queue.append(AgentMessage(channel.number, None))  # its place is free once the client knows
            self._wake.set()
        else:
            self._channels.pop(channel.number, None)

    def _forget(self, channel: Channel) -> None:
        """The client needs to hear no more of a channel: a late piece would open it anew there."""
        self._told.discard(channel.number)
        for message in [queued for queued in self._queue if queued.channel_id == channel.number]:
            self._queue.remove(message)

    def close(self) -> None:
        """The client has gone: end its channels; idempotent."""
        self._closed = True
        self._forward.detach(self)
        for channel in list(self._channels.values()):
            channel.close()


def decoded(text: object) -> bytes | str:
    """The bytes of a message's base64, or what is wrong with it."""
    if not isinstance(text, str):
        return "data is text"
    if len(text) > (MAX_DATA + 2) // 3 * 4:
        return f"data has at most {MAX_DATA} bytes"
    try:
        return base64.b64decode(text, validate=True)
    except ValueError:
        return "data is not base64"


class AgentForward:
    """The socket of one command, and the clients whose agents answer there."""

    def __init__(self) -> None:
        self._listener: UnixListener | None = None  # set by open
        self._clients: list[AgentClient] = []  # attached; the last one is asked
        self._early: list[socket.socket] | None = []  # connections before the first client; None once they wait no more
        self._waiting: asyncio.TimerHandle | None = None  # runs until then, from open on
        self._serial = 0  # the last channel's id; never used twice

    async def open(self, box: Box, user: str | None) -> str:
        """Make the socket, the user's alone; returns its path inside. Raises RuntimeFailure."""
        try:
            self._listener = await box.listen_unix(user, self._connected)
        except OSError as exc:
            place = f": {exc.filename}" if isinstance(exc.filename, str) and exc.filename else ""
            raise RuntimeFailure(f"no socket for the SSH agent: {exc.strerror or exc}{place}") from exc
        except RuntimeFailure as exc:
            raise RuntimeFailure(f"no socket for the SSH agent: {exc}") from exc
        self._waiting = asyncio.get_running_loop().call_later(FIRST_CLIENT, self._wait_no_more)
        return self._listener.path

    def attach(self) -> AgentClient:
        """A client whose agent answers from now on, instead of those before it. Close it when it goes."""
        client = AgentClient(self)
        self._clients.append(client)
        self._wait_no_more()
        return client

    def detach(self, client: AgentClient) -> None:
        """A client is gone (called by the client); nothing when it is known."""
        if client in self._clients:
            self._clients.remove(client)

    def _connected(self, sock: socket.socket) -> None:
        if self._early is not None and len(self._early) < MAX_CHANNELS:
            self._early.append(sock)
        elif self._clients:
            self._serial += 1
            self._clients[-1].connected(str(self._serial), sock)
        else:
            sock.close()

    def _wait_no_more(self) -> None:
        """The first client is there, or will not come: deal with the connections made before; idempotent."""
        early, self._early = self._early or [], None
        if self._waiting is not None:
            self._waiting.cancel()
        for sock in early:
            self._connected(sock)

    def close(self) -> None:
        """End every channel, and have the socket removed; idempotent."""
        for client in list(self._clients):
            client.close()
        self._wait_no_more()
        if self._listener is not None:
            self._listener.close()

    async def removed(self) -> None:
        """Wait, for a few seconds at most, until the socket is removed. Call after `close`."""
        if self._listener is not None:
            await self._listener.removed()

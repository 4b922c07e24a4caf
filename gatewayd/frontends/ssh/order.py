"""The order of forwards: they begin at once, are answered in their order, and sessions wait for them.

sshd does one thing after the other, and its clients rely on that: with ``ExitOnForwardFailure`` the command must not begin
before the last forward has its answer. Here a listener is a round trip to the sandbox: listeners are opened side by side, as
far as they are not in each other's way. asyncssh answers global requests one by one, and opens channels beside them
(`_global_request_queue`, `_process_global_request`, `_process_channel_open`, `_process_…_forward_global_request`,
`_finish_…_forward`).
"""

from __future__ import annotations

import asyncio
import inspect
from abc import abstractmethod
from collections import deque
from collections.abc import Coroutine
from typing import Any, cast

import asyncssh
from asyncssh.constants import MSG_CHANNEL_OPEN, MSG_GLOBAL_REQUEST
from asyncssh.misc import ProtocolError
from asyncssh.packet import PacketDecodeError, SSHPacket, UInt32

EARLY_MAX = 64  # listeners of one connection that are being opened at a time
HELD_MAX = 64  # sessions of one connection that wait
TCP, UNIX = b"tcpip-forward", b"streamlocal-forward@openssh.com"
Key = tuple[str, int] | str  # host and port, or path


class Forward:
    """A listener that a client wants, from the request to its answer."""

    def __init__(self, key: Key) -> None:
        self.key = key
        self.begun = False  # it is being opened
        self.listener: asyncssh.SSHListener | None = None  # set once it is open; None: refused
        self.done = asyncio.Event()  # it is open or refused

    def in_the_way_of(self, other: Key) -> bool:
        """Whether both want the same port or path: the first one is to get it."""
        if isinstance(self.key, tuple) and isinstance(other, tuple):
            return self.key[1] == other[1] != 0
        return self.key == other


class OrderedConnection(asyncssh.SSHServerConnection):
    """A connection that begins with forwards when they are asked for, and with sessions after what was asked for before."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._forwards: deque[Forward] = deque()  # in the order of their requests, not answered
        self._held: deque[SSHPacket] = deque()  # requests for sessions that wait

    def _process_global_request(self, pkttype: int, pktid: int, packet: SSHPacket) -> None:
        peek = SSHPacket(packet.get_remaining_payload())
        name = peek.get_string()
        peek.get_boolean()  # whether an answer is wanted
        if name in (TCP, UNIX):
            self._announce(_key(name, peek))
        super()._process_global_request(pkttype, pktid, packet)

    def _announce(self, key: Key) -> None:
        forward = Forward(key)
        others = len(self._forwards)
        # What is not a forward may be the cancellation of one: what comes after it waits.
        if others == len(self._global_request_queue) and others < EARLY_MAX and self._may("port-forwarding"):
            forward.begun = not any(other.in_the_way_of(key) for other in self._forwards)
        self._forwards.append(forward)
        if forward.begun:
            self.begin(self._open(forward), "open a listener")

    @abstractmethod
    def begin(self, coro: Coroutine[Any, Any, None], name: str) -> None:
        """Run a task of the connection's. Raises RuntimeError when that has ended."""

    async def _open(self, forward: Forward) -> None:
        try:
            if self._owner is not None:
                key, owner = forward.key, self._owner
                wanted: Any = owner.server_requested(*key) if isinstance(key, tuple) else owner.unix_server_requested(key)
                forward.listener = (await wanted if inspect.isawaitable(wanted) else wanted) or None
        finally:
            forward.done.set()

    async def _answer(self, forward: Forward) -> None:
        if not forward.begun:
            await self._open(forward)
        await forward.done.wait()
        self._forwards.popleft()
        listener, key = forward.listener, forward.key
        if listener is None:
            self._report_global_response(False)
            return
        answer: bool | bytes = True
        if isinstance(key, tuple) and not key[1]:
            key = (key[0], listener.get_port())
            answer = UInt32(key[1])
        self._local_listeners[key] = listener
        self._report_global_response(answer)

    async def _finish_port_forward(self, listen_host: str, listen_port: int) -> None:
        await self._answer(self._forwards[0])

    async def _finish_path_forward(self, listen_path: str) -> None:
        await self._answer(self._forwards[0])

    def _process_tcpip_forward_global_request(self, packet: SSHPacket) -> None:
        if not self._may("port-forwarding"):  # asyncssh refuses it now
            self._forwards.popleft()
        super()._process_tcpip_forward_global_request(packet)

    def _process_streamlocal_forward_at_openssh_dot_com_global_request(self, packet: SSHPacket) -> None:
        if not self._may("port-forwarding"):
            self._forwards.popleft()
        super()._process_streamlocal_forward_at_openssh_dot_com_global_request(packet)

    def _report_global_response(self, result: bool | bytes) -> None:
        super()._report_global_response(result)
        while self._held and not self._global_request_queue:
            try:
                super()._process_channel_open(MSG_CHANNEL_OPEN, 0, self._held.popleft())
            except PacketDecodeError as exc:
                raise ProtocolError(str(exc)) from None

    def _process_channel_open(self, pkttype: int, pktid: int, packet: SSHPacket) -> None:
        kind = SSHPacket(packet.get_remaining_payload()).get_string()
        if kind == b"session" and self._global_request_queue and len(self._held) < HELD_MAX:
            self._held.append(packet)
            return
        super()._process_channel_open(pkttype, pktid, packet)

    def _may(self, what: str) -> bool:
        """Whether the key and the certificate of the client, if it had any, allow something."""
        return self.check_key_permission(what) and self.check_certificate_permission(what)

    _packet_handlers = {  # noqa: RUF012
        **asyncssh.SSHServerConnection._packet_handlers,
        MSG_GLOBAL_REQUEST: cast(Any, _process_global_request),
        MSG_CHANNEL_OPEN: cast(Any, _process_channel_open),
    }


def _key(name: bytes, packet: SSHPacket) -> Key:
    try:
        text = packet.get_string().decode("utf-8")
    except UnicodeDecodeError:
        raise ProtocolError("Invalid forward request") from None
    key: Key = (text.lower(), packet.get_uint32()) if name == TCP else text
    packet.check_end()
    return key

"""A Unix socket inside a native sandbox: made by the agent, accepted on here."""

from __future__ import annotations

import asyncio
import os
import socket
import stat
from collections.abc import Callable
from typing import Any

from gatewayd.local.runtime.agentlink import AgentLink
from gatewayd.local.runtime.base import SOCKET_PATH, RuntimeFailure
from gatewayd.local.runtime.inside import packets

_REMOVE_DEADLINE = 5.0  # seconds for the agent to remove socket and folder
_RETRY = 1.0  # seconds without accepting after this process ran out of descriptors or memory


def checked(answer: dict[str, Any], fds: list[int]) -> tuple[socket.socket, str]:
    """The listening socket and its path, out of an agent's answer; takes the descriptors over. Raises RuntimeFailure."""
    path = answer.get("path")
    known = isinstance(path, str) and SOCKET_PATH.fullmatch(path)
    if not known or len(fds) != 1 or not stat.S_ISSOCK(os.fstat(fds[0]).st_mode):
        packets.close_all(fds)
        raise RuntimeFailure("the sandbox's agent gave no socket")
    sock = socket.socket(fileno=fds[0])
    listens = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    if sock.family != socket.AF_UNIX or sock.type != socket.SOCK_STREAM or not listens:
        sock.close()
        raise RuntimeFailure("the sandbox's agent gave no listening socket")
    sock.setblocking(False)
    return sock, str(path)


def checked_gates(fds: list[int], family: int) -> list[socket.socket]:
    """The two sockets of `base.Box.gates` for one family, out of an agent's answer; takes them over. Raises RuntimeFailure."""
    if len(fds) != 2 or not all(stat.S_ISSOCK(os.fstat(fd).st_mode) for fd in fds):
        packets.close_all(fds)
        raise RuntimeFailure("the sandbox's agent gave no sockets")
    tcp, udp = socks = [socket.socket(fileno=fd) for fd in fds]
    kinds = [sock.type for sock in socks] == [socket.SOCK_STREAM, socket.SOCK_DGRAM]
    if not kinds or any(sock.family != family for sock in socks) or not tcp.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        tcp.close()
        udp.close()
        raise RuntimeFailure("the sandbox's agent gave sockets of another kind")
    for sock in socks:
        sock.setblocking(False)
    return socks


class NativeListener:
    """See `base.UnixListener`."""

    def __init__(
        self, link: AgentLink, handle: str, path: str, sock: socket.socket, on_connection: Callable[[socket.socket], None]
    ) -> None:
        self.path = path
        self._link = link  # the box's agent
        self._handle = handle  # names the socket there
        self._sock = sock  # listening; owned
        self._on_connection = on_connection
        self._removal: asyncio.Future[Any] | None = None  # set by close, if the sandbox still runs
        self._retry: asyncio.TimerHandle | None = None  # runs while nothing is accepted for want of descriptors
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(sock.fileno(), self._ready)

    def _ready(self) -> None:
        """One connection a pass: somebody inside who connects all the time must not keep the loop to himself."""
        try:
            sock, _ = self._sock.accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):
            return
        except OSError:
            self._loop.remove_reader(self._sock.fileno())
            self._retry = self._loop.call_later(_RETRY, self._loop.add_reader, self._sock.fileno(), self._ready)
            return
        sock.setblocking(False)
        self._on_connection(sock)

    def close(self) -> None:
        """Accept no more, and have the socket and its folder removed; idempotent."""
        if self._sock.fileno() < 0:
            return
        if self._retry is not None:
            self._retry.cancel()
        self._loop.remove_reader(self._sock.fileno())
        self._sock.close()
        self._removal = self._link.tell("unlisten", handle=self._handle)

    async def removed(self) -> None:
        """Wait until socket and folder are removed, for a few seconds at most."""
        if self._removal is not None:
            await asyncio.wait([self._removal], timeout=_REMOVE_DEADLINE)

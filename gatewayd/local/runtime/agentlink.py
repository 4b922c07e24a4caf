"""The service's end of the channel to one sandbox's agent: requests, answers, events; everything checked."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
from collections import deque
from collections.abc import Callable
from typing import Any

from gatewayd.local.runtime.base import RuntimeFailure
from gatewayd.local.runtime.inside import packets

_MAX_PENDING = 4096  # requests waiting for an answer or for the socket
_ANSWER_DEADLINE = 30.0  # seconds; the longest an agent legitimately takes is a graceful stop


class AgentLink:
    """One request at a time on the wire, any number waiting for answers."""

    def __init__(self, sock: socket.socket, on_exit: Callable[[int, int], None], on_lost: Callable[[str], None]) -> None:
        self._sock = sock  # non-blocking SEQPACKET
        self._loop = asyncio.get_running_loop()
        self._on_exit = on_exit  # called with (pid, code) for every process that ended
        self._on_lost = on_lost  # called once with the reason when the channel ends
        self._waiting: dict[int, asyncio.Future[tuple[dict[str, Any], list[int]]]] = {}  # request id → its answer
        self._unsent: deque[bytes] = deque()  # packets the socket had no room for
        self._serial = 0  # last request id
        self._closed = False  # set by close() or by the end of the channel
        self.hello: asyncio.Future[None] = self._loop.create_future()  # resolves when the agent is ready
        self._loop.add_reader(sock.fileno(), self._readable)

    async def request(self, op: str, **fields: Any) -> tuple[dict[str, Any], list[int]]:
        """Ask the agent; returns its answer and the descriptors with it (the caller's from here on).

        Raises:
            OSError: what the kernel said inside the sandbox (errno and, as filename, the place).
            RuntimeFailure: the sandbox has ended, or did not answer.
        """
        if self._closed:
            raise RuntimeFailure("the sandbox has ended")
        if len(self._waiting) >= _MAX_PENDING:
            raise RuntimeFailure("the sandbox has too many requests waiting")
        self._serial += 1
        serial = self._serial
        try:
            packet = packets.encode({"op": op, "id": serial, **fields})
        except ValueError as exc:
            raise RuntimeFailure(f"the request is too large for the sandbox: {exc}") from exc
        answer: asyncio.Future[tuple[dict[str, Any], list[int]]] = self._loop.create_future()
        self._waiting[serial] = answer
        self._send(packet)
        try:
            async with asyncio.timeout(_ANSWER_DEADLINE):
                message, fds = await asyncio.shield(answer)
        except BaseException as exc:
            answer.add_done_callback(_discard)  # whenever it comes, its descriptors must not leak
            if isinstance(exc, TimeoutError):
                raise RuntimeFailure(f"the sandbox did not answer within {_ANSWER_DEADLINE:.0f} s") from None
            raise
        number = message.get("errno")
        if isinstance(number, int):
            packets.close_all(fds)
            raise OSError(number, os.strerror(number), str(message.get("where", ""))[:200])
        ok = message.get("ok")
        return (ok if isinstance(ok, dict) else {}), fds

    def _send(self, packet: bytes) -> None:
        if self._unsent or not self._try_send(packet):
            self._unsent.append(packet)
            self._loop.add_writer(self._sock.fileno(), self._writable)

    def _try_send(self, packet: bytes) -> bool:
        try:
            self._sock.send(packet)
        except BlockingIOError:
            return False
        except OSError as exc:
            if exc.errno == errno.ENOBUFS:
                return False
            self._lost(f"the agent's channel broke: {exc.strerror}")
        return True

    def _writable(self) -> None:
        while self._unsent and not self._closed:
            if not self._try_send(self._unsent[0]):
                return
            self._unsent.popleft()
        if not self._closed:
            self._loop.remove_writer(self._sock.fileno())

    def _readable(self) -> None:
        for _ in range(64):  # a chatty sandbox must not keep the loop to itself
            try:
                received = packets.receive(self._sock)
            except BlockingIOError:
                return
            except (packets.PacketError, OSError) as exc:
                self._lost(f"the agent cannot be understood: {exc}")
                return
            if received is None:
                self._lost("the sandbox ended")
                return
            self._dispatch(*received)
            if self._closed:
                return

    def _dispatch(self, message: dict[str, Any], fds: list[int]) -> None:
        answer = self._waiting.pop(message["id"], None) if isinstance(message.get("id"), int) else None
        if answer is not None and not answer.done():
            answer.set_result((message, fds))
            return
        packets.close_all(fds)
        event = message.get("event")
        if event == "exit" and isinstance(message.get("pid"), int) and isinstance(message.get("code"), int):
            self._on_exit(message["pid"], message["code"] & 0xFF)
        elif event == "hello":
            if not self.hello.done():
                self.hello.set_result(None)
        elif event == "failed":
            self._lost(f"the agent failed: {str(message.get('reason', ''))[:200]}")

    def _lost(self, reason: str) -> None:
        if not self._closed:
            self.close()
            self._on_lost(reason)

    def close(self) -> None:
        """Let the agent go; idempotent. Waiting requests fail."""
        if self._closed:
            return
        self._closed = True
        self._loop.remove_reader(self._sock.fileno())
        self._loop.remove_writer(self._sock.fileno())
        self._sock.close()
        self._unsent.clear()
        failure = RuntimeFailure("the sandbox has ended")
        unanswered: list[asyncio.Future[Any]] = [*self._waiting.values(), self.hello]
        for future in unanswered:
            if not future.done():
                future.set_exception(failure)
                future.exception()  # seen, even if nobody waits any more
        self._waiting.clear()


def _discard(answer: asyncio.Future[tuple[dict[str, Any], list[int]]]) -> None:
    if not answer.cancelled() and answer.exception() is None:
        with contextlib.suppress(OSError):
            packets.close_all(answer.result()[1])

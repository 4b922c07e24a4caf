"""The service's end of the channel to one sandbox's agent: requests, answers, events; everything checked."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import signal
import socket
from collections import deque
from collections.abc import Callable
from typing import Any

from gatewayd.local.runtime.base import RuntimeFailure
from gatewayd.local.runtime.inside import packets

_MAX_PENDING = 4096  # requests waiting for an answer or for the socket
_ANSWER_DEADLINE = 30.0  # seconds; the longest an agent legitimately takes is a graceful stop


class AgentLink:
    """One request at a time on the wire, any number waiting for answers.

    The protocol has no packet that is neither an answer, nor a hello, nor the exit of a process that was started: an agent that
    sends one has been taken over, and the channel ends. So a flood costs one packet, and nothing here grows by what it sends.
    """

    def __init__(self, sock: socket.socket, on_lost: Callable[[str], None]) -> None:
        self._sock = sock  # non-blocking SEQPACKET
        self._loop = asyncio.get_running_loop()
        self._on_lost = on_lost  # called once with the reason when the channel ends
        self._waiting: dict[int, asyncio.Future[tuple[dict[str, Any], list[int]]]] = {}  # request id → its answer
        self._running: dict[int, asyncio.Future[int]] = {}  # pid → its exit code, from the answer to its spawn on
        self._unsent: deque[bytes] = deque()  # packets the socket had no room for
        self._serial = 0  # last request id
        self._closed = False  # set by close() or by the end of the channel
        self.hello: asyncio.Future[None] = self._loop.create_future()  # resolves when the agent is ready
        self._loop.add_reader(sock.fileno(), self._readable)

    async def request(
        self, op: str, *, unwanted: Callable[[dict[str, Any]], object] | None = None, **fields: Any
    ) -> tuple[dict[str, Any], list[int]]:
        """Ask the agent; returns its answer and the descriptors with it (the caller's from here on).

        An answer that names a process in ``pid`` has the future of its exit code in ``exited``.

        Args:
            unwanted: called with the answer of a request that succeeded after its caller had been cancelled or had given up.

        Raises:
            OSError: what the kernel said inside the sandbox (errno and, as filename, the place).
            RuntimeFailure: the sandbox has ended, or did not answer.
        """
        answer = self._ask(op, fields)
        try:
            async with asyncio.timeout(_ANSWER_DEADLINE):
                message, fds = await asyncio.shield(answer)
        except BaseException as exc:
            answer.add_done_callback(lambda late: _discard(late, unwanted))  # whenever it comes, its descriptors must not leak
            if isinstance(exc, TimeoutError):
                raise RuntimeFailure(f"the sandbox did not answer within {_ANSWER_DEADLINE:.0f} s") from None
            raise
        number = message.get("errno")
        if isinstance(number, int):
            packets.close_all(fds)
            if unwanted is not None and isinstance(done := message.get("ok"), dict):  # its descriptors found no room here
                unwanted(done)
            raise OSError(number, os.strerror(number), str(message.get("where", ""))[:200])
        ok = message.get("ok")
        return (ok if isinstance(ok, dict) else {}), fds

    def tell(self, op: str, **fields: Any) -> asyncio.Future[Any] | None:
        """Ask without waiting: what is done when the answer has come, or None when the sandbox has ended."""
        with contextlib.suppress(RuntimeFailure):
            answer = self._ask(op, fields)
            answer.add_done_callback(lambda done: _discard(done, None))
            return answer
        return None

    def _ask(self, op: str, fields: dict[str, Any]) -> asyncio.Future[tuple[dict[str, Any], list[int]]]:
        if self._closed:
            raise RuntimeFailure("the sandbox has ended")
        if len(self._waiting) >= _MAX_PENDING:
            raise RuntimeFailure("the sandbox has too many requests waiting")
        self._serial += 1
        try:
            packet = packets.encode({"op": op, "id": self._serial, **fields})
        except ValueError as exc:
            raise RuntimeFailure(f"the request is too large for the sandbox: {exc}") from exc
        answer: asyncio.Future[tuple[dict[str, Any], list[int]]] = self._loop.create_future()
        self._waiting[self._serial] = answer
        self._send(packet)
        return answer

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
            if self._unsent:  # empty when that attempt closed the channel
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
        answer = self._waiting.pop(message["id"], None) if type(message.get("id")) is int else None
        if answer is not None and not answer.done():
            ok = message.get("ok")
            if isinstance(ok, dict) and type(pid := ok.get("pid")) is int:
                self._running[pid] = ok["exited"] = self._loop.create_future()  # now: its exit may be the very next packet
            answer.set_result((message, fds))
            return
        packets.close_all(fds)
        event, pid = message.get("event"), message.get("pid")
        if event == "exit" and type(pid) is int and pid in self._running and type(code := message.get("code")) is int:
            self._running.pop(pid).set_result(code & 0xFF)
        elif event == "hello" and not self.hello.done():
            self.hello.set_result(None)
        elif event == "failed":
            self._lost(f"the agent failed: {str(message.get('reason', ''))[:200]}")
        else:
            self._lost("the agent sent what nobody asked for")

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
        for exited in self._running.values():
            exited.set_result(128 + signal.SIGKILL)
        self._running.clear()


def _discard(
    answer: asyncio.Future[tuple[dict[str, Any], list[int]]], unwanted: Callable[[dict[str, Any]], object] | None
) -> None:
    if answer.cancelled() or answer.exception() is not None:
        return
    message, fds = answer.result()
    packets.close_all(fds)
    ok = message.get("ok")
    if unwanted is not None and isinstance(ok, dict):
        unwanted(ok)

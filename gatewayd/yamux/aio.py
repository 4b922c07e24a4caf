"""yamux over anything that carries bytes in order: the session core, driven by asyncio.

`Mux` owns the transport, a reading and a writing task, one timer, and the handlers of the streams the peer opens. All
protocol is in `session.Session`; here is only waiting.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import Any, Final, Protocol

from gatewayd.errors import GatewayError, MuxClosed, StreamReset
from gatewayd.tasks import TaskOwner
from gatewayd.yamux.config import SessionConfig
from gatewayd.yamux.events import (
    DataReceived,
    EofReceived,
    Event,
    GoAwayReceived,
    PingAnswered,
    SessionEnded,
    StreamAcknowledged,
    StreamOpened,
    StreamWasReset,
    WindowOpened,
)
from gatewayd.yamux.muxstream import MuxStream
from gatewayd.yamux.session import Session

__all__ = ["MessageTransport", "Mux", "MuxStream", "SessionConfig"]

log = logging.getLogger(__name__)

_MESSAGE_SIZE: Final = 257 * 1024  # bytes; queued frames are merged into messages of about this size: four full ones fit
_FLUSH_DEADLINE: Final = 2.0  # seconds for the last frames (go away) to leave
_CLOSE_DEADLINE: Final = 5.0  # seconds for the transport's close, and again for the tasks
_DRAIN_DEADLINE: Final = 10.0  # seconds for handlers to deliver what they had received when the peer ended the session
_ABANDON_DEADLINE: Final = 0.5  # seconds for the same when we ended it
_OPEN_DEADLINE: Final = 75.0  # seconds to wait for acknowledgements when the peer's backlog is full; hashicorp's figure


class MessageTransport(Protocol):
    """One WebSocket, or anything that moves bytes in order; boundaries mean nothing."""

    async def send(self, data: bytes) -> None:
        """Send; returns when the transport's own buffer is below its limit. Raises OSError or GatewayError."""

    async def recv(self) -> bytes:
        """The next bytes. Raises EOFError at the orderly end, OSError or GatewayError on failure."""
        ...

    async def close(self) -> None:
        """Close; idempotent."""


class Mux:
    """A yamux session on a transport. Create it, have somebody run `run()`, use it from the same event loop.

    Attributes:
        name: for log lines and task names, e.g. the sandbox.
        closed: True from the moment the session ends.
        error: why it ended; None while it lives, after `aclose`, and when the peer closed the transport in order.
        rtt: round-trip time of the last answered ping in seconds, None before the first.
        bytes_in, bytes_out: bytes that passed the transport, headers included.
    """

    def __init__(
        self,
        transport: MessageTransport,
        *,
        client: bool,
        name: str,
        config: SessionConfig | None = None,
        on_stream: Callable[[MuxStream], Coroutine[Any, Any, None]] | None = None,
    ) -> None:
        config = config or SessionConfig()
        self._backlog = config.accept_backlog or 256  # own streams that may wait for the peer's acknowledgement
        if on_stream is None:
            config = replace(config, accept_backlog=0)  # every stream of the peer is refused with RST
        self.name = name
        self.error: Exception | None = None
        self.rtt: float | None = None
        self.bytes_in = 0
        self.bytes_out = 0
        self.turn = asyncio.Lock()  # held by the one stream that may queue a frame next; waiters are served in order

        self._transport = transport
        self._on_stream = on_stream
        self._session = Session(client=client, config=config)
        self._streams: dict[int, MuxStream] = {}  # streams with an open direction
        self._pings: dict[int, asyncio.Future[float]] = {}  # callers of ping()
        self._tasks = TaskOwner(f"mux/{name}")  # reader and writer
        self._handlers = TaskOwner(f"mux/{name}/stream")  # on_stream, one task for each of the peer's streams
        self._serving: set[asyncio.Task[None]] = set()  # the handlers that run
        self._timer: asyncio.TimerHandle | None = None  # fires at _timer_at
        self._timer_at = 0.0  # the session's next deadline when the timer was set
        self._output = asyncio.Event()  # the writer has something to send
        self._flushed = asyncio.Event()  # everything queued was given to the transport
        self._flushed.set()
        self._room = asyncio.Event()  # the output queue is below its limit, or the session is over
        self._answered = asyncio.Event()  # the peer acknowledged or dropped one of our streams
        self._ending = asyncio.Event()  # the session is over; set by _end
        self._finished = asyncio.Event()  # transport closed, tasks ended
        self._running = False  # run() was entered
        self._why = ""  # completes «the session ended: …»; set by _end
        self._closed_here = False  # ended by aclose or cancellation

    def __repr__(self) -> str:
        return f"<Mux {self.name} {'closed' if self.closed else 'open'} streams={self.streams}>"

    @property
    def closed(self) -> bool:
        """True from the moment the session ends."""
        return self._ending.is_set()

    @property
    def streams(self) -> int:
        """Streams open at the moment, both origins."""
        return self._session.stream_count

    # -- for users ----------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Drive the session until it ends and everything is cleaned up; call once.

        Raises nothing for what goes wrong with the peer or the transport: see `error`. Cancelled, it ends the session, cleans
        up and raises CancelledError.
        """
        self._running = True
        if not self.closed:
            log.info("mux %s: session started", self.name)
            self._dispatch(self._session.tick(self._now()))
            self._tasks.start(self._read(), "read")
            self._tasks.start(self._write(), "write")
        try:
            await self._ending.wait()
        except asyncio.CancelledError:
            self._closed_here = True
            self._end("it was cancelled")
            raise
        finally:
            await self._finish()

    async def open_stream(self) -> MuxStream:
        """Open a stream. Returns at once, unless the peer has a full backlog of streams to acknowledge.

        Raises:
            MuxClosed: the session has ended, or the peer takes no new streams.
            GatewayError: too many streams are open, or the peer acknowledged none for 75 s (kind `timeout`).
        """
        try:
            async with asyncio.timeout(_OPEN_DEADLINE):
                while self._session.unacked >= self._backlog and not self.closed:
                    self._answered.clear()
                    await self._answered.wait()
        except TimeoutError as exc:
            raise GatewayError(f"cannot open a stream: the peer has not acknowledged {self._backlog}", kind="timeout") from exc
        self._check_open()
        stream = MuxStream(self, self._session.open_stream(self._now()))
        self._streams[stream.id] = stream
        self._after()
        return stream

    async def ping(self) -> float:
        """Round-trip time in seconds.

        Raises:
            MuxClosed: the session has ended, or ends meanwhile.
            TimeoutError: no answer within `keepalive_timeout`.
        """
        self._check_open()
        answer: asyncio.Future[float] = asyncio.get_running_loop().create_future()
        ping_id = self._session.ping(self._now())
        self._pings[ping_id] = answer
        self._after()
        try:
            async with asyncio.timeout(self._session.config.keepalive_timeout):
                return await answer
        finally:
            self._pings.pop(ping_id, None)

    async def aclose(self) -> None:
        """Say go away, send what is queued, close the transport; live streams fail. Idempotent, bounded by deadlines."""
        if not self.closed:
            self._closed_here = True
            self._session.go_away()
            self._after()
            if self._running:
                await self._flush()
            self._end("closed here")
        if self._running:
            if asyncio.current_task() in self._serving:
                return  # a handler closes its own session: run() cleans up when that handler has returned
            try:
                async with asyncio.timeout(_CLOSE_DEADLINE):
                    await self._finished.wait()
            except TimeoutError:
                log.debug("mux %s: still cleaning up after aclose", self.name)
        else:
            await self._finish()

    async def wait_closed(self) -> None:
        """Return once the session has ended; cleaning up may go on, inside `run`."""
        await self._ending.wait()

    # -- for MuxStream ------------------------------------------------------------------------------------------------

    async def wait_room(self) -> None:
        """Wait until the output queue is below its limit, or the session is over."""
        while not self._session.has_room and not self.closed:
            self._room.clear()
            await self._room.wait()

    def send(self, stream_id: int, view: memoryview) -> int:
        """Queue one frame; the number of bytes taken."""
        size = self._session.send(stream_id, view)
        self._after()
        return size

    def send_eof(self, stream_id: int) -> None:
        """Queue a FIN."""
        self._session.send_eof(stream_id, self._now())
        self._forget_if_gone(stream_id)
        self._arm()
        self._after()

    def reset(self, stream_id: int) -> None:
        """Queue a RST, if the stream is still there."""
        if not self.closed:
            self._session.reset(stream_id)
            self._forget_if_gone(stream_id)
            self._answered.set()
            self._after()

    def abandoned(self, stream_id: int) -> None:
        """The application reads the stream no more."""
        if not self.closed:
            self._session.abandon(stream_id, self._now())

    def consumed(self, stream_id: int, size: int) -> None:
        """The application took `size` bytes."""
        if not self.closed:
            self._session.consume(stream_id, size)
            self._after()

    # -- the tasks ----------------------------------------------------------------------------------------------------

    async def _read(self) -> None:
        try:
            while not self.closed:
                data = await self._transport.recv()
                self.bytes_in += len(data)
                self._dispatch(self._session.receive_data(data, self._now()))
        except EOFError:
            self._dispatch(self._session.receive_eof())
        except (OSError, GatewayError) as exc:
            self._end(f"receiving failed: {exc}", exc)
        except Exception as exc:
            log.exception("mux %s: receiving failed", self.name)
            self._end(f"receiving failed: {type(exc).__name__}", exc)

    async def _write(self) -> None:
        try:
            while True:
                await self._output.wait()
                self._output.clear()
                while message := self._session.data_to_send(_MESSAGE_SIZE):
                    self._room.set()
                    await self._transport.send(message)
                    self.bytes_out += len(message)
                self._flushed.set()
        except (OSError, GatewayError) as exc:
            self._end(f"sending failed: {exc}", exc)
        except Exception as exc:
            log.exception("mux %s: sending failed", self.name)
            self._end(f"sending failed: {type(exc).__name__}", exc)

    async def _serve(self, stream: MuxStream) -> None:
        """Run the handler of one of the peer's streams; its failure is that stream's only."""
        assert self._on_stream is not None  # noqa: S101 - without it the backlog is 0 and no stream gets here
        done = False
        try:
            await self._on_stream(stream)
            await stream.aclose()
            done = True
        except (MuxClosed, StreamReset) as exc:
            log.debug("mux %s: stream %d ended: %s", self.name, stream.id, exc)
        except Exception:
            log.exception("mux %s: handler of stream %d failed", self.name, stream.id)
        finally:
            if not done:
                stream.abort()

    # -- events -------------------------------------------------------------------------------------------------------

    def _dispatch(self, events: list[Event]) -> None:
        if self.closed:
            return
        for event in events:
            match event:
                case DataReceived(stream_id, data):
                    if stream := self._streams.get(stream_id):
                        stream.feed(data)
                    else:
                        self._session.consume(stream_id, len(data))
                case WindowOpened(stream_id):
                    if stream := self._streams.get(stream_id):
                        stream.window_opened()
                case EofReceived(stream_id):
                    if stream := self._streams.get(stream_id):
                        stream.feed_eof()
                        self._forget_if_gone(stream_id)
                case StreamOpened(stream_id):
                    self._accept(stream_id)
                case StreamWasReset(stream_id, reason):
                    self._answered.set()
                    if stream := self._streams.pop(stream_id, None):
                        stream.fail(StreamReset(f"stream {stream_id} was reset: {reason}"))
                case StreamAcknowledged():
                    self._answered.set()
                case PingAnswered(ping_id, rtt):
                    self.rtt = rtt
                    if (answer := self._pings.get(ping_id)) and not answer.done():
                        answer.set_result(rtt)
                case GoAwayReceived():
                    log.info("mux %s: the peer is going away", self.name)
                case SessionEnded(reason, orderly):
                    self._end(reason, None if orderly else MuxClosed(f"the session ended: {reason}"))
        self._arm()
        self._after()

    def _accept(self, stream_id: int) -> None:
        core = self._session.accept(stream_id)
        if core is None:
            return  # opened and reset within one message
        stream = self._streams[stream_id] = MuxStream(self, core)
        task = self._handlers.start(self._serve(stream), str(stream_id))
        self._serving.add(task)
        task.add_done_callback(self._serving.discard)

    def _forget_if_gone(self, stream_id: int) -> None:
        if self._session.stream(stream_id) is None:
            self._streams.pop(stream_id, None)

    # -- inside -------------------------------------------------------------------------------------------------------

    def _now(self) -> float:
        return time.monotonic()  # not the loop's clock: uvloop's counts whole milliseconds, which is a round trip

    def _check_open(self) -> None:
        if self.closed:
            raise MuxClosed(f"the session ended: {self._why}")

    def _after(self) -> None:
        """Something may have been queued: wake the writer."""
        if self._session.has_output:
            self._flushed.clear()
            self._output.set()

    def _arm(self) -> None:
        """Set the timer for the session's next deadline; one that was set for earlier stays and looks again."""
        deadline = None if self.closed else self._session.next_deadline()
        if deadline is not None and (self._timer is None or deadline < self._timer_at):
            if self._timer is not None:
                self._timer.cancel()
            self._timer_at = deadline
            self._timer = asyncio.get_running_loop().call_later(max(0.0, deadline - self._now()), self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        self._dispatch(self._session.tick(self._now()))

    async def _flush(self) -> None:
        try:
            async with asyncio.timeout(_FLUSH_DEADLINE):
                await self._flushed.wait()
        except TimeoutError:
            log.debug("mux %s: the last frames did not leave", self.name)

    def _end(self, why: str, error: Exception | None = None) -> None:
        """The session is over: nobody may wait for it any longer. Idempotent; the first reason stays."""
        if self.closed:
            return
        self._why = why
        self.error = error
        self._ending.set()
        for stream in list(self._streams.values()):
            stream.fail(MuxClosed(f"the session ended: {why}"))
        self._streams.clear()
        for answer in self._pings.values():
            if not answer.done():
                answer.set_exception(MuxClosed(f"the session ended: {why}"))
        self._room.set()
        self._answered.set()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        log.log(logging.WARNING if error else logging.INFO, "mux %s: session ended: %s", self.name, why)

    async def _finish(self) -> None:
        """After _end: last frames, transport, tasks, handlers, each with its deadline."""
        try:
            if self._running and self.error is not None and self._session.ended is not None:
                await self._flush()  # the go away that says what the peer did wrong
            await self._tasks.aclose(_CLOSE_DEADLINE)
            self._flushed.set()  # nobody will flush any more
            try:
                async with asyncio.timeout(_CLOSE_DEADLINE):
                    await self._transport.close()
            except (OSError, GatewayError, TimeoutError) as exc:
                log.debug("mux %s: closing the transport: %s", self.name, exc)
            if self._serving:
                await asyncio.wait(self._serving, timeout=_ABANDON_DEADLINE if self._closed_here else _DRAIN_DEADLINE)
        finally:
            await self._handlers.aclose(_CLOSE_DEADLINE)
            self._finished.set()

"""One session of the guest as coroutines: read, write, wait; connected again whenever its connection breaks."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Callable, Sequence

from gatewayd.api import ErrorKind
from gatewayd.errors import DialRefused, GatewayError, StreamClosed, StreamReset
from gatewayd.guest import wire
from gatewayd.guest.events import (
    Accepted,
    Detached,
    Event,
    Exit,
    Failed,
    InputStopped,
    Item,
    Opened,
    Output,
    OutputEof,
)
from gatewayd.guest.session import ClientSession, GuestRefused
from gatewayd.guest.wire import GuestProtocolError, Mode, Status
from gatewayd.sandbox.boxes import Notice
from gatewayd.sandbox.guest_host import GuestHost
from gatewayd.sandbox.rest_client import backoff
from gatewayd.sandbox.session import STDOUT, ExitStatus
from gatewayd.tasks import TaskOwner
from gatewayd.yamux.aio import MuxStream

log = logging.getLogger(__name__)

OPEN_TIMEOUT = 120.0  # seconds for a session to begin, boot and all
FIRST_TRIES = 3  # connections for a new session
BACKOFF_BASE, BACKOFF_MAX = 0.2, 3.0  # seconds between connections that fail
CLOSE_WAIT = 2.0  # seconds `aclose` waits for the guest to know
CLOSE_LINGER = 30.0  # seconds in which a broken connection is replaced to tell it, and when a program's end has been told
READ = 262_144  # bytes asked of the connection at once
STEADY = 0.5  # seconds after which a connection is one, and its loss no sign of a guest that only answers
BRIEF_MAX = 100  # shorter ones in a row
SMALL = 4096  # bytes of output below which pieces are joined: each costs some hundred bytes beside its own
RETRIED = (ErrorKind.UNAVAILABLE, ErrorKind.TIMEOUT, ErrorKind.REFUSED)  # of a reconnection: it may help


class _Buffer:
    """Output of one stream that nobody has read yet: at most the window, since only what was read is granted."""

    def __init__(self) -> None:
        self.chunks: deque[bytes] = deque()
        self.offset = 0  # bytes of the first chunk that were read
        self.eof = False  # nothing is behind the chunks
        self.ready = asyncio.Event()  # something for read() to look at


class GuestSession:
    """A session, from its OPEN to its end. Implements `sandbox.session.Session`, and is the base of streams and listeners.

    Two tasks while it lives: one receives (and connects), one sends.
    """

    def __init__(
        self,
        host: GuestHost,
        core: ClientSession,
        owner: TaskOwner,
        *,
        what: str,
        streams: Sequence[int],
        linger: float = wire.LINGER,
        connection: bool = False,
        port: int = 0,
    ) -> None:
        """`what` completes «cannot …: »; `streams`: those that carry output; `connection`: it ends with both directions.

        `port`: as in `GuestHost.connect`.
        """
        self.pid = 0
        self.fields: dict[str, bytes] = {}  # of OPENED
        self.input_stopped: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.on_accepted: Callable[[Accepted], None] | None = None  # a listener's connections
        self.on_over: Callable[[], None] | None = None  # called once, when the session has ended
        self.on_item: Callable[[Item], None] | None = None  # a list's entries
        self._host = host
        self._core = core
        self._owner = owner  # of the tasks: they may outlive `aclose` for a while
        self._what = what
        self._linger = linger  # seconds the guest keeps the session without a connection
        self._connection = connection  # no EXIT comes
        self._port = port  # of the guest asked alone; 0: of any
        self._runner: asyncio.Task[None] | None = None  # receives; set by start
        self._loop = asyncio.get_running_loop()
        self._buffers = {stream: _Buffer() for stream in streams}
        self._opened = asyncio.Event()  # OPENED has come, or the end
        self._exit: asyncio.Future[ExitStatus] = self._loop.create_future()  # EXIT has come, or an error is known
        self._error: GatewayError | None = None  # why the session is over before its time
        self._over = asyncio.Event()  # the task that receives has ended
        self._room = asyncio.Event()  # something for write() to look at: credit, or the end
        self._wake = asyncio.Event()  # something for the sender
        self._timer: asyncio.TimerHandle | None = None  # for the next delayed acknowledgement
        self._closing = False  # aclose was called: nothing is handed out any more
        self._sent_all = asyncio.Event()  # the sender has written all that there was, or cannot
        self._last_call: asyncio.TimerHandle | None = None  # ends what takes too long to finish

    # -- beginning ----------------------------------------------------------------------------------------------------

    async def start(self, notice: Notice | None = None, *, wake: bool = True) -> None:
        """Connect, and wait until it is opened. Raises GatewayError; nothing is left behind then."""
        try:
            self._runner = self._owner.start(self._run(notice, wake), f"session {self._host.sandbox}")
        except RuntimeError as exc:
            raise GatewayError("the daemon is stopping", kind=ErrorKind.UNAVAILABLE) from exc
        self._runner.add_done_callback(self._ended)
        try:
            async with asyncio.timeout(OPEN_TIMEOUT):
                await self._opened.wait()
        except TimeoutError as exc:
            self._abandon()
            raise GatewayError(f"cannot {self._what}: no answer within {OPEN_TIMEOUT:.0f} s", kind=ErrorKind.TIMEOUT) from exc
        except BaseException:
            self._abandon()
            raise
        if self._error is not None:
            await self.aclose()
        self._raise_error()

    # -- Session ------------------------------------------------------------------------------------------------------

    async def read(self, stream: int = STDOUT, limit: int = READ) -> bytes:
        """As in `Session`."""
        buffer = self._buffers.get(stream)
        if buffer is None:
            return b""
        while not buffer.chunks:
            if buffer.eof:
                return b""
            self._raise_error()
            if self._closing:
                raise StreamClosed(f"cannot read from a session in sandbox {self._host.sandbox!r}: it is closed")
            buffer.ready.clear()
            await buffer.ready.wait()
        chunk = buffer.chunks[0]
        if not buffer.offset and len(chunk) <= limit:
            buffer.chunks.popleft()
            data = chunk
        else:
            data = chunk[buffer.offset : buffer.offset + limit]
            buffer.offset += len(data)
            if buffer.offset == len(chunk):
                buffer.chunks.popleft()
                buffer.offset = 0
        self._core.grant(stream, len(data))
        self._wake.set()
        return data

    async def write(self, data: bytes) -> None:
        """As in `Session`."""
        view = memoryview(data)
        while True:
            self._raise_error()
            if self._closing or self._core.input_ended:
                raise StreamClosed(f"cannot write to a session in sandbox {self._host.sandbox!r}: its input is ended")
            taken = self._core.send_input(view)
            if taken:
                self._wake.set()
                view = view[taken:]
            if not view:
                return
            self._room.clear()
            await self._room.wait()

    def write_eof(self) -> None:
        """As in `Session`."""
        self._core.input_eof()
        self._wake.set()

    def resize(self, cols: int, rows: int, xpixel: int = 0, ypixel: int = 0) -> None:
        """As in `Session`."""
        self._core.resize(cols, rows, xpixel, ypixel)
        self._wake.set()

    def signal(self, name: str) -> None:
        """As in `Session`."""
        try:
            self._core.signal(name)
        except ValueError as exc:
            raise GatewayError(f"cannot send a signal: {exc}", kind=ErrorKind.USAGE) from exc
        self._wake.set()

    def stop_output(self, stream: int) -> None:
        """As in `Session`."""
        buffer = self._buffers.get(stream)
        if buffer is not None and not buffer.eof:
            self._core.stop_output(stream)
            buffer.chunks.clear()
            buffer.offset, buffer.eof = 0, True
            buffer.ready.set()
            self._wake.set()

    async def wait(self) -> ExitStatus:
        """As in `Session`."""
        return await asyncio.shield(self._exit)

    async def wait_over(self) -> GatewayError | None:
        """Until the session has ended, however that came; the error, if there was one."""
        await self._over.wait()
        return self._error

    async def aclose(self) -> None:
        """As in `Session`; the guest is told in the background when that takes longer than `CLOSE_WAIT`."""
        self._abandon()
        await self.settle()

    async def settle(self) -> None:
        """Close it unless that was done, and wait for the guest to know all, at most `CLOSE_WAIT`."""
        if not self._closing:
            self._abandon()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_WAIT):
                await self._over.wait()

    def _abandon(self) -> None:
        """CLOSE; does not wait."""
        self._core.close()
        self._finish()
        self._wake.set()

    def _finish(self) -> None:
        """Hand nothing out any more, and end when the guest knows all there is to know."""
        if self._closing:
            return
        self._closing = True
        for stream, buffer in self._buffers.items():
            self._core.stop_output(stream)  # nothing after CLOSE
            buffer.chunks.clear()
            buffer.ready.set()
        self._core.acknowledge()  # a session whose work has ended waits for that alone
        self._room.set()
        self._wake.set()
        if self._runner is None:
            self._over.set()
        elif self._core.mode == Mode.OPEN:  # which has not been sent: nothing runs
            self._runner.cancel()
        elif not self._runner.done():  # even if all has come: the guest may not know yet that it has
            self._last_call = self._loop.call_later(CLOSE_LINGER, self._runner.cancel)

    @property
    def _complete(self) -> bool:
        """Whether all that a session brings has come."""
        if not all(buffer.eof for buffer in self._buffers.values()):
            return False
        return self._core.input_ended if self._connection else self._exit.done() and self._error is None

    @property
    def _told(self) -> bool:
        """Whether all of a program has come: a connection is only needed to tell the guest that the session may go."""
        return self._complete and not self._connection

    @property
    def _done(self) -> bool:
        """Whether nothing is left to be said, either way."""
        if self._core.ended:
            return True
        return not self._core.unacknowledged and (self._core.closed or (self._connection and self._complete))

    def _raise_error(self) -> None:
        if self._error is not None:
            raise _again(self._error)

    # -- connections --------------------------------------------------------------------------------------------------

    async def _run(self, notice: Notice | None, wake: bool) -> None:
        """From the first connection to the last."""
        try:
            stream = await self._first(notice, wake)
            brief = 0  # connections in a row that ended as soon as they stood
            while True:
                began = self._loop.time()
                if await self._carry(stream):
                    break
                brief = 0 if self._loop.time() - began >= STEADY else brief + 1
                if brief > BRIEF_MAX:
                    cause = f"the guest in sandbox {self._host.sandbox!r} hangs up again and again: the session is over"
                    raise GatewayError(cause, kind=ErrorKind.UNAVAILABLE)
                if brief > 1:
                    await asyncio.sleep(backoff(brief - 2, BACKOFF_BASE, BACKOFF_MAX))
                stream = await self._again()
        except GuestRefused as exc:
            self._lose(self._refused(exc), only_exit=self._told)
        except GuestProtocolError as exc:
            self._lose(GatewayError(f"the guest in sandbox {self._host.sandbox!r} does not keep to its protocol: {exc}"))
        except GatewayError as exc:
            self._lose(exc, only_exit=self._told)

    def _ended(self, _: asyncio.Task[None]) -> None:
        """The last thing that happens, however it came."""
        for timer in (self._timer, self._last_call):
            if timer is not None:
                timer.cancel()
        self._core.disconnected()
        error = GatewayError(f"the session in sandbox {self._host.sandbox!r} is over", kind=ErrorKind.UNAVAILABLE)
        self._lose(error, only_exit=self._complete)
        self._over.set()
        if self.on_over is not None:
            self.on_over()

    async def _first(self, notice: Notice | None, wake: bool) -> MuxStream:
        """A connection that breaks before its answer is replaced: opening twice is opening once."""
        if self._core.mode == Mode.RESUME:  # accepted inside: there already
            return await self._again()
        for attempt in range(FIRST_TRIES - 1):
            try:
                return await self._host.resume(self._core, notice, wake=wake, port=self._port)
            except GatewayError as exc:
                if exc.kind != ErrorKind.UNAVAILABLE or self._closing:
                    raise
                log.info("%s; trying again", exc.message)
            await asyncio.sleep(backoff(attempt, BACKOFF_BASE, BACKOFF_MAX))
        return await self._host.resume(self._core, notice, wake=wake, port=self._port)

    async def _carry(self, stream: MuxStream) -> bool:
        """Receive until the connection breaks; whether the session is over."""
        sender = self._owner.start(self._send(stream), f"send {self._host.sandbox}")
        if self._core.opened:
            self._opened.set()
        done = forgotten = False
        try:
            while not self._done:
                data = await stream.read(READ)
                if not data:
                    forgotten = self._told and not self._closing  # it ends such a connection when it needs to be told no more
                    break
                for event in self._core.receive(data, self._loop.time()):
                    self._on_event(event)
                self._wake.set()
                self._set_timer()
            done = self._done
            if done:
                await self._last_word()
        except (OSError, GatewayError) as exc:
            log.info("session in %s: %s", self._host.sandbox, exc)
        finally:
            sender.cancel()
            self._core.disconnected()
            if done:
                await stream.aclose()
            else:
                stream.abort()
        return done or forgotten

    async def _last_word(self) -> None:
        """The guest keeps a session until it knows that we have all of it."""
        self._core.acknowledge()
        self._sent_all.clear()
        self._wake.set()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_WAIT):
                await self._sent_all.wait()

    async def _send(self, stream: MuxStream) -> None:
        """Whatever is queued, whenever something is."""
        try:
            while True:
                frames = self._core.data_to_send()
                if frames:
                    await stream.write(frames[0] if len(frames) == 1 else b"".join(frames))
                    continue
                self._sent_all.set()
                self._wake.clear()
                await self._wake.wait()
        except (OSError, GatewayError):
            stream.abort()  # whoever receives learns of it
            self._sent_all.set()

    async def _again(self) -> MuxStream:
        """The next connection: as soon as there can be one, and never by starting a stopped sandbox. Raises GatewayError."""
        sandbox = self._host.sandbox
        began = self._loop.time()
        attempt = 0
        while True:
            try:
                stream = await self._host.resume(self._core, port=self._port)
            except GatewayError as exc:
                if exc.kind not in RETRIED:
                    raise self._gone(exc) from exc
                waited = self._loop.time() - began
                if waited >= (CLOSE_LINGER if self._told else self._linger):
                    raise GatewayError(
                        f"sandbox {sandbox!r} cannot be reached for {waited:.0f} s: the session is over",
                        kind=ErrorKind.UNAVAILABLE,
                        hint=exc.message,
                    ) from exc
                log.info("session in %s: %s; trying again", sandbox, exc.message)
                await asyncio.sleep(backoff(attempt, BACKOFF_BASE, BACKOFF_MAX))
                attempt += 1
            else:
                log.info("session in %s goes on after %.1f s", sandbox, self._loop.time() - began)
                return stream

    def _gone(self, exc: GatewayError) -> GatewayError:
        """Why a session cannot go on, in its own words."""
        sandbox = self._host.sandbox
        if exc.kind == ErrorKind.STOPPED:
            return GatewayError(f"sandbox {sandbox!r} was stopped: the session is over", kind=exc.kind, hint=exc.hint)
        if exc.kind == ErrorKind.NOT_FOUND:
            return GatewayError(f"sandbox {sandbox!r} was deleted: the session is over", kind=exc.kind)
        return exc

    def _refused(self, exc: GuestRefused) -> GatewayError:
        sandbox = self._host.sandbox
        if exc.status == Status.NO_SESSION and self._core.opened:
            return GatewayError(
                f"sandbox {sandbox!r} was restarted, or its guest ended: the session is gone", kind=ErrorKind.UNAVAILABLE
            )
        return GatewayError(f"cannot {self._what}: {exc}", kind=ErrorKind.UNAVAILABLE)

    def _set_timer(self) -> None:
        deadline = self._core.next_deadline()
        if deadline is not None and self._timer is None:
            self._timer = self._loop.call_at(deadline, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        self._core.tick(self._loop.time())
        self._wake.set()
        self._set_timer()

    # -- events -------------------------------------------------------------------------------------------------------

    def _on_event(self, event: Event) -> None:
        if isinstance(event, Output):
            buffer = self._buffers.get(event.stream)
            if buffer is None or buffer.eof or self._closing:
                self._core.grant(event.stream, len(event.data))
            else:
                chunks = buffer.chunks
                if chunks and len(chunks[-1]) < SMALL and len(event.data) < SMALL:
                    chunks[-1] += event.data
                else:
                    chunks.append(event.data)
                buffer.ready.set()
        elif isinstance(event, OutputEof):
            if (buffer := self._buffers.get(event.stream)) is not None:
                buffer.eof = True
                buffer.ready.set()
        elif isinstance(event, Opened):
            self.fields = event.fields
            self.pid = wire.number(event.fields.get("pid", b"0"), 1 << 32)
            self._opened.set()
        elif isinstance(event, Exit):
            if not self._exit.done():
                self._exit.set_result(ExitStatus(event.code, event.signal, event.core))
            self._stop_input()
        elif isinstance(event, InputStopped):
            self._stop_input()
        elif isinstance(event, Failed):
            self._lose(self._failed(event))
        elif isinstance(event, Detached):
            self._lose(GatewayError(f"the session in sandbox {self._host.sandbox!r} was taken over: {event.reason}"))
        elif isinstance(event, Accepted):
            if self.on_accepted is not None:
                self.on_accepted(event)
        elif isinstance(event, Item):
            if self.on_item is not None:
                self.on_item(event)
        else:  # Credit
            self._room.set()

    def _failed(self, event: Failed) -> GatewayError:
        if self._opened.is_set():
            return StreamReset(f"cannot {self._what}: {event.message}")
        message = f"cannot {self._what}: {event.message}"
        if event.kind == "refused":
            return DialRefused(message)
        return GatewayError(message, kind=ErrorKind.USAGE if event.kind == "usage" else ErrorKind.FAILED)

    def _stop_input(self) -> None:
        self._core.input_stopped = True
        if not self.input_stopped.done():
            self.input_stopped.set_result(None)
        self._room.set()

    def _lose(self, error: GatewayError, *, only_exit: bool = False) -> None:
        """The session is over, and not as it should be; the first error stays."""
        if self._error is None and not only_exit:
            self._error = error
        if not self._exit.done():
            self._exit.set_exception(_again(error))
            self._exit.exception()  # seen: nobody has to wait for it
        if not self.input_stopped.done():
            self.input_stopped.set_result(None)
        self._opened.set()
        self._room.set()
        for buffer in self._buffers.values():
            buffer.ready.set()


def _again(error: GatewayError) -> GatewayError:
    """A fresh object: a shared one would gather the traceback of everybody who raised it."""
    kind = type(error) if isinstance(error, StreamReset | DialRefused) else GatewayError
    return kind(error.message, kind=error.kind, hint=error.hint)

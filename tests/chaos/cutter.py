"""A TCP relay between the daemon and the service that does to connections what networks do."""

from __future__ import annotations

import asyncio
import contextlib
import enum
import socket
import struct
import threading
from collections.abc import Callable
from typing import Any, cast

from tests.chaos.cutter_frames import Frames

GOING_AWAY = b"\x88\x02\x03\xe9"  # a Close frame with code 1001 (RFC 6455, section 5.5.1)
GOODBYE = 2.0  # seconds a client has to answer a Close frame
READY = 10.0  # seconds for the relay to listen, and to end


class Cut(enum.Enum):
    """What can be done to every connection there is."""

    RESET = "reset"  # RST to both ends; what was on its way is lost
    BLACKHOLE = "blackhole"  # nothing arrives any more, new connections included; RST after a while
    HALF_FAR = "half-open, the service has lost it"  # RST to the service only; the daemon hears nothing, ever
    HALF_NEAR = "half-open, the daemon has lost it"  # RST to the daemon only; the service hears nothing, ever
    FREEZE = "freeze"  # nothing arrives for a while, new connections included; then all goes on, and nothing was lost
    RELOAD = "reload"  # a Close frame with code 1001 between two frames, and nothing behind it

    @property
    def lasts(self) -> bool:
        """Whether it takes a time that the caller chooses."""
        return self in (Cut.BLACKHOLE, Cut.FREEZE)


class Cutter:
    """Relays connections to `target`, a port of this machine, on a thread of its own."""

    def __init__(self, target: int) -> None:
        self.port = 0  # where it listens; known inside the context
        self._target = target
        self._loop: asyncio.AbstractEventLoop | None = None  # of the thread, while it runs
        self._pairs: set[_Pair] = set()  # connections, also those of which one end is gone
        self._held: list[_Pair] = []  # accepted while `_hold`: not connected to the service yet
        self._hold = False  # a new connection gets no further
        self._up = threading.Event()  # it listens
        self._thread = threading.Thread(target=self._main, name="cutter")

    def __enter__(self) -> Cutter:
        self._thread.start()
        assert self._up.wait(READY)
        return self

    def __exit__(self, *_: object) -> None:
        self._do(self._stop)
        self._thread.join(READY)

    # --- for the test's thread ----------------------------------------------------------------------------------------

    def strike(self, cut: Cut, seconds: float = 0.0) -> int:
        """Do it, and return when it is done; how many WebSockets it has hit.

        Args:
            seconds: how long, where `cut.lasts`.
        """
        if not cut.lasts:
            return int(self._do(lambda: self._each(cut)))
        hit = self.begin(cut)
        threading.Event().wait(seconds)
        self.end(cut)
        return hit

    def begin(self, cut: Cut) -> int:
        """Begin what lasts, until `end`; how many WebSockets it has hit."""
        return int(self._do(lambda: self._begin(cut)))

    def end(self, cut: Cut) -> None:
        """It has lasted long enough."""
        self._do(lambda: self._end(cut))

    def heal(self) -> None:
        """Reset what is half open: whoever still waits for an answer learns that there is none."""
        self._do(self._heal)

    def _heal(self) -> None:
        for pair in list(self._pairs):
            if pair.deaf:
                pair.reset()

    @property
    def live(self) -> int:
        """WebSockets that carry something."""
        return int(self._do(lambda: sum(pair.live and pair.frames.upgraded is True for pair in self._pairs)))

    def _do(self, what: Callable[[], object]) -> Any:
        async def run() -> object:
            return what()

        assert self._loop is not None
        return asyncio.run_coroutine_threadsafe(run(), self._loop).result(READY)

    # --- on the relay's own thread ------------------------------------------------------------------------------------

    def _main(self) -> None:
        with asyncio.Runner() as runner:
            runner.run(self._serve())

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._ended = self._loop.create_future()
        server = await self._loop.create_server(self._accepted, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        self._up.set()
        await self._ended
        server.close()
        for pair in list(self._pairs):
            pair.reset()
        await asyncio.sleep(0)  # connection_lost

    def _stop(self) -> None:
        self._ended.set_result(None)

    def _accepted(self) -> _End:
        pair = _Pair(self._pairs)
        pair.near.on_connected = lambda: self._held.append(pair) if self._hold else self._reach(pair)
        return pair.near

    def _reach(self, pair: _Pair) -> None:
        """Connect to the service: on this machine that takes no time."""
        assert self._loop is not None
        if pair.near.transport is None:
            return
        try:
            sock = socket.create_connection(("127.0.0.1", self._target), timeout=READY)
        except OSError:
            pair.reset()
            return
        sock.setblocking(False)
        pair.connecting = self._loop.create_task(self._loop.create_connection(lambda: pair.far, sock=sock))

    def _each(self, cut: Cut) -> int:
        live = [pair for pair in self._pairs if pair.live]
        hit = sum(pair.frames.upgraded is True for pair in live)
        for pair in live:
            pair.strike(cut)
        return hit

    def _begin(self, cut: Cut) -> int:
        self._hold = True
        return self._each(cut)

    def _end(self, cut: Cut) -> None:
        self._hold = False
        held, self._held = self._held, []
        for pair in held:
            if cut is Cut.FREEZE:
                self._reach(pair)
            else:
                pair.reset()
        for pair in list(self._pairs):
            if cut is Cut.FREEZE:
                pair.thaw()
            elif pair.deaf:
                pair.reset()


class _End(asyncio.Protocol):
    """One end of a connection."""

    def __init__(self, received: Callable[[bytes], None], ended: Callable[[], None], lost: Callable[[], None]) -> None:
        self.transport: asyncio.Transport | None = None  # None before it is connected and after it is lost
        self.on_connected: Callable[[], object] = lambda: None
        self.other: _End = self  # set by the pair
        self.frozen = False  # is not read, whatever the other end says
        self.full = False  # its transport wants no more for now
        self._ended_it = False  # nothing more can be sent to it
        self._received, self._ended, self._lost = received, ended, lost

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.on_connected()
        self.flow()
        self.other.flow()

    def flow(self) -> None:
        """Read, or not."""
        if self.transport is None or self.transport.is_closing():
            return
        if self.frozen or self.other.full or self.other.transport is None:
            self.transport.pause_reading()
        else:
            self.transport.resume_reading()

    def pause_writing(self) -> None:
        self.full = True
        self.other.flow()

    def resume_writing(self) -> None:
        self.full = False
        self.other.flow()

    def data_received(self, data: bytes) -> None:
        self._received(data)

    def eof_received(self) -> bool:
        self._ended()
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        self.transport = None
        self._lost()

    def send(self, data: bytes) -> None:
        """Unless it is gone."""
        if self.transport is not None and not self._ended_it:
            self.transport.write(data)

    def send_eof(self) -> None:
        """FIN behind what was sent; idempotent."""
        if self.transport is not None and not self._ended_it:
            self._ended_it = True
            self.transport.write_eof()

    def reset(self) -> None:
        """RST; idempotent."""
        if self.transport is not None:
            with contextlib.suppress(OSError):
                self.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.transport.abort()


class _Pair:
    """A connection: the daemon's end, which is near, and the service's, which is far."""

    def __init__(self, pairs: set[_Pair]) -> None:
        self.near = _End(self._from_near, lambda: self._eof(self.far), lambda: self._lost(self.far))
        self.far = _End(self._from_far, lambda: self._eof(self.near), lambda: self._lost(self.near))
        self.near.other, self.far.other = self.far, self.near
        self.far.on_connected = lambda: None if self.near.transport is not None else self.far.reset()
        self.connecting: asyncio.Task[Any] | None = None  # to the service
        self.frames = Frames()  # of what comes from the service
        self.deaf = False  # what comes is thrown away
        self._half = False  # one end is gone and the other is not to know
        self._leaving = False  # a Close frame is to be put between the next two frames
        self._pairs = pairs
        pairs.add(self)

    @property
    def live(self) -> bool:
        """Whether it carries something."""
        return not (self.deaf or self._half or self._leaving) and self.near.transport is not None

    def strike(self, cut: Cut) -> None:
        if cut is Cut.RESET:
            self.reset()
        elif cut is Cut.BLACKHOLE:
            self.deaf = True
        elif cut is Cut.FREEZE:
            self.near.frozen = self.far.frozen = True
            self.near.flow()
            self.far.flow()
        elif cut is Cut.RELOAD:
            self._leaving = True
            self._leave()
        else:
            self.deaf = self._half = True
            (self.far if cut is Cut.HALF_FAR else self.near).reset()

    def thaw(self) -> None:
        self.near.frozen = self.far.frozen = False
        self.near.flow()
        self.far.flow()

    def reset(self) -> None:
        self.near.reset()
        self.far.reset()

    def _leave(self) -> None:
        """As the service does when it reloads. A connection that is no WebSocket just ends."""
        if self.near.transport is None or (self.frames.upgraded and not self.frames.between):
            return
        if self.frames.upgraded:
            self.near.send(GOING_AWAY)
        self.deaf = True
        self.near.send_eof()
        self.far.reset()
        asyncio.get_running_loop().call_later(GOODBYE, self.near.reset)

    def _from_near(self, data: bytes) -> None:
        if not self.deaf:
            self.far.send(data)

    def _from_far(self, data: bytes) -> None:
        if self.deaf or self.near.transport is None:
            return
        taken = self.frames.follow(data, stop=self._leaving)
        self.near.send(data[:taken])
        if self._leaving:
            self._leave()

    def _eof(self, to: _End) -> None:
        if not self.deaf:
            to.send_eof()

    def _lost(self, other: _End) -> None:
        if self.near.transport is self.far.transport is None:
            self._pairs.discard(self)
        elif self._half or (self._leaving and self.deaf):
            return
        elif self.deaf:
            other.reset()
        elif other.transport is not None:
            other.transport.close()

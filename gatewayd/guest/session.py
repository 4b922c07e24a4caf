"""A client's side of one guest session: what was sent and not acknowledged, who may send how much, what came back.

Pure: bytes and `now` in, bytes and events out (docs/guest-protocol.md). A connection is bytes that the caller carries; it may
break at any byte and be replaced by another one, and nothing is lost or doubled. The order of calls:

    connection made    preface(token) → send; 21 bytes → decode_answer → connected(answer)
    while it lasts     receive(bytes, now) → events; data_to_send() → send; tick(now) at next_deadline()
    it broke           disconnected(), and from the beginning

After a `GuestProtocolError` the session is of no use.
"""

from __future__ import annotations

import os
import struct
from collections import deque

from gatewayd.guest import wire
from gatewayd.guest.events import (
    Accepted,
    Credit,
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
from gatewayd.guest.wire import Answer, GuestProtocolError, Kind, Mode, Status

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

UNACKNOWLEDGED_SPARE = 1 << 20  # bytes kept beyond twice the input window for a guest that acknowledges nothing
INPUT_MERGED = 4096  # bytes up to which input that waits for a connection becomes one frame
_RESIZE = struct.Struct(">HHHH")
_GRANT = struct.Struct(">BI")
_COUNT = struct.Struct(">Q")
_CREDIT = struct.Struct(">I")
_INPUT_TYPE = bytes((Kind.INPUT,))


class GuestRefused(Exception):
    """The guest answered with a status other than 0; nothing changed there.

    Attributes:
        status: one of `wire.Status`.
    """

    def __init__(self, status: int) -> None:
        super().__init__(wire.STATUS_TEXT.get(status, f"the guest refused with status {status}"))
        self.status = status


class _Stream:
    """One direction of output."""

    __slots__ = ("allowed", "ended", "eof", "step", "taken")

    def __init__(self, allowed: int, step: int) -> None:
        self.allowed = allowed  # bytes the guest may send now
        self.taken = 0  # bytes taken by the consumer and not granted anew
        self.step = step  # bytes worth a GRANT
        self.ended = False  # OUTPUT_EOF has come, or we asked for it: nothing is handed on any more
        self.eof = False  # OUTPUT_EOF has come


class ClientSession:
    """One session of the guest, seen from outside."""

    def __init__(self, *, session_id: bytes | None = None, window: int = wire.WINDOW) -> None:
        """`window`: bytes of output of each stream the guest may send ahead of `grant`, and the most bytes of input that may
        be under way (which are 256 KiB at least); 1 to 16 MiB.
        """
        if not 0 < window <= wire.WINDOW_MAX:
            raise ValueError(f"a window of {window} bytes")
        self.id = os.urandom(wire.ID_SIZE) if session_id is None else session_id  # 16 bytes
        self.mode = Mode.OPEN  # for the next connection
        self.received = 0  # numbered bytes received whole
        self.opened = False  # OPENED has come, or the session is one that runs
        self.ended = False  # nothing more comes: after Failed or Detached
        self.connected_now = False  # between connected() and disconnected()
        self.input_credit = wire.INPUT_WINDOW  # bytes of input that may be sent now
        self.input_ended = False  # input_eof was called
        self.input_stopped = False  # INPUT_STOP has come
        self.closed = False  # close was called
        self._window = window
        self._input_window = max(window, wire.INPUT_WINDOW)  # the credit is never above that
        self._unacknowledged_max = 2 * self._input_window + UNACKNOWLEDGED_SPARE  # bytes; more is a guest's failure
        self._streams = {wire.STDOUT: _Stream(window, window // 4), wire.STDERR: _Stream(window, window // 4)}
        self._decoder = wire.FrameDecoder()
        self._unacked: deque[bytes] = deque()  # numbered frames, the oldest first; `_handed` of them are under way
        self._first = 0  # number of the first byte of the oldest
        self._size = 0  # bytes in `_unacked`
        self._handed = 0  # frames of `_unacked` handed to the present connection
        self._sent = 0  # number of the first byte that no connection has been given yet
        self._acked = 0  # what the guest knows that we have received
        self._ack_now = False  # an ACK goes out with the next data_to_send
        self._ack_at: float | None = None  # when the oldest unacknowledged byte must be acknowledged; the caller's clock
        self._exited = False  # EXIT has come
        self._listener = False  # opened as one: ACCEPTED may come

    @classmethod
    def attach(cls, session_id: bytes) -> ClientSession:
        """A session that somebody else opened: the counts come with the answer."""
        session = cls(session_id=session_id, window=wire.WINDOW_MAX)
        session.mode = Mode.ATTACH
        session.opened = True
        for stream in session._streams.values():
            stream.step = 1  # its window is not known, and may be small
        return session

    @classmethod
    def accepted(cls, session_id: bytes, window: int) -> ClientSession:
        """A connection that a listener with that window has accepted."""
        session = cls(session_id=session_id, window=window)
        session.mode = Mode.RESUME
        session.opened = True
        return session

    # -- connections --------------------------------------------------------------------------------------------------

    def preface(self, token: bytes) -> bytes:
        """What a connection begins with."""
        return wire.encode_preface(token, self.id, self.mode, self.received)

    def connected(self, answer: Answer) -> None:
        """Go on over a new connection: what the guest does not have is sent (again).

        Raises:
            GuestRefused: the answer is no; the session is as it was.
            GuestProtocolError: the counts cannot be.
        """
        if answer.status != Status.OK:
            raise GuestRefused(answer.status)
        if self.mode == Mode.ATTACH:
            self._first = self._sent = answer.received
            self.received = answer.base
            if answer.credit > self._input_window:
                raise GuestProtocolError(f"the guest grants {answer.credit} bytes of input at once")
            self.input_credit = answer.credit - sum(len(f) - wire.HEADER_SIZE for f in self._unacked if f[0] == Kind.INPUT)
        elif answer.base != self.received:
            raise GuestProtocolError(f"the guest goes on at {answer.base} instead of {self.received}")
        self.disconnected()
        self._acknowledged(answer.received)
        self.mode = Mode.RESUME
        self.connected_now = True

    def disconnected(self) -> None:
        """The connection is gone: what was queued for it alone is dropped. Idempotent."""
        self.connected_now = False
        self._decoder = wire.FrameDecoder()
        self._handed = 0
        self._acked = self.received  # the next preface says it
        self._ack_now = False
        self._ack_at = None

    def data_to_send(self) -> list[bytes]:
        """Frames for the present connection; none when there is no connection."""
        if not self.connected_now:
            return []
        fresh = len(self._unacked) - self._handed
        frames = [self._unacked[index] for index in range(-fresh, 0)]
        self._handed += fresh
        self._sent = self._first + self._size
        if self._ack_now or (frames and self._acked != self.received):
            frames.append(wire.encode_frame(Kind.ACK, _COUNT.pack(self.received)))
            self._acked = self.received
            self._ack_now = False
            self._ack_at = None
        return frames

    def acknowledge(self) -> None:
        """Do not delay the next acknowledgement: the guest forgets an ended session when it has the last one."""
        if self.connected_now and self._acked != self.received:
            self._ack_now = True

    @property
    def unacknowledged(self) -> int:
        """Bytes that the guest has not acknowledged, sent or not."""
        return self._size

    def next_deadline(self) -> float | None:
        """When to call `tick`, on the clock of `receive`; None while there is nothing to wait for."""
        return self._ack_at

    def tick(self, now: float) -> None:
        """Time has passed: a delayed acknowledgement may be due."""
        if self._ack_at is not None and now >= self._ack_at:
            self._ack_now = True
            self._ack_at = None

    # -- sending ------------------------------------------------------------------------------------------------------

    def open(self, fields: Sequence[tuple[str, bytes]]) -> None:
        """Ask for a new session: the first call. Adds `window`. Raises ValueError when it does not fit one frame."""
        if self.mode != Mode.OPEN or self._size or self._sent:
            raise RuntimeError("cannot open a guest session twice")
        self._listener = ("kind", b"listen-tcp") in fields or ("kind", b"listen-unix") in fields
        self._queue(Kind.OPEN, wire.encode_fields([*fields, ("window", str(self._window).encode())]))

    def send_input(self, data: bytes | memoryview) -> int:
        """Queue as much of `data` as the credit allows; how many bytes that were.

        After the guest's INPUT_STOP, and after its end, everything is taken and dropped.

        Raises:
            RuntimeError: after `input_eof`.
        """
        if self.input_ended:
            raise RuntimeError("cannot send input: it has been ended")
        if self.input_stopped or self.ended or self.closed:
            return len(data)
        size = min(len(data), max(0, self.input_credit))
        self.input_credit -= size
        last = self._unacked[-1] if self._fresh() else b""
        if size and last.startswith(_INPUT_TYPE) and len(last) + size <= INPUT_MERGED:
            self._unacked[-1] = wire.encode_frame(Kind.INPUT, last[wire.HEADER_SIZE :] + data[:size])
            self._size += size
        else:
            for pos in range(0, size, wire.PAYLOAD_MAX):
                self._queue(Kind.INPUT, bytes(data[pos : min(pos + wire.PAYLOAD_MAX, size)]))
        return size

    def input_eof(self) -> None:
        """No more input; idempotent."""
        if not self.input_ended:
            self.input_ended = True
            self._queue(Kind.INPUT_EOF)

    def grant(self, stream: int, size: int) -> None:
        """The consumer has taken `size` bytes of `stream`: told to the guest when it is worth a frame."""
        state = self._streams[stream]
        state.taken += size
        if state.taken >= state.step and not state.ended:
            state.allowed += state.taken
            self._queue(Kind.GRANT, _GRANT.pack(stream, state.taken))
            state.taken = 0

    def signal(self, name: str) -> None:
        """`name` without SIG, such as ``INT``. Raises ValueError when it is no name."""
        self._queue(Kind.SIGNAL, _signal_name(name.encode("ascii", "replace"), ValueError).encode())

    def resize(self, columns: int, rows: int, xpixel: int = 0, ypixel: int = 0) -> None:
        """The terminal's new size; sizes above 65,535 are cut. Of several that were not sent yet only the last one counts."""
        payload = _RESIZE.pack(*(min(max(size, 0), 0xFFFF) for size in (columns, rows, xpixel, ypixel)))
        if self._fresh() and self._unacked[-1][0] == Kind.RESIZE:
            self._unacked[-1] = wire.encode_frame(Kind.RESIZE, payload)
        else:
            self._queue(Kind.RESIZE, payload)

    def stop_output(self, stream: int) -> None:
        """Nobody reads `stream` any more; idempotent. What is still under way is dropped."""
        state = self._streams[stream]
        if not state.ended:
            state.ended = True
            self._queue(Kind.STOP_OUTPUT, bytes((stream,)))

    def close(self) -> None:
        """The session is over; idempotent. Wait for `unacknowledged` to become 0 to know that the guest knows."""
        if not self.closed:
            self._queue(Kind.CLOSE)
            self.closed = True

    def _fresh(self) -> bool:
        """Whether there is a last frame that no connection has ever been given: it may still be changed."""
        return len(self._unacked) > self._handed and self._first + self._size - len(self._unacked[-1]) >= self._sent

    def _queue(self, kind: int, payload: bytes = b"") -> None:
        if self.ended or self.closed:
            return
        if self._size > self._unacknowledged_max and kind in (Kind.SIGNAL, Kind.RESIZE):
            return  # nothing else bounds these two while there is no connection
        frame = wire.encode_frame(kind, payload)
        self._unacked.append(frame)
        self._size += len(frame)

    # -- receiving ----------------------------------------------------------------------------------------------------

    def receive(self, data: bytes, now: float) -> list[Event]:
        """Take bytes of the present connection, cut anywhere.

        Raises:
            GuestProtocolError: they are not what the protocol allows.
        """
        if not self.connected_now:
            raise RuntimeError("cannot receive: there is no connection")
        events: list[Event] = []
        for kind, payload in self._decoder.feed(data):
            if kind < wire.NUMBERED_BELOW:
                if self.ended:
                    raise GuestProtocolError(f"a frame of type {kind:#x} after the last one")
                self.received += wire.HEADER_SIZE + len(payload)
            handler = _HANDLERS.get(kind)
            if handler is None:
                raise GuestProtocolError(f"a frame of the unknown type {kind:#x}")
            handler(self, payload, events)
        due = self.received - self._acked
        if due >= wire.ACK_BYTES:
            self._ack_now = True
        elif due and self._ack_at is None:
            self._ack_at = now + wire.ACK_DELAY / 2
        if self._size > self._unacknowledged_max:
            raise GuestProtocolError(f"the guest acknowledged none of {self._size} bytes")
        return events

    def _on_output(self, stream: int, payload: bytes, events: list[Event]) -> None:
        state = self._streams[stream]
        if not self.opened:
            raise GuestProtocolError("output before the session was opened")
        if len(payload) > state.allowed:
            raise GuestProtocolError(f"{len(payload)} bytes on stream {stream} that has {state.allowed} left")
        state.allowed -= len(payload)
        if payload and not state.ended:
            events.append(Output(stream, payload))

    def _on_stdout(self, payload: bytes, events: list[Event]) -> None:
        self._on_output(wire.STDOUT, payload, events)

    def _on_stderr(self, payload: bytes, events: list[Event]) -> None:
        self._on_output(wire.STDERR, payload, events)

    def _on_output_eof(self, payload: bytes, events: list[Event]) -> None:
        if payload not in (b"\x01", b"\x02"):
            raise GuestProtocolError("the end of no stream")
        state = self._streams[payload[0]]
        if state.eof:
            raise GuestProtocolError(f"stream {payload[0]} ended twice")
        state.ended = state.eof = True
        state.allowed = 0
        events.append(OutputEof(payload[0]))

    def _on_opened(self, payload: bytes, events: list[Event]) -> None:
        self.opened = True
        events.append(Opened(_only(payload)))

    def _on_credit(self, payload: bytes, events: list[Event]) -> None:
        if len(payload) != _CREDIT.size:
            raise GuestProtocolError(f"a credit of {len(payload)} bytes")
        (size,) = _CREDIT.unpack(payload)
        self.input_credit += size
        if self.input_credit > self._input_window:
            raise GuestProtocolError(f"a credit for {self.input_credit} bytes of input, the window is {self._input_window}")
        if size:
            events.append(Credit(size))

    def _on_exit(self, payload: bytes, events: list[Event]) -> None:
        if self._exited:
            raise GuestProtocolError("a process that ended twice")
        self._exited = True
        fields = _only(payload)
        if "signal" in fields:
            events.append(Exit(None, _signal_name(fields["signal"], GuestProtocolError), fields.get("core") == b"1"))
        else:
            events.append(Exit(wire.number(fields.get("code", b"0"), 255), "", False))

    def _on_error(self, payload: bytes, events: list[Event]) -> None:
        self.ended = True
        fields = _only(payload)
        errno = wire.number(fields["errno"], 4095) if "errno" in fields else None
        kind = wire.text(fields.get("kind", b""), 20)
        events.append(Failed(kind, errno, wire.text(fields.get("message", b"")) or "the guest does not say why"))

    def _on_accepted(self, payload: bytes, events: list[Event]) -> None:
        if not self._listener:
            raise GuestProtocolError("a connection was accepted by what is no listener")
        fields = _only(payload)
        try:
            accepted = bytes.fromhex(fields["id"].decode("ascii"))
        except (KeyError, ValueError) as exc:
            raise GuestProtocolError("an accepted connection without an id") from exc
        if len(accepted) != wire.ID_SIZE:
            raise GuestProtocolError("an accepted connection without an id")
        events.append(Accepted(accepted, wire.text(fields.get("peer", b""), 200)))

    def _on_input_stop(self, payload: bytes, events: list[Event]) -> None:
        if payload:
            raise GuestProtocolError("an end of input with a payload")
        if not self.input_stopped:
            self.input_stopped = True
            events.append(InputStopped())

    def _on_item(self, payload: bytes, events: list[Event]) -> None:
        events.append(Item(_only(payload)))

    def _on_ack(self, payload: bytes, events: list[Event]) -> None:
        if len(payload) != _COUNT.size:
            raise GuestProtocolError(f"an acknowledgement of {len(payload)} bytes")
        (count,) = _COUNT.unpack(payload)
        self._acknowledged(count)

    def _on_detached(self, payload: bytes, events: list[Event]) -> None:
        self.ended = True
        events.append(Detached(wire.text(payload, 200)))

    def _acknowledged(self, count: int) -> None:
        """The guest has everything before byte `count`."""
        if not self._first <= count <= self._sent:
            raise GuestProtocolError(f"the guest has {count} bytes, {self._first} to {self._sent} are possible")
        while self._unacked and self._first < count:
            size = len(self._unacked.popleft())
            self._first += size
            self._size -= size
            self._handed = max(0, self._handed - 1)
        if self._first != count:
            raise GuestProtocolError(f"the guest has {count} bytes, which is within a frame")


def _only(payload: bytes) -> dict[str, bytes]:
    """Fields of the guest's: none of its keys repeats, the last one counts."""
    return dict(wire.decode_fields(payload))


def _signal_name(name: bytes, error: type[ValueError]) -> str:
    if not 0 < len(name) <= 16 or not name.replace(b"+", b"").isalnum() or not name.isupper():
        raise error(f"the signal name {name[:20]!r}")
    return name.decode("ascii")


if TYPE_CHECKING:
    _Handler = Callable[[ClientSession, bytes, list[Event]], None]

_HANDLERS: dict[int, _Handler] = {
    Kind.OPENED: ClientSession._on_opened,
    Kind.OUTPUT: ClientSession._on_stdout,
    Kind.ERROUT: ClientSession._on_stderr,
    Kind.OUTPUT_EOF: ClientSession._on_output_eof,
    Kind.CREDIT: ClientSession._on_credit,
    Kind.EXIT: ClientSession._on_exit,
    Kind.ERROR: ClientSession._on_error,
    Kind.ACCEPTED: ClientSession._on_accepted,
    Kind.INPUT_STOP: ClientSession._on_input_stop,
    Kind.ITEM: ClientSession._on_item,
    Kind.ACK: ClientSession._on_ack,
    Kind.DETACHED: ClientSession._on_detached,
}

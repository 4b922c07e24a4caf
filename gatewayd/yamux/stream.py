"""One yamux stream: its state table and its two windows. Pure; driven by `session.Session`."""

from __future__ import annotations

from enum import IntEnum, auto
from typing import Final

from gatewayd.yamux.frames import INITIAL_WINDOW, MAX_U32, ProtocolViolation


class State(IntEnum):
    """How far the two directions of a stream have come."""

    OPEN = auto()  # both directions carry data; from the SYN on, acknowledged or not
    LOCAL_CLOSED = auto()  # we sent FIN, the peer still sends
    REMOTE_CLOSED = auto()  # the peer sent FIN, we still send
    CLOSED = auto()  # FIN both ways
    RESET = auto()  # RST either way, or the session ended


class Signal(IntEnum):
    """What moves a stream from one state to the next."""

    SEND_DATA = auto()
    SEND_FIN = auto()
    SEND_RST = auto()
    RECV_DATA = auto()
    RECV_FIN = auto()
    RECV_RST = auto()


# What is absent is an error: of the caller for SEND_*, of the peer for RECV_*.
TRANSITIONS: Final[dict[State, dict[Signal, State]]] = {
    State.OPEN: {
        Signal.SEND_DATA: State.OPEN,
        Signal.SEND_FIN: State.LOCAL_CLOSED,
        Signal.SEND_RST: State.RESET,
        Signal.RECV_DATA: State.OPEN,
        Signal.RECV_FIN: State.REMOTE_CLOSED,
        Signal.RECV_RST: State.RESET,
    },
    State.LOCAL_CLOSED: {
        Signal.SEND_RST: State.RESET,
        Signal.RECV_DATA: State.LOCAL_CLOSED,
        Signal.RECV_FIN: State.CLOSED,
        Signal.RECV_RST: State.RESET,
    },
    State.REMOTE_CLOSED: {
        Signal.SEND_DATA: State.REMOTE_CLOSED,
        Signal.SEND_FIN: State.CLOSED,
        Signal.SEND_RST: State.RESET,
        Signal.RECV_RST: State.RESET,
    },
    State.CLOSED: {},
    State.RESET: {},
}

_CREDIT_STEPS: Final = 8  # a window is refilled when an eighth of it has been consumed: measurably faster than half


class Stream:
    """State and windows of one stream; no payload is kept here."""

    __slots__ = (
        "abandoned",
        "acked",
        "buffered",
        "id",
        "last_activity",
        "local_origin",
        "recv_window",
        "send_window",
        "state",
        "window",
    )

    def __init__(self, stream_id: int, *, local_origin: bool, window: int, now: float) -> None:
        self.id = stream_id  # odd: opened by the client; even: by the server
        self.local_origin = local_origin  # True: we sent the SYN
        self.state = State.OPEN  # moves by `advance` only
        self.acked = False  # the SYN is acknowledged: by the peer when it is ours, by accept() when it is theirs
        self.abandoned = False  # the application reads no more: the peer's FIN is all that is waited for
        self.send_window = INITIAL_WINDOW  # bytes we may send now; grows by the peer's window updates
        self.recv_window = INITIAL_WINDOW  # bytes the peer may send now; grows by ours
        self.buffered = 0  # bytes received, or announced by a header, that the application has not consumed
        self.window = window  # bytes the peer may have under way and unconsumed together; >= INITIAL_WINDOW
        self.last_activity = now  # time of the last frame from the peer; seconds, the caller's clock

    def allows(self, signal: Signal) -> bool:
        """True when the table has an entry for `signal` in the present state."""
        return signal in TRANSITIONS[self.state]

    def advance(self, signal: Signal) -> None:
        """Move on by the table.

        Raises:
            KeyError: not allowed in this state; ask `allows` first.
        """
        self.state = TRANSITIONS[self.state][signal]

    def first_grant(self) -> int:
        """Bytes that the SYN or ACK grants on top of the initial window; call once, when that frame is queued."""
        delta = self.window - INITIAL_WINDOW
        self.recv_window += delta
        return delta

    def receive_payload(self, length: int) -> None:
        """Account for a DATA header that announces `length` bytes.

        Raises:
            ProtocolViolation: more than the window we granted (spec, "Flow Control").
        """
        if length > self.recv_window:
            raise ProtocolViolation(f"stream {self.id}: {length} bytes in a receive window of {self.recv_window}")
        self.recv_window -= length
        self.buffered += length

    def receive_credit(self, delta: int) -> bool:
        """Add the peer's window update; True when the window was 0 and is not any more.

        Raises:
            ProtocolViolation: the window would not fit 32 bits.
        """
        if self.send_window + delta > MAX_U32:
            raise ProtocolViolation(f"stream {self.id}: window update of {delta} overflows the send window")
        opened = self.send_window == 0 and delta > 0
        self.send_window += delta
        return opened

    def credit_due(self) -> bool:
        """True when enough has been consumed for a window update to be worth its frame."""
        return self._delta() >= self.window // _CREDIT_STEPS and self.allows(Signal.RECV_DATA)

    def take_credit(self) -> int:
        """Bytes to grant now, counted as granted; 0 when there is nothing to grant."""
        delta = max(0, self._delta())
        self.recv_window += delta
        return delta

    def _delta(self) -> int:
        # What is buffered stays on the peer's account until the application takes it.
        return self.window - self.buffered - self.recv_window

"""What a yamux session tells its user: plain facts, in the order in which they happened."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StreamOpened:
    """The peer opened a stream: answer with `Session.accept` or `Session.reset`."""

    stream_id: int


@dataclass(frozen=True, slots=True)
class StreamAcknowledged:
    """The peer accepted a stream that we opened."""

    stream_id: int


@dataclass(frozen=True, slots=True)
class DataReceived:
    """Bytes of a stream, in order; hand them back with `Session.consume` once the application has taken them."""

    stream_id: int
    data: bytes  # never empty


@dataclass(frozen=True, slots=True)
class WindowOpened:
    """The send window of a stream was 0 and is not any more."""

    stream_id: int


@dataclass(frozen=True, slots=True)
class EofReceived:
    """The peer sent FIN: no more DataReceived for this stream; our direction is unaffected."""

    stream_id: int


@dataclass(frozen=True, slots=True)
class StreamWasReset:
    """A stream is gone in both directions: RST from the peer, or a rule of ours (see `reason`)."""

    stream_id: int
    reason: str  # a phrase that completes «stream N was reset: …»


@dataclass(frozen=True, slots=True)
class PingAnswered:
    """The answer to `Session.ping`."""

    ping_id: int
    rtt: float  # seconds


@dataclass(frozen=True, slots=True)
class GoAwayReceived:
    """The peer accepts no new streams; the present ones go on."""


@dataclass(frozen=True, slots=True)
class SessionEnded:
    """The session is over and every stream with it; send what `data_to_send` still returns, then close the transport."""

    reason: str  # a phrase that completes «the session ended: …»; holds numbers from the peer, never its text
    orderly: bool  # the transport ended between two frames: nobody broke a rule


Event = (
    StreamOpened
    | StreamAcknowledged
    | DataReceived
    | WindowOpened
    | EofReceived
    | StreamWasReset
    | PingAnswered
    | GoAwayReceived
    | SessionEnded
)

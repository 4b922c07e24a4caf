"""Limits and times of a yamux session."""

from __future__ import annotations

from dataclasses import dataclass

from gatewayd.yamux.frames import INITIAL_WINDOW, MAX_U32


@dataclass(frozen=True, kw_only=True)
class SessionConfig:
    """Limits and times of a session. Sizes in bytes, times in seconds."""

    max_stream_window: int = 1 << 20  # receive window of a stream; what exceeds 256 KiB is granted with the SYN or ACK
    window_budget: int = 64 << 20  # sum of all grants above 256 KiB; streams beyond it get 256 KiB
    max_streams: int = 4096  # open at once, both origins together
    accept_backlog: int = 256  # peer's streams not accepted yet, own ones not acknowledged yet; 0 refuses all of the peer's
    max_frame: int = 64 * 1024  # payload of the DATA frames that we send
    send_queue: int = 256 * 1024  # unsent stream bytes above which `send` accepts nothing
    keepalive_interval: float = 15.0  # between the end of one keepalive ping and the next; 0 sends none
    keepalive_timeout: float = 10.0  # unanswered ping and silence for this long end the session
    stream_close_timeout: float = 300.0  # silence on a half-closed stream after which it is reset

    def __post_init__(self) -> None:
        if not INITIAL_WINDOW <= self.max_stream_window <= MAX_U32:
            raise ValueError(f"max_stream_window is {self.max_stream_window}, must be {INITIAL_WINDOW} to {MAX_U32}")
        if min(self.max_streams, self.max_frame, self.send_queue) < 1 or self.accept_backlog < 0:
            raise ValueError("max_streams, max_frame and send_queue must be positive, accept_backlog not negative")
        if min(self.keepalive_timeout, self.stream_close_timeout) <= 0 or self.keepalive_interval < 0:
            raise ValueError("times must be positive (keepalive_interval may be 0)")

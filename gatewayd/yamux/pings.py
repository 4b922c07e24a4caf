"""Pings of a yamux session: ids, round-trip times, and the keepalive's clockwork. Pure."""

from __future__ import annotations

from typing import Final

from gatewayd.yamux.frames import MAX_U32

_MAX_UNDER_WAY: Final = 256  # own pings remembered; the oldest is forgotten first


class Pings:
    """Our own pings, and when the keepalive has to act. All times in seconds of the caller's clock."""

    def __init__(self, *, interval: float, timeout: float) -> None:
        self._interval = interval  # from one keepalive's answer to the next ping; 0: no keepalive
        self._timeout = timeout  # how long a keepalive ping may stay unanswered in silence
        self._under_way: dict[int, float] = {}  # id → time sent
        self._next_id = 0  # id of the next ping
        self._keepalive_id: int | None = None  # the keepalive ping under way
        self._keepalive_at: float | None = None  # when it was sent or, with none under way, when it is due; None before start

    def start(self, now: float) -> None:
        """Start the keepalive's clock; later calls do nothing."""
        if self._keepalive_at is None:
            self._keepalive_at = now + self._interval

    def new(self, now: float) -> int:
        """Register a ping sent at `now`; its id."""
        ping_id = self._next_id
        self._next_id = (ping_id + 1) & MAX_U32
        if len(self._under_way) >= _MAX_UNDER_WAY:
            del self._under_way[next(iter(self._under_way))]
        self._under_way[ping_id] = now
        return ping_id

    def new_keepalive(self, now: float) -> int:
        """Register the keepalive ping; its id."""
        self._keepalive_id = self.new(now)
        self._keepalive_at = now
        return self._keepalive_id

    def answered(self, ping_id: int, now: float) -> float | None:
        """The round-trip time; None for an answer to no ping of ours, or to one forgotten."""
        if ping_id == self._keepalive_id:
            self._keepalive_id = None
            self._keepalive_at = now + self._interval
        sent = self._under_way.pop(ping_id, None)
        return None if sent is None else now - sent

    @property
    def keepalive_under_way(self) -> bool:
        """True when the next due moment is the deadline of a ping, not the time for one."""
        return self._keepalive_id is not None

    def due(self, last_received: float) -> float | None:
        """When the keepalive has to act next; None without one.

        Any byte received shows life and moves the deadline of a ping under way: behind a full transport buffer the ping
        itself may wait longer than its timeout.
        """
        if self._keepalive_at is None or not self._interval:
            return None
        if self._keepalive_id is None:
            return self._keepalive_at
        return max(self._keepalive_at, last_received) + self._timeout

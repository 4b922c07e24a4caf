"""The two clocks that TTLs go by; a test brings its own."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime


@dataclass(frozen=True)
class Clock:
    """Where the time comes from."""

    monotonic: Callable[[], float] = time.monotonic  # seconds; for lack of use, while the service runs
    utc: Callable[[], datetime] = lambda: datetime.now(UTC)  # for what must outlive the service: when a sandbox was stopped

    def stamp(self) -> str:
        """The present as stored and answered: ISO 8601, UTC."""
        return self.utc().strftime("%Y-%m-%dT%H:%M:%S.%fZ")

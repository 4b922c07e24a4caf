"""Time passing: sandboxes without use are stopped, stopped ones deleted, as their records say (protocol section 1)."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable
from datetime import UTC, datetime

from gatewayd.local.boxes import Boxes
from gatewayd.local.envelope import ServiceError
from gatewayd.local.sandbox import Sandbox

log = logging.getLogger(__name__)

SWEEP_INTERVAL = 10.0  # seconds; the fields count in minutes


def idle(sandboxes: Iterable[Sandbox], monotonic: float) -> list[Sandbox]:
    """Those that run and had no use for their idle_ttl_seconds."""
    return [
        sandbox
        for sandbox in sandboxes
        if sandbox.run is not None
        and 0 < sandbox.record.idle_ttl_seconds <= sandbox.idle_for(monotonic)
        and sandbox.record.status == "ready"
    ]


def expired(sandboxes: Iterable[Sandbox], clock: datetime) -> list[Sandbox]:
    """Those that have been stopped for their delete_after_stop_seconds."""
    found = []
    for sandbox in sandboxes:
        record = sandbox.record
        if record.status == "stopped" and record.delete_after_stop_seconds > 0 and record.stopped_at is not None:
            stopped = clock - datetime.fromisoformat(record.stopped_at)
            if stopped.total_seconds() >= record.delete_after_stop_seconds:
                found.append(sandbox)
    return found


async def sweep(boxes: Boxes) -> None:
    """Look once."""
    for sandbox in idle(boxes.all(), time.monotonic()):
        seconds = sandbox.record.idle_ttl_seconds
        log.info("sandbox %s: not used for %d s: stopping it", sandbox.record.name, seconds)
        await boxes.stop(sandbox, f"stopped after {seconds} s without use")
    for sandbox in expired(boxes.all(), datetime.now(UTC)):
        seconds = sandbox.record.delete_after_stop_seconds
        log.info("sandbox %s: stopped for %d s: deleting it", sandbox.record.name, seconds)
        await boxes.delete(sandbox)


async def sweep_for_ever(boxes: Boxes) -> None:
    """Look every SWEEP_INTERVAL until cancelled."""
    while True:
        await asyncio.sleep(SWEEP_INTERVAL)
        try:
            await sweep(boxes)
        except ServiceError as exc:
            log.warning("sweep: %s", exc.message)

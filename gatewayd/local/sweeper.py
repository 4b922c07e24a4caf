"""Time passing: sandboxes without use are stopped, stopped ones deleted, as their records say (protocol section 1)."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
from datetime import datetime

from gatewayd.local.boxes import Boxes
from gatewayd.local.envelope import ServiceError
from gatewayd.local.memory import Trimmer
from gatewayd.local.sandbox import Sandbox

log = logging.getLogger(__name__)

SWEEP_INTERVAL = 10.0  # seconds between looks at most; the fields count in minutes
SHORTEST = 0.5  # and at least


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
    boxes.flush()
    for sandbox in idle(boxes.all(), boxes.clock.monotonic()):
        seconds = sandbox.record.idle_ttl_seconds
        log.info("sandbox %s: not used for %d s: stopping it", sandbox.record.name, seconds)
        await boxes.stop(sandbox, f"stopped after {seconds} s without use")
    for sandbox in expired(boxes.all(), boxes.clock.utc()):
        seconds = sandbox.record.delete_after_stop_seconds
        log.info("sandbox %s: stopped for %d s: deleting it", sandbox.record.name, seconds)
        await boxes.delete(sandbox)


def pause(boxes: Boxes) -> float:
    """Seconds until it is time to look again: when the next sandbox may be due, SWEEP_INTERVAL at most."""
    monotonic, clock = boxes.clock.monotonic(), boxes.clock.utc()
    due = SWEEP_INTERVAL
    for sandbox in boxes.all():
        record = sandbox.record
        if sandbox.run is not None and record.idle_ttl_seconds > 0:
            due = min(due, record.idle_ttl_seconds - sandbox.idle_for(monotonic))
        elif record.status == "stopped" and record.delete_after_stop_seconds > 0 and record.stopped_at is not None:
            due = min(due, record.delete_after_stop_seconds - (clock - datetime.fromisoformat(record.stopped_at)).total_seconds())
    return max(due, SHORTEST)


async def sweep_for_ever(boxes: Boxes) -> None:
    """Look whenever a sandbox may be due, until cancelled. Memory is given back when it has become quiet."""
    trimmer = Trimmer()
    while True:
        await asyncio.sleep(pause(boxes))
        trimmer.look()
        try:
            await sweep(boxes)
        except ServiceError as exc:
            log.warning("sweep: %s", exc.message)

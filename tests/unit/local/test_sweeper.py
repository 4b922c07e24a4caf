"""Which sandboxes time has run out for."""

from __future__ import annotations

import asyncio
import time
from datetime import UTC, datetime, timedelta
from typing import Any, cast

from gatewayd.local.sandbox import Run, Sandbox
from gatewayd.local.store import Record, now
from gatewayd.local.sweeper import expired, idle


class Idle:
    """As much of a run as the sweeper looks at."""

    def __init__(self, running: int = 0, busy: bool = False) -> None:
        self.commands = self
        self.running = running
        self.busy = busy
        self.tunnels = {self}


def sandbox(run: Idle | None = None, **changes: Any) -> Sandbox:
    fields: dict[str, Any] = {
        "id": "id",
        "name": "name",
        "status": "ready" if run else "stopped",
        "created_at": now(),
        "updated_at": now(),
        "idle_ttl_seconds": 60,
        "delete_after_stop_seconds": 0,
        **changes,
    }
    made = Sandbox(Record(**fields))
    made.run = cast("Run | None", run)
    return made


async def test_idle_sandboxes_are_due_after_their_time() -> None:
    one = sandbox(Idle())
    start = time.monotonic()
    assert idle([one], start + 59) == []
    assert idle([one], start + 61) == [one]
    one.touch()
    assert idle([sandbox(Idle(), idle_ttl_seconds=0), sandbox(None), sandbox(Idle(), status="deleting")], start + 10**6) == []


async def test_use_puts_it_off() -> None:
    start = time.monotonic()
    running = sandbox(Idle(running=1))
    tunnelled = sandbox(Idle(busy=True))
    requested = sandbox(Idle())
    with requested.in_use():
        assert idle([running, tunnelled, requested], start + 1000) == []
    assert idle([running, tunnelled], start + 1059) == []
    for one in (running, tunnelled):
        run = cast("Idle", one.run)
        run.running, run.busy = 0, False
    assert idle([running, tunnelled], start + 1100) == []
    assert idle([running, tunnelled], start + 1200) == [running, tunnelled]
    assert idle([requested], time.monotonic() + 59) == []
    assert idle([requested], time.monotonic() + 61) == [requested]
    await asyncio.sleep(0)


async def test_stopped_sandboxes_expire() -> None:
    clock = datetime.now(UTC)
    stopped = (clock - timedelta(seconds=120)).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
    due = sandbox(None, delete_after_stop_seconds=120, stopped_at=stopped)
    assert expired([due], clock) == [due]
    assert expired([due], clock - timedelta(seconds=1)) == []
    assert expired([sandbox(None, delete_after_stop_seconds=0, stopped_at=stopped)], clock) == []
    assert expired([sandbox(Idle(), delete_after_stop_seconds=60, stopped_at=stopped)], clock) == []
    assert expired([sandbox(None, delete_after_stop_seconds=60)], clock) == []

"""TTLs on the real runtime, by a clock that the test sets."""

from __future__ import annotations

import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from gatewayd.local.boxes import Boxes
from gatewayd.local.clock import Clock
from gatewayd.local.models import CreateBody
from gatewayd.local.runtime.native import NativeRuntime
from gatewayd.local.store import Store
from gatewayd.local.sweeper import SHORTEST, SWEEP_INTERVAL, pause, sweep

pytestmark = pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap is not installed")


class Hands:
    """Sets a clock."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.clock = Clock(lambda: self.seconds, lambda: datetime(2026, 1, 1, tzinfo=UTC) + timedelta(seconds=self.seconds))


async def opened(path: Path, hands: Hands) -> Boxes:
    boxes = Boxes(Store(path / "state.db"), NativeRuntime(path), hands.clock)
    await boxes.recover()
    return boxes


async def test_the_whole_life(tmp_path: Path) -> None:
    hands = Hands()
    boxes = await opened(tmp_path, hands)
    sandbox = await boxes.create(CreateBody(wait_for_ready=True, idle_ttl_seconds=120, delete_after_stop_seconds=3600))
    forever = await boxes.create(CreateBody(wait_for_ready=True, idle_ttl_seconds=0))
    assert pause(boxes) == SWEEP_INTERVAL
    hands.seconds = 115
    assert pause(boxes) == 5
    await sweep(boxes)
    with sandbox.in_use():  # a request, a client of a command
        hands.seconds = 1000
        assert pause(boxes) == SWEEP_INTERVAL
        await sweep(boxes)
    hands.seconds = 1119.9
    await sweep(boxes)
    assert sandbox.record.status == "ready"
    assert pause(boxes) == SHORTEST
    hands.seconds = 1120
    await sweep(boxes)
    assert (sandbox.record.status, sandbox.record.stopped_at) == ("stopped", "2026-01-01T00:18:40.000000Z")
    assert forever.record.status == "ready"
    await boxes.running(sandbox)  # woken: the time begins anew
    assert sandbox.record.stopped_at is None
    hands.seconds = 1300
    await sweep(boxes)
    assert sandbox.record.status == "stopped"
    await boxes.aclose()

    hands.seconds += 3599  # while no service runs
    boxes = await opened(tmp_path, hands)
    await sweep(boxes)
    assert {one.record.status for one in boxes.all()} == {"stopped"}
    assert pause(boxes) == 1
    hands.seconds += 1
    await sweep(boxes)
    assert [one.record.id for one in boxes.all()] == [forever.record.id]
    await boxes.aclose()


async def test_a_sandbox_that_a_killed_service_left_expires_too(tmp_path: Path) -> None:
    hands = Hands()
    boxes = await opened(tmp_path, hands)
    sandbox = await boxes.create(CreateBody(wait_for_ready=True, delete_after_stop_seconds=60))
    boxes._store.save(sandbox.record)
    await boxes.stop(sandbox)
    boxes._save(sandbox, status="ready", stopped_at=None)  # what a killed service leaves in its file
    await boxes.aclose()
    hands.seconds = 1000
    boxes = await opened(tmp_path, hands)
    hands.seconds = 1059
    await sweep(boxes)
    assert len(boxes.all()) == 1
    hands.seconds = 1060
    await sweep(boxes)
    assert boxes.all() == []
    await boxes.aclose()

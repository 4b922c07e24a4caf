"""The manager on the real runtime, in this process: what time and crossing requests do to a sandbox."""

from __future__ import annotations

import asyncio
import errno
import shutil
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from gatewayd.local.boxes import Boxes
from gatewayd.local.envelope import ServiceError
from gatewayd.local.models import CreateBody, PatchBody
from gatewayd.local.runtime.native import NativeRuntime
from gatewayd.local.storage import WriteFailure
from gatewayd.local.store import Store
from gatewayd.local.sweeper import sweep

pytestmark = pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap is not installed")


@pytest.fixture
async def boxes(tmp_path: Path) -> AsyncIterator[Boxes]:
    """The sandboxes of one state directory."""
    made = Boxes(Store(tmp_path / "state.db"), NativeRuntime(tmp_path))
    await made.recover()
    yield made
    await made.aclose()
    await made.aclose()


READY = CreateBody(wait_for_ready=True)


async def test_idle_sandboxes_are_stopped_and_deleted_in_time(boxes: Boxes) -> None:
    sandbox = await boxes.create(CreateBody(wait_for_ready=True, idle_ttl_seconds=60, delete_after_stop_seconds=60))
    await sweep(boxes)
    assert sandbox.record.status == "ready"
    sandbox._last_use -= 61
    await sweep(boxes)
    assert (sandbox.record.status, sandbox.record.status_message) == ("stopped", "stopped after 60 s without use")
    await sweep(boxes)
    assert boxes.all() == [sandbox]
    sandbox.record = replace(sandbox.record, stopped_at="2020-01-01T00:00:00.000000Z")
    await sweep(boxes)
    assert boxes.all() == []


async def test_a_start_is_shared(boxes: Boxes) -> None:
    sandbox = await boxes.create(READY)
    await boxes.stop(sandbox)
    runs = await asyncio.gather(*(boxes.running(sandbox) for _ in range(5)), boxes.start(sandbox))
    assert {id(run) for run in runs[:5]} == {id(sandbox.run)}


async def test_one_who_gives_up_does_not_take_the_start_from_others(boxes: Boxes) -> None:
    sandbox = await boxes.create(READY)
    await boxes.stop(sandbox)
    first = asyncio.ensure_future(boxes.running(sandbox))
    second = asyncio.ensure_future(boxes.running(sandbox))
    await asyncio.sleep(0)
    first.cancel()
    assert await second is sandbox.run


async def test_a_request_that_crosses_a_stop_is_served(boxes: Boxes) -> None:
    sandbox = await boxes.create(READY)
    old = sandbox.run
    stopping = asyncio.ensure_future(boxes.stop(sandbox))
    async with asyncio.timeout(10):
        while sandbox.run is not None:  # noqa: ASYNC110 - the first step of a stop tells nobody
            await asyncio.sleep(0)
    run = await boxes.running(sandbox)
    await stopping
    assert run is not old
    assert sandbox.record.status == "ready"


async def test_deleting_wins(boxes: Boxes) -> None:
    sandbox = await boxes.create(CreateBody())
    assert sandbox.record.status == "provisioning"
    results = await asyncio.gather(
        boxes.delete(sandbox), boxes.delete(sandbox), boxes.stop(sandbox), boxes.running(sandbox), return_exceptions=True
    )
    assert results[0] is results[1] is None
    assert boxes.all() == []
    with pytest.raises(ServiceError) as caught:
        boxes.get(sandbox.record.id)
    assert caught.value.status == 404
    with pytest.raises(ServiceError):
        await boxes.update(sandbox, PatchBody(name="late"))


async def test_a_name_is_taken_from_the_first_moment(boxes: Boxes) -> None:
    body = CreateBody(name="same", wait_for_ready=True)
    results = await asyncio.gather(boxes.create(body), boxes.create(body), return_exceptions=True)
    [error] = [result for result in results if isinstance(result, ServiceError)]
    assert error.status == 409
    assert len(boxes.all()) == 1


async def test_not_ready_in_time(boxes: Boxes) -> None:
    with pytest.raises(ServiceError) as caught:
        await boxes.create(CreateBody(name="slow", wait_for_ready=True, timeout=0.001))
    assert caught.value.status == 408
    await boxes.start(boxes.get("slow"))
    assert boxes.get("slow").record.status == "ready"


async def test_nothing_starts_while_it_ends(boxes: Boxes) -> None:
    sandbox = await boxes.create(READY)
    await boxes.aclose()
    assert sandbox.record.status == "stopped"
    for attempt in (boxes.create(READY), boxes.running(sandbox), boxes.start(sandbox)):
        with pytest.raises(ServiceError) as caught:
            await attempt
        assert caught.value.status == 503


async def test_an_interrupted_deletion_is_finished(tmp_path: Path) -> None:
    first = Boxes(Store(tmp_path / "state.db"), NativeRuntime(tmp_path))
    await first.recover()
    sandbox = await first.create(READY)
    await first.stop(sandbox)
    first._save(sandbox, status="deleting")
    await first.aclose()
    second = Boxes(Store(tmp_path / "state.db"), NativeRuntime(tmp_path))
    await second.recover()
    assert second.all() == []
    assert not list((tmp_path / "boxes").iterdir())
    await second.aclose()


async def test_what_cannot_be_recorded_is_recorded_later(boxes: Boxes, monkeypatch: pytest.MonkeyPatch) -> None:
    sandbox = await boxes.create(READY)

    def full(statement: str, values: object) -> None:
        raise WriteFailure("database or disk is full") from OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(boxes._store._boxes, "_write", full)
        for refused in (lambda: boxes.create(READY), lambda: boxes.update(sandbox, PatchBody(name="new"))):
            with pytest.raises(ServiceError) as caught:
                await refused()
            assert (caught.value.status, caught.value.error) == (507, "StorageFull")
        await boxes.stop(sandbox)
        await sweep(boxes)
        assert [(one.record.name, one.record.status) for one in boxes.all()] == [(sandbox.record.name, "stopped")]
    assert [record.status for record in boxes._store.load()] == ["ready"]
    await sweep(boxes)
    assert boxes._store.load() == [sandbox.record]

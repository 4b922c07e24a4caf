"""Disks of a limited size: the limit holds, the disk grows, and this machine keeps nothing of it mounted."""

from __future__ import annotations

import asyncio
import errno
import os
from pathlib import Path

import pytest

from gatewayd.local.runtime import disk
from gatewayd.local.runtime.base import BoxSpec, RuntimeFailure
from gatewayd.local.runtime.checks import why_no_disk_limits
from gatewayd.local.runtime.inside import loopdisk
from gatewayd.local.runtime.native import NativeRuntime

from .conftest import Start, needs_bubblewrap, run, sh

MIB = 1 << 20
pytestmark = needs_bubblewrap
needs_disks = pytest.mark.skipif(bool(why_no_disk_limits()), reason=why_no_disk_limits() or "-")


def loop_devices() -> set[str]:
    """Backing files of this machine's loop devices."""
    return {path.read_text().strip() for path in Path("/sys/block").glob("loop*/loop/backing_file")}


def size_of(text: str) -> int:
    return int(text.split()[0])


@needs_disks
async def test_a_full_disk_is_full_inside_only(start: Start, tmp_path: Path) -> None:
    mounts = Path("/proc/self/mounts").read_text()
    box = await start(id="small", fs_capacity_bytes=32 * MIB)
    assert box.limits_note == "" or "fs_capacity" not in box.limits_note
    image = tmp_path / "state/boxes/small/disk.img"
    assert loop_devices() >= {str(image)}
    assert Path("/proc/self/mounts").read_text() == mounts
    ran = await run(box, "dd", "if=/dev/zero", "of=/root/big", "bs=1M", "count=64")
    assert "No space left on device" in ran.err
    assert image.stat().st_blocks * 512 <= 33 * MIB
    assert (await run(box, "sh", "-c", "rm /root/big && echo room > /root/small && cat /root/small")).out == "room\n"
    writer = await box.open_write("/root/up")
    assert os.write(writer.fd, bytes(64 * MIB)) < 32 * MIB
    with pytest.raises(OSError) as caught:
        os.write(writer.fd, b"x" * MIB)
    assert caught.value.errno == errno.ENOSPC
    await writer.abort()
    await box.stop()
    assert str(image) not in loop_devices()  # stop() returns when that is so


@needs_disks
async def test_it_grows_at_the_next_start_and_never_shrinks(start: Start) -> None:
    box = await start(id="grows", fs_capacity_bytes=32 * MIB)
    await sh(box, "echo kept > /root/file")
    before = size_of(await sh(box, "df --output=size -B1 / | tail -1"))
    await box.stop()
    box = await start(id="grows", fs_capacity_bytes=96 * MIB)
    assert size_of(await sh(box, "df --output=size -B1 / | tail -1")) > before + 50 * MIB
    await box.stop()
    box = await start(id="grows", fs_capacity_bytes=48 * MIB)
    assert "does not shrink" in box.limits_note
    assert await sh(box, "cat /root/file") == "kept\n"
    await box.stop()
    box = await start(id="grows")
    assert size_of(await sh(box, "df --output=size -B1 / | tail -1")) > before + 50 * MIB


@needs_disks
async def test_a_growth_that_was_cut_short_is_made_good(runtime: NativeRuntime, start: Start, tmp_path: Path) -> None:
    box = await start(id="cut", fs_capacity_bytes=32 * MIB)
    await sh(box, "echo kept > /root/file")
    await box.stop()
    os.truncate(tmp_path / "state/boxes/cut/disk.img", 64 * MIB)  # and then the service was killed
    box = await start(id="cut", fs_capacity_bytes=64 * MIB)
    assert size_of(await sh(box, "df --output=size -B1 / | tail -1")) > 40 * MIB
    assert await sh(box, "cat /root/file") == "kept\n"


@needs_disks
async def test_an_image_is_never_mounted_twice(start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    await start(id="once", fs_capacity_bytes=32 * MIB)
    image = str(tmp_path / "state/boxes/once/disk.img")
    with pytest.raises(OSError) as caught:
        await asyncio.to_thread(loopdisk.lock, image, 0.0)
    assert caught.value.errno == errno.EBUSY
    monkeypatch.setattr(disk, "_LOCK_DEADLINE", 0.0)
    with pytest.raises(RuntimeFailure):
        await start(id="once", fs_capacity_bytes=64 * MIB)


async def test_a_box_from_before_keeps_its_plain_folder(start: Start) -> None:
    box = await start(id="old")
    await sh(box, "echo kept > /root/file")
    await box.stop()
    box = await start(id="old", fs_capacity_bytes=32 * MIB)
    assert "fs_capacity_bytes" in box.limits_note
    assert await sh(box, "cat /root/file") == "kept\n"


async def test_what_cannot_be_limited_is_said(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "why_no_disk_limits", lambda: "only root may")
    box = await start(id="free", fs_capacity_bytes=32 * MIB)
    assert "not enforced on this machine: fs_capacity_bytes (only root may)" in box.limits_note


@needs_disks
async def test_a_broken_disk_says_so(runtime: NativeRuntime, start: Start, tmp_path: Path) -> None:
    await (await start(id="broken", fs_capacity_bytes=32 * MIB)).stop()
    (tmp_path / "state/boxes/broken/disk.img").write_bytes(b"no file system" * 1000)
    for capacity in (32 * MIB, 64 * MIB):
        with pytest.raises(RuntimeFailure) as caught:
            await runtime.start(BoxSpec("broken", "boxy", fs_capacity_bytes=capacity))
        assert str(tmp_path) not in str(caught.value)
    assert not any("broken" in path for path in loop_devices())

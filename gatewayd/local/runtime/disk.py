"""Making and growing the disk of a sandbox whose size is limited (`inside.loopdisk` mounts it)."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from pathlib import Path

from gatewayd.local.runtime.base import RuntimeFailure
from gatewayd.local.runtime.checks import SEARCH, why_no_disk_limits
from gatewayd.local.runtime.inside import loopdisk

MIN_BYTES = 16 << 20  # the smallest disk made: an ext4 with a journal needs some room
_SIZE = "disk.size"  # file beside the image: the size its file system has been grown to
_TOOL_DEADLINE = 120.0  # seconds: e2fsck reads all of a disk's metadata
_LOCK_DEADLINE = 10.0  # seconds for a loop device to let go after a stop


def prepare(folder: Path, capacity: int | None) -> str:
    """Make the disk in a box's folder, or grow it; a box that was made without one keeps its plain folder.

    Args:
        capacity: bytes; None: no limit asked for, an existing disk keeps its size.

    Returns:
        What cannot be enforced, for users; "" when nothing.

    Raises:
        RuntimeFailure, OSError: the disk is in use or broken, or this machine's own disk is full.
    """
    image = folder / loopdisk.IMAGE
    if capacity is None:
        return ""
    space = os.statvfs(folder)
    wanted = max(MIN_BYTES, min(capacity, space.f_blocks * space.f_frsize))  # beyond this machine's disk there is nothing
    if image.exists():
        return _grow(image, wanted)
    if reason := why_no_disk_limits():
        return f"not enforced on this machine: fs_capacity_bytes ({reason})"
    if (folder / "upper").exists():
        return "fs_capacity_bytes is not enforced: this sandbox was made without a limit"
    (folder / loopdisk.MOUNTPOINT).mkdir(mode=0o700, exist_ok=True)
    draft = image.with_suffix(".new")
    draft.unlink(missing_ok=True)
    try:
        with draft.open("xb") as file:
            file.truncate(wanted)
        # what mkfs would zero in advance stays a hole in the image: the kernel zeroes it when it is needed
        _run("mkfs.ext4", "-q", "-F", "-m", "0", "-E", "nodiscard,lazy_itable_init=1,lazy_journal_init=1", str(draft))
        _record(folder, wanted)
        draft.rename(image)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
    return ""


def _grow(image: Path, wanted: int) -> str:
    record = image.with_name(_SIZE)
    size = int(record.read_text()) if record.exists() else image.stat().st_size
    if wanted < size:
        return f"fs_capacity_bytes: a disk does not shrink, this one has {size}"
    if wanted > size:
        lock = loopdisk.lock(str(image), time.monotonic() + _LOCK_DEADLINE)
        try:
            os.truncate(image, wanted)
            _run("e2fsck", "-f", "-p", str(image), fine=(0, 1))  # 1: it corrected something
            _run("resize2fs", str(image))
            _record(image.parent, wanted)
        finally:
            os.close(lock)
    return ""


def _record(folder: Path, size: int) -> None:
    draft = folder / (_SIZE + ".new")
    draft.write_text(str(size))
    draft.rename(folder / _SIZE)


def _run(*command: str, fine: tuple[int, ...] = (0,)) -> None:
    try:
        done = subprocess.run(
            command,
            env={"PATH": SEARCH, "LC_ALL": "C"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_TOOL_DEADLINE,
            check=False,
        )
    except subprocess.TimeoutExpired as exc:
        raise RuntimeFailure(f"the sandbox's disk cannot be prepared: {command[0]} did not end") from exc
    if done.returncode not in fine:
        said = done.stderr.decode("utf-8", "replace").replace(command[-1], "the disk").strip()
        with contextlib.suppress(IndexError):
            said = said.splitlines()[-1][:200]
        raise RuntimeFailure(f"the sandbox's disk cannot be prepared: {command[0]}: {said}")

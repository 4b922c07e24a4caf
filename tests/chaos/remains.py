"""What a service can leave behind on a machine: processes, control groups, mounts, loop devices, descriptors, disk."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import sqlite3
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h


@contextlib.contextmanager
def adopting() -> Iterator[None]:
    """Orphans of this process's descendants become its children: whatever a killed service leaves can be found below us."""
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    assert prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0
    try:
        yield
    finally:
        assert prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0) == 0


def orphans(*known: int) -> list[psutil.Process]:
    """Our living descendants that are not (below) the known ones; dead ones that are ours to collect are collected."""
    left = []
    for child in psutil.Process().children():
        if child.pid in known:
            continue
        with contextlib.suppress(psutil.NoSuchProcess, ChildProcessError):
            if child.status() == psutil.STATUS_ZOMBIE:
                os.waitpid(child.pid, os.WNOHANG)
            else:
                left += [child, *child.children(recursive=True)]
    return left


def groups(state_dir: Path) -> set[str]:
    """Control groups of the service on that state directory: its own, and of sandboxes by their ids."""
    name = "gatewayd-" + hashlib.sha256(str(state_dir.resolve()).encode()).hexdigest()[:12]
    found = set()
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        tops = [Path("/sys/fs/cgroup", controller) for controller in controllers.split(",") if controller] or [
            Path("/sys/fs/cgroup")
        ]
        for folder in {parent / name for top in tops for parent in (top, top / path.lstrip("/"))}:
            with contextlib.suppress(FileNotFoundError):
                found |= {name, *(entry.name for entry in folder.iterdir() if entry.is_dir())}
    return found


def mounts(state_dir: Path) -> list[str]:
    """Mounts of this machine's own namespace that have to do with a state directory."""
    return [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if str(state_dir) in line]


def loops(state_dir: Path) -> list[str]:
    """Loop devices on files below a state directory."""
    found = []
    for device in Path("/sys/block").glob("loop*/loop/backing_file"):
        with contextlib.suppress(OSError):
            if str(state_dir) in device.read_text():
                found.append(device.parts[3])
    return found


def disks(state_dir: Path) -> set[str]:
    """Sandboxes that have a folder."""
    boxes = state_dir / "boxes"
    return {entry.name for entry in boxes.iterdir()} if boxes.is_dir() else set()


def trash(state_dir: Path) -> list[str]:
    """Disks that are half deleted."""
    folder = state_dir / "trash"
    return [entry.name for entry in folder.iterdir()] if folder.is_dir() else []


def rows(state_dir: Path) -> dict[str, str]:
    """The state file: id → status. It must be consistent."""
    with contextlib.closing(sqlite3.connect(f"file:{state_dir}/state.db?mode=ro", uri=True)) as database:
        assert database.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        return dict(database.execute("SELECT id, status FROM boxes"))


@dataclass(frozen=True)
class Footprint:
    """What a service occupies."""

    descriptors: int  # of the service itself
    processes: int  # below it
    groups: int  # control groups, one for each sandbox and one for all of them
    mounts: int  # in this machine's own namespace
    loops: int  # loop devices
    disks: int  # sandboxes with a folder
    trash: int  # disks half deleted

    def beyond(self, other: Footprint) -> dict[str, int]:
        """By how much it is larger, and in what."""
        mine, others = asdict(self), asdict(other)
        return {name: mine[name] - others[name] for name in mine if mine[name] > others[name]}


def footprint(pid: int, state_dir: Path) -> Footprint:
    """What the service with that pid occupies now."""
    process = psutil.Process(pid)
    return Footprint(
        process.num_fds(),
        len(process.children(recursive=True)),
        len(groups(state_dir)),
        len(mounts(state_dir)),
        len(loops(state_dir)),
        len(disks(state_dir)),
        len(trash(state_dir)),
    )

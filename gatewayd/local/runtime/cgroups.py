"""Control groups for sandboxes: v1 hierarchies as root, a delegated v2 subtree otherwise.

What this machine lets us enforce is found once; what it does not is said in words by `Limits.note`, never pretended. A service's
own group is there while sandboxes have groups in it: whoever removes the last of them, service or monitor, removes it too.
"""

from __future__ import annotations

import contextlib
import errno
import os
from dataclasses import dataclass
from pathlib import Path

MAX_PIDS = 4096  # processes and threads of one sandbox
_V1 = ("memory", "cpu", "pids")
_CPU_PERIOD = 100_000  # microseconds
_ATTEMPTS = 100  # to make a group whose parent others remove at the same time


@dataclass(frozen=True)
class Limits:
    """One sandbox's control groups."""

    folders: tuple[Path, ...]  # the groups to join, made and filled in
    note: str  # what was asked for and is not enforced; "" when all is


class Cgroups:
    """Makes, finds and removes the groups of one service."""

    def __init__(self, instance: str) -> None:
        self._parents: dict[str, Path] = {}  # controller → folder of our own groups there
        self._v2 = False  # one folder serves all controllers
        self._instance = f"gatewayd-{instance}"  # tells several services on one machine apart
        self._find()

    @property
    def controllers(self) -> frozenset[str]:
        """What can be limited here: of memory, cpu, pids."""
        return frozenset(self._parents)

    def _find(self) -> None:
        mine = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
        for _, names, path in mine:
            if not names:
                continue
            for controller in set(names.split(",")) & set(_V1):
                hierarchy = Path("/sys/fs/cgroup", controller)
                # at the top, so that the next start finds what a killed service left, wherever that one ran
                for parent in (hierarchy / self._instance, hierarchy / path.lstrip("/") / self._instance):
                    with contextlib.suppress(OSError):
                        parent.mkdir(exist_ok=True)
                        self._parents[controller] = parent
                        break
        self.close()  # it was a trial
        if not self._parents:
            for _, names, path in mine:
                if not names:
                    self._find_v2(Path("/sys/fs/cgroup", path.lstrip("/")))

    def _find_v2(self, own: Path) -> None:
        """Take over a delegated group: processes may only live in leaves, so the service moves into one first."""
        try:
            wanted = sorted(set((own / "cgroup.controllers").read_text().split()) & set(_V1))
            if not wanted or own == Path("/sys/fs/cgroup"):
                return
            leaf = own / "service"
            leaf.mkdir(exist_ok=True)
            for pid in (own / "cgroup.procs").read_text().split():
                (leaf / "cgroup.procs").write_text(pid)
            (own / "cgroup.subtree_control").write_text(" ".join(f"+{name}" for name in wanted))
            self._parents = dict.fromkeys(wanted, own / self._instance)
            self._v2 = True
            self._make_parent(own / self._instance)
        except OSError:
            self._parents = {}  # not delegated to us
        self.close()

    def _make_parent(self, parent: Path) -> None:
        parent.mkdir(exist_ok=True)
        if self._v2:
            (parent / "cgroup.subtree_control").write_text(" ".join(f"+{name}" for name in self._parents))

    def _make(self, folder: Path) -> None:
        """Make a sandbox's group, while monitors of others may be removing the parent that it has just become the last of."""
        for attempt in range(_ATTEMPTS):
            try:
                self._make_parent(folder.parent)
                folder.mkdir(exist_ok=True)
            except OSError as exc:
                if exc.errno not in (errno.ENOENT, errno.ENODEV) or attempt == _ATTEMPTS - 1:
                    raise
            else:
                return

    def create(self, box_id: str, vcpus: float | None, mem_bytes: int | None) -> Limits:
        """Make the groups of one sandbox.

        Raises:
            OSError: the kernel refused a value.
        """
        missing = []
        if mem_bytes is not None and "memory" not in self._parents:
            missing.append("mem_bytes")
        if vcpus is not None and "cpu" not in self._parents:
            missing.append("vcpus")
        folders = tuple(dict.fromkeys(parent / box_id for parent in self._parents.values()))
        try:
            for folder in folders:
                self._make(folder)
            self._fill(box_id, vcpus, mem_bytes)
        except OSError:
            self.remove(box_id)
            raise
        note = f"not enforced on this machine: {', '.join(missing)} (no control group may be made here)" if missing else ""
        return Limits(folders, note)

    def _fill(self, box_id: str, vcpus: float | None, mem_bytes: int | None) -> None:
        def write(controller: str, name: str, value: int | str) -> None:
            if controller in self._parents:
                (self._parents[controller] / box_id / name).write_text(str(value))

        quota = max(1000, int(vcpus * _CPU_PERIOD)) if vcpus is not None else None
        if self._v2:
            if mem_bytes is not None:
                write("memory", "memory.max", mem_bytes)
                with contextlib.suppress(OSError):  # no swap accounting
                    write("memory", "memory.swap.max", 0)
            if quota is not None:
                write("cpu", "cpu.max", f"{quota} {_CPU_PERIOD}")
        else:
            if mem_bytes is not None:
                write("memory", "memory.limit_in_bytes", mem_bytes)
                with contextlib.suppress(OSError):
                    write("memory", "memory.memsw.limit_in_bytes", mem_bytes)
            if quota is not None:
                write("cpu", "cpu.cfs_period_us", _CPU_PERIOD)
                write("cpu", "cpu.cfs_quota_us", quota)
        write("pids", "pids.max", MAX_PIDS)

    def remove(self, box_id: str) -> None:
        """Remove one sandbox's empty groups; no error when they are gone or still in use."""
        for parent in set(self._parents.values()):
            with contextlib.suppress(OSError):
                (parent / box_id).rmdir()
        self.close()

    def leftovers(self) -> set[str]:
        """Ids of sandboxes that have groups, living or not."""
        found: set[str] = set()
        for parent in set(self._parents.values()):
            with contextlib.suppress(FileNotFoundError):  # no sandbox has any there
                found |= {entry.name for entry in os.scandir(parent) if entry.is_dir()}
        return found

    def pids(self, box_id: str) -> set[int]:
        """Processes in one sandbox's groups."""
        found: set[int] = set()
        for parent in set(self._parents.values()):
            with contextlib.suppress(OSError):
                found |= {int(pid) for pid in (parent / box_id / "cgroup.procs").read_text().split()}
        return found

    def close(self) -> None:
        """Remove our own parent groups if they are empty; idempotent."""
        for parent in set(self._parents.values()):
            with contextlib.suppress(OSError):
                parent.rmdir()

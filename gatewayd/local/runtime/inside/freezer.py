"""Everything in a sandbox stopped for a moment, so that its files can be copied as they are at one point in time.

SIGSTOP to all at once (`kill(-1)` misses no process that is just being forked) works with and without control groups. Who was
stopped before stays so afterwards; children go on before their parents, so that no shell finds a job stopped.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time

from gatewayd.local.runtime.inside import accounts

_SETTLE_DEADLINE = 2.0  # seconds for the last thread to stop: one in a system call stops when it has ended
_MAX_MAPPED = 100_000  # bytes of paths in one answer


class Freezer:
    """Stops every process but this one and the sandbox's first, and lets them go on."""

    def __init__(self) -> None:
        self._stopped_before: set[int] | None = None  # pids that others had stopped; None: not frozen

    @property
    def frozen(self) -> bool:
        """Whether everything is stopped."""
        return self._stopped_before is not None

    def freeze(self) -> dict[str, object]:
        """Stop all; ``mapped`` names files that are written through memory, whose times tell nothing (mmap(2))."""
        if self._stopped_before is None:
            self._stopped_before = {pid for pid in _pids() if _states(pid) == {"T"}}
        with contextlib.suppress(ProcessLookupError):  # there is nobody
            os.kill(-1, signal.SIGSTOP)
        deadline = time.monotonic() + _SETTLE_DEADLINE
        waiting = _pids()
        while waiting := {pid for pid in waiting if _states(pid) - set("TtZX")}:
            if time.monotonic() > deadline:
                break
            time.sleep(0.001)
        mapped: set[str] = set()
        for pid in _pids():
            mapped |= _written_through_memory(pid)
        shown, size = [], 0
        for path in sorted(mapped):
            size += len(path) + 8
            if size > _MAX_MAPPED:
                break
            shown.append(path)
        return {"moving": len(waiting), "mapped": shown}

    def thaw(self) -> None:
        """Let all go on that this has stopped; idempotent."""
        before, self._stopped_before = self._stopped_before, None
        if before is None:
            return
        for pid in sorted(_pids() - before, reverse=True):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


def _pids() -> set[int]:
    """All processes but this one and pid 1."""
    return {int(name) for name in os.listdir("/proc") if name.isdigit()} - {1, os.getpid()}  # noqa: PTH208 - names only


def _states(pid: int) -> set[str]:
    """The states of a process's threads (proc(5)); empty when it is gone."""
    states = set()
    with contextlib.suppress(OSError):
        for thread in os.listdir(f"/proc/{pid}/task"):  # noqa: PTH208
            with open(f"/proc/{pid}/task/{thread}/stat", "rb") as file:  # noqa: PTH123 - pathlib is not worth its time here
                states.add(chr(file.read().rpartition(b")")[2].split()[0][0]))
    return states


def _written_through_memory(pid: int) -> set[str]:
    """Files that a process has mapped shared and writable."""
    try:
        return _mapped(pid)
    except PermissionError:  # another user's: that user may look
        with contextlib.suppress(OSError):
            owner = os.stat(f"/proc/{pid}")  # noqa: PTH116
            with accounts.as_user(accounts.Account("", owner.st_uid, owner.st_gid, [owner.st_gid], "/", "")):
                return _mapped(pid)
    except OSError:
        pass
    return set()


def _mapped(pid: int) -> set[str]:
    with open(f"/proc/{pid}/maps", encoding="utf-8", errors="surrogateescape") as file:  # noqa: PTH123
        rows = [line.rstrip("\n").split(maxsplit=5) for line in file]
    return {row[5] for row in rows if len(row) == 6 and row[1][1] == "w" and row[1][3] == "s" and row[5][0] == "/"}

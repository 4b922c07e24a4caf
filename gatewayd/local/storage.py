"""What a full disk looks like, and what is said about it."""

from __future__ import annotations

import contextlib
import errno
import os
import sqlite3
from pathlib import Path

from gatewayd.local.envelope import ServiceError

SPARE = 256 * 1024  # bytes; a disk with less has no room for a sandbox
ADVICE = "no space is left on the disk that holds the service's state: free some, or delete sandboxes, and try again"


class WriteFailure(Exception):
    """The state file cannot be written; what it held it still holds."""


def storage_full() -> ServiceError:
    """There is no room for what was asked (507, RFC 4918 section 11.5)."""
    return ServiceError(507, "StorageFull", ADVICE)


def refused(exc: WriteFailure) -> ServiceError:
    """The answer to a request that could not be recorded."""
    return storage_full() if is_full(exc) else ServiceError(503, "ServiceUnavailable", f"cannot record the change: {exc}")


def is_full(exc: BaseException | None) -> bool:
    """Whether a full disk or an exhausted quota is what an exception comes from."""
    while exc is not None:
        if isinstance(exc, OSError) and exc.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if isinstance(exc, sqlite3.Error) and getattr(exc, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL:
            return True
        exc = exc.__cause__
    return False


def has_room(folder: Path, wanted: int = SPARE) -> bool:
    """Whether the disk of a folder has so many bytes left; True when it does not say."""
    try:
        space = os.statvfs(folder)
    except OSError:
        return True
    return space.f_bavail * space.f_frsize >= wanted


class Reserve:
    """A file that is given up so that something can be deleted from a full disk: deleting writes before it frees."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / "reserve"

    def keep(self) -> None:
        """Have it, if there is room for more than it; idempotent."""
        try:
            if not self._file.exists() and has_room(self._file.parent, 2 * SPARE):
                self._file.write_bytes(os.urandom(SPARE))  # not zeroes: a file system may store nothing for them
        except OSError:
            self.give_up()  # a part of it is of no use

    def give_up(self) -> None:
        """Let the disk have it; idempotent."""
        with contextlib.suppress(OSError):
            self._file.unlink(missing_ok=True)

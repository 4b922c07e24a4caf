"""Replacing a file so that a reader, or a crash, sees the old content or the new one and nothing between."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def replace(path: Path, data: bytes, mode: int | None = None) -> None:
    """Make `data` the content of `path`: written beside it, synced, renamed over it.

    Args:
        path: not a symbolic link; resolve it first.
        mode: permission bits; None keeps those of the existing file (0600 for a new one).

    The owner of an existing file is kept where that is allowed.

    Raises:
        OSError: nothing has changed.
    """
    try:
        before = path.stat()
    except FileNotFoundError:
        before = None
    if mode is None:
        mode = before.st_mode & 0o7777 if before else 0o600
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{os.urandom(4).hex()}")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    try:
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(fd, view) :]
            if before and (before.st_uid, before.st_gid) != (os.geteuid(), os.getegid()):
                with suppress(PermissionError):
                    os.fchown(fd, before.st_uid, before.st_gid)
            os.fchmod(fd, mode)
            os.fsync(fd)
        finally:
            os.close(fd)
        temporary.replace(path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
    sync_dir(path.parent)


def sync_dir(path: Path) -> None:
    """Make a rename or removal in `path` last; file systems that cannot are left alone."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with suppress(OSError):
            os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def locked(directory: Path, deadline: float = 10.0) -> Iterator[None]:
    """Holds a lock on `directory` itself, so that no lock file stays behind.

    Raises:
        TimeoutError: somebody else holds it for more than `deadline` seconds.
    """
    import fcntl
    import time

    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    end = time.monotonic() + deadline
    try:
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > end:
                    raise TimeoutError(f"{directory} is locked by another program") from None
                time.sleep(0.02)
        yield
    finally:
        os.close(fd)

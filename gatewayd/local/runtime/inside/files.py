"""Files inside a sandbox, opened by its agent: each with the rights of the user that asks.

An operation answers its request, or raises OSError, ValueError or LookupError, which the agent turns into an answer.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from typing import NamedTuple

from gatewayd.local.runtime.inside import accounts, kernel
from gatewayd.local.runtime.inside.packets import Answer, Request

_MAX_WRITERS = 256  # files being replaced at once: each holds a descriptor
_MAX_PATH = 4096  # bytes, with the NUL: PATH_MAX


class _Writer(NamedTuple):
    """A file being replaced."""

    account: accounts.Account  # whose rights count
    folder: int  # open descriptor of the folder of both
    temporary: str  # name of the file that is being written
    name: str  # name of the file to be replaced


class Files:
    """Opens files, and replaces them when they are complete."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        self._writers: dict[str, _Writer] = {}  # handle → file being replaced
        self._serial = 0  # makes handles unique

    def open_read(self, request: Request) -> None:
        """A regular file, for reading. Raises OSError."""
        account = accounts.resolve(request["user"])
        path = _absolute(account, request["path"])
        with accounts.as_user(account):
            fd = kernel.open_plainly(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)  # never waits for a FIFO's other end
        try:
            mode = os.fstat(fd).st_mode
            if stat.S_ISDIR(mode):
                raise OSError(errno.EISDIR, "", path)
            if not stat.S_ISREG(mode):
                raise OSError(errno.EINVAL, "", path)
            if os.readlink(f"/proc/self/fd/{fd}").startswith(f"/proc/{os.getpid()}/"):  # noqa: PTH115
                raise OSError(errno.EACCES, "", path)  # the agent's own memory: not the sandbox's
            self._answer(request, {}, (fd,))
        finally:
            os.close(fd)

    def open_write(self, request: Request) -> None:
        """Open a temporary neighbour of the target; the target's mode and owner are kept when it is replaced.

        Where the path leads is decided once. From then on both names are relative to an open folder, so processes inside that
        swap folders for links meanwhile change nothing.
        """
        if len(self._writers) >= _MAX_WRITERS:
            raise OSError(errno.EMFILE, "too many files being written")
        account = accounts.resolve(request["user"])
        with accounts.as_user(account):
            path = os.path.realpath(_absolute(account, request["path"]))
            place, name = os.path.split(path)
            os.makedirs(place, exist_ok=True)  # noqa: PTH103
            folder = kernel.open_plainly(place, os.O_RDONLY | os.O_DIRECTORY)
            try:
                self._open_neighbour(request, account, folder, name)
            except BaseException:
                os.close(folder)
                raise

    def _open_neighbour(self, request: Request, account: accounts.Account, folder: int, name: str) -> None:
        try:
            old: os.stat_result | None = os.stat(name or ".", dir_fd=folder, follow_symlinks=False)
        except FileNotFoundError:
            old = None
        if old is not None and not stat.S_ISREG(old.st_mode):
            raise OSError(errno.EISDIR if stat.S_ISDIR(old.st_mode) else errno.EINVAL, "", name)
        self._serial += 1
        handle = str(self._serial)
        temporary = f".gatewayd-{os.getpid()}-{handle}"
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o644, dir_fd=folder)
        try:
            if old is not None:
                os.fchown(fd, old.st_uid, old.st_gid)
                os.fchmod(fd, stat.S_IMODE(old.st_mode))
            self._answer(request, {"handle": handle}, (fd,))
            self._writers[handle] = _Writer(account, folder, temporary, name)
        except OSError:
            os.unlink(temporary, dir_fd=folder)
            raise
        finally:
            os.close(fd)

    def commit(self, request: Request) -> None:
        """Put the new content in the old one's place. Raises OSError."""
        writer = self._writers.pop(request["handle"])
        try:
            with accounts.as_user(writer.account):
                os.rename(writer.temporary, writer.name, src_dir_fd=writer.folder, dst_dir_fd=writer.folder)
        except OSError:
            with contextlib.suppress(OSError):
                os.unlink(writer.temporary, dir_fd=writer.folder)
            raise
        finally:
            os.close(writer.folder)
        self._answer(request, {})

    def abort(self, request: Request) -> None:
        """Drop the new content."""
        writer = self._writers.pop(request["handle"])
        with contextlib.suppress(FileNotFoundError):
            os.unlink(writer.temporary, dir_fd=writer.folder)
        os.close(writer.folder)
        self._answer(request, {})


def _absolute(account: accounts.Account, path: str) -> str:
    """`path` from the account's home on. Raises OSError ENAMETOOLONG before anybody walks it."""
    whole = os.path.join(account.home, path)  # noqa: PTH118 - absolute paths stay as they are
    if len(os.fsencode(whole)) >= _MAX_PATH:
        raise OSError(errno.ENAMETOOLONG, "", whole[:100])
    return whole

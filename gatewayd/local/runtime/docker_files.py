"""Files of a container, by short scripts run as the user in question; their content is spooled in the service's own folder.

A file is read and written where the sandbox's own processes would read and write it, with the rights of the user, so links lead
nowhere but inside. The descriptor that is handed out is a nameless copy on this machine.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import tempfile
from pathlib import Path
from typing import IO

from gatewayd.local.runtime import docker_guest
from gatewayd.local.runtime.base import RuntimeFailure
from gatewayd.local.runtime.docker_exec import Execs

MAX_READ = 8 << 30  # bytes of a file that is read: a sandbox's sparse file must not fill this machine's disk
_DEADLINE = 600.0  # seconds for the content of one file
_MAX_PATH = 4096  # PATH_MAX


class DockerWriter:
    """See `base.FileWriter`."""

    def __init__(self, execs: Execs, user: str | None, file: IO[bytes], temporary: bytes, final: bytes, mode: str) -> None:
        self._execs = execs
        self._user = user
        self._file = file  # the spooled content
        self._temporary = temporary  # path inside
        self._final = final  # path inside, without links
        self._mode = mode  # octal, of the file in place
        self._open = True  # until commit or abort
        self.fd = file.fileno()

    async def commit(self) -> None:
        """Put the new content in place atomically and close. Raises OSError."""
        if not self._open:
            return
        self._open = False
        with self._file as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(0)
            paths = docker_guest.escape(self._temporary), docker_guest.escape(self._final)
            talk = await self._execs.talk(
                docker_guest.COMMIT, *paths, str(size), self._mode, user=self._user, stdin=file, deadline=_DEADLINE
            )
        talk.words("done")

    async def abort(self) -> None:
        """Drop the new content and close; idempotent."""
        if self._open:
            self._open = False
            self._file.close()
            with contextlib.suppress(OSError, RuntimeFailure):
                await self._execs.talk(docker_guest.ABORT, docker_guest.escape(self._temporary), user=self._user)


class Files:
    """Opens files in one container."""

    def __init__(self, execs: Execs, spool: Path) -> None:
        self._execs = execs
        self._spool = spool  # folder for content under way, 0700

    @staticmethod
    def _escape(path: str) -> str:
        if len(os.fsencode(path)) >= _MAX_PATH:
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG), "")
        try:
            return docker_guest.escape(path)
        except ValueError as exc:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), "") from exc

    async def open_read(self, path: str, user: str | None) -> tuple[int, os.stat_result]:
        """Open a regular file for reading; relative to the user's home. Raises OSError with errno."""
        escaped = self._escape(path)
        with tempfile.TemporaryFile(dir=self._spool, buffering=0) as file:
            size = 0

            def sink(data: bytes) -> None:
                nonlocal size
                size += len(data)
                if size > MAX_READ:
                    raise OSError(errno.EFBIG, os.strerror(errno.EFBIG), "")
                view = memoryview(data)
                while view:
                    view = view[os.write(file.fileno(), view) :]

            talk = await self._execs.talk(docker_guest.READ, escaped, user=user, sink=sink, deadline=_DEADLINE)
            info = _stat(talk.words("file"), size)
            os.lseek(file.fileno(), 0, os.SEEK_SET)
            return os.dup(file.fileno()), info

    async def open_write(self, path: str, user: str | None) -> DockerWriter:
        """Begin replacing a file, creating parent folders; relative to the user's home. Raises OSError with errno."""
        talk = await self._execs.talk(docker_guest.WRITE, self._escape(path), user=user)
        mode = talk.words("mode")
        try:
            temporary, final = (docker_guest.unescape(talk.words(name)) for name in ("temporary", "final"))
        except ValueError as exc:
            raise RuntimeFailure("the sandbox gave no file") from exc
        if not (mode.isdecimal() and mode.isascii()):
            raise RuntimeFailure("the sandbox gave no file")
        file = tempfile.TemporaryFile(dir=self._spool, buffering=0)  # noqa: SIM115 - the writer's to close
        return DockerWriter(self._execs, user, file, temporary, final, mode)


def _stat(words: str, size: int) -> os.stat_result:
    """What ``stat -c '%s %f %u %g %i %d %.9Y'`` told; the size is what really came."""
    try:
        _, mode, uid, gid, inode, device, changed = words.split(" ")
        seconds, _, fraction = changed.partition(".")
        nanoseconds = int(seconds) * 10**9 + int((fraction + "0" * 9)[:9])
        times = dict.fromkeys(("st_atime_ns", "st_mtime_ns", "st_ctime_ns"), nanoseconds)
        floats = dict.fromkeys(("st_atime", "st_mtime", "st_ctime"), nanoseconds / 1e9)
        whole = nanoseconds // 10**9
        fields = (int(mode, 16), int(inode), int(device), 1, int(uid), int(gid), size, whole, whole, whole)
        info = os.stat_result(fields, {**times, **floats})
    except (ValueError, OverflowError) as exc:
        raise RuntimeFailure("the sandbox gave no file") from exc
    if not stat.S_ISREG(info.st_mode):
        raise RuntimeFailure("the sandbox gave no file")
    return info

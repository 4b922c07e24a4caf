"""Copying a folder's tree, by descriptors: nothing that is put in a folder's place meanwhile leads the copy elsewhere.

A tree can be copied again: `update` brings an earlier copy to the present state, touching only what has changed since.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import stat
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

from gatewayd.local.runtime.inside import kernel

MAX_ENTRIES = 4_000_000
_WORKERS = max(2, min(4, os.cpu_count() or 2))  # threads that copy content: most of their time is the kernel's
_CHUNK = 32 << 20  # bytes of a large file for one of them at a time
_PIECE = 1 << 20  # bytes copied at a time
_MAX_QUEUE = 256  # copies under way: each holds two descriptors
_UNSETTLED = 50_000_000  # nanoseconds: a change so shortly before a look may be followed by one with the same time
_FICLONE = 0x40049409  # ioctl_ficlone(2)
_UPLOAD = re.compile(r"\.gatewayd-\d+-\d+\Z")  # a file that is being uploaded, under its temporary name
_OWN_XATTRS = ("user.overlay.opaque", "user.overlay.whiteout", "user.overlay.whiteouts")  # what overlayfs means in a lower layer
# what it looks like when an entry is gone, or is of another kind, since it was looked at
_SWAPPED = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.EINVAL, errno.ENXIO)
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW


_buffers = threading.local()  # each thread's own


class _Seen(NamedTuple):
    """What was copied."""

    inode: int
    changed: int  # st_ctime_ns; -1: too fresh to tell anything
    kind: int  # of file, S_IFMT


class TreeCopy:
    """A copy of the tree in one open folder, made in another that is empty at first."""

    def __init__(self, source: int, target: int) -> None:
        self._source = source
        self._target = target
        self._seen: dict[str, _Seen] = {}  # path → what the copy was made of
        self._links: dict[int, str] = {}  # inode of a file with several names → the first of them
        self._renewed: set[int] = set()  # those of them that were copied by this update
        self._folders: list[tuple[str, os.stat_result]] = []  # their attributes are set at the end
        self._can_clone = True  # until it fails once: it is a property of the file system
        self._pool = ThreadPoolExecutor(_WORKERS)
        self._queue: list[Future[int]] = []  # content being copied
        self.bytes = 0  # of content copied
        self.entries = 0

    def update(self, again: Iterable[str] = (), *, last: bool) -> None:
        """Copy what is new, changed, or named in `again` (absolute paths in the tree); remove what is gone.

        Args:
            last: nothing changes any more: folders get their times.

        Raises:
            OSError: a file cannot be read or written.
        """
        again = set(again)
        before, self._seen = self._seen, {}
        self._links, self._renewed, self._folders, self.entries = {}, set(), [], 0
        pending = [""]
        while pending:
            pending += self._folder(pending.pop(), before, again)
        while self._queue:
            self._collect()
        for path in sorted(before.keys() - self._seen.keys(), key=len, reverse=True):
            self._remove(path)
        if last:
            for path, info in sorted(self._folders, key=lambda item: item[0], reverse=True):
                fd = kernel.open_beneath(self._target, path or ".", _FOLDER)
                try:
                    os.utime(fd, ns=(info.st_atime_ns, info.st_mtime_ns))
                finally:
                    os.close(fd)

    def close(self) -> None:
        """End the threads; idempotent."""
        self._pool.shutdown(cancel_futures=True)

    def _folder(self, path: str, before: dict[str, _Seen], again: set[str]) -> list[str]:
        """Copy what is directly in a folder; returns the folders in it."""
        below = []
        try:
            source = kernel.open_beneath(self._source, path or ".", _FOLDER)
        except OSError as exc:
            if exc.errno in _SWAPPED:
                return []
            raise
        target = kernel.open_beneath(self._target, path or ".", _FOLDER)
        try:
            info = os.fstat(source)
            for stale in set(os.listxattr(target)) - set(os.listxattr(source)):  # of a folder that had this name before
                os.removexattr(target, stale)
            _attributes(source, target, info)
            self._folders.append((path, info))
            now = time.time_ns()
            with os.scandir(source) as entries:
                names = [entry.name for entry in entries]
            for name in names:
                if _UPLOAD.match(name):
                    continue
                inner = f"{path}/{name}" if path else name
                try:
                    if self._entry(source, target, path, name, now, before, again):
                        below.append(inner)
                except OSError as exc:
                    if exc.errno not in _SWAPPED:
                        raise
                    if inner in self._seen:  # whatever was made of it is not to be trusted
                        self._seen[inner] = self._seen[inner]._replace(changed=-1)
        finally:
            os.close(source)
            os.close(target)
        return below

    def _entry(
        self, source: int, target: int, folder: str, name: str, now: int, before: dict[str, _Seen], again: set[str]
    ) -> bool:
        """Copy one entry, but for a folder's content; whether it is one."""
        self.entries += 1
        if self.entries > MAX_ENTRIES:
            raise OSError(errno.EFBIG, "there are too many files")
        path = f"{folder}/{name}" if folder else name
        info = os.stat(name, dir_fd=source, follow_symlinks=False)
        kind = stat.S_IFMT(info.st_mode)
        changed = info.st_ctime_ns if info.st_ctime_ns < now - _UNSETTLED else -1
        old = before.get(path)
        self._seen[path] = _Seen(info.st_ino, changed, kind)
        if kind == stat.S_IFDIR:
            if old is None or old.kind != kind:
                if old is not None:
                    self._remove(path)
                os.mkdir(name, 0o700, dir_fd=target)
            return True
        fresh = old == self._seen[path] and changed >= 0 and f"/{path}" not in again and info.st_ino not in self._renewed
        first = self._links.setdefault(info.st_ino, path) if info.st_nlink > 1 else path
        if fresh:
            return False
        if old is not None:
            self._remove(path)
        if first != path:
            os.link(first, name, src_dir_fd=self._target, dst_dir_fd=target, follow_symlinks=False)
        else:
            self._renewed.add(info.st_ino)
            self._copy(source, target, name, info)
        return False

    def _copy(self, source: int, target: int, name: str, info: os.stat_result) -> None:
        """Make a file of any kind but a folder."""
        kind = stat.S_IFMT(info.st_mode)
        if kind == stat.S_IFREG:
            self._regular(source, target, name)
            return
        if kind == stat.S_IFLNK:
            os.symlink(os.readlink(name, dir_fd=source), name, dir_fd=target)
        elif kind == stat.S_IFCHR and info.st_rdev == 0:  # a whiteout: hides what lies below
            os.mknod(name, stat.S_IFCHR, 0, dir_fd=target)
            return
        elif kind in (stat.S_IFIFO, stat.S_IFSOCK):
            os.mknod(name, kind | 0o600, dir_fd=target)
        else:
            return  # a device: a sandbox cannot make one
        os.chown(name, info.st_uid, info.st_gid, dir_fd=target, follow_symlinks=False)
        if kind != stat.S_IFLNK:
            os.chmod(name, stat.S_IMODE(info.st_mode), dir_fd=target)
        os.utime(name, ns=(info.st_atime_ns, info.st_mtime_ns), dir_fd=target, follow_symlinks=False)

    def _regular(self, source: int, target: int, name: str) -> None:
        inward = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=source)
        outward = -1
        try:
            info = os.fstat(inward)
            if not stat.S_ISREG(info.st_mode):
                raise FileNotFoundError(errno.ENOENT, "it was replaced")
            outward = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=target)
            small = info.st_size <= 65536
            if small or self._clone(inward, outward):
                if small:
                    self.bytes += _content(inward, outward, 0, info.st_size)
                else:
                    self.bytes += info.st_blocks * 512
                _complete(inward, outward, info)
                os.close(inward)
                os.close(outward)
                return
        except BaseException:
            os.close(inward)
            if outward >= 0:
                os.close(outward)
            raise
        self._spread(inward, outward, info)

    def _spread(self, inward: int, outward: int, info: os.stat_result) -> None:
        """Copy a large file's content by several threads; the last of them completes and closes it."""
        left = 1  # parts not done, and one for the loop that makes them
        lock = threading.Lock()

        def leave() -> None:
            nonlocal left
            with lock:
                left -= 1
                done = left == 0
            if done:
                try:
                    _complete(inward, outward, info)
                finally:
                    os.close(inward)
                    os.close(outward)

        def part(start: int, end: int) -> int:
            try:
                return _content(inward, outward, start, end)
            finally:
                leave()

        try:
            for start, end in _parts(inward, info.st_size):
                while len(self._queue) >= _MAX_QUEUE:
                    self._collect()
                with lock:
                    left += 1
                self._queue.append(self._pool.submit(part, start, end))
        finally:
            leave()

    def _collect(self) -> None:
        """The oldest copy under way is waited for. Raises OSError."""
        self.bytes += self._queue.pop(0).result()

    def _clone(self, inward: int, outward: int) -> bool:
        """Share the blocks, where the file system can (XFS, btrfs)."""
        if not self._can_clone:
            return False
        try:
            fcntl.ioctl(outward, _FICLONE, inward)
        except OSError:
            self._can_clone = False
        return self._can_clone

    def _remove(self, path: str) -> None:
        """Remove from the copy, whatever it is; no error when there is nothing."""
        folder, _, name = path.rpartition("/")
        try:
            above = kernel.open_beneath(self._target, folder or ".", _FOLDER)
        except OSError as exc:
            if exc.errno in _SWAPPED:  # what it was in has been replaced as a whole
                return
            raise
        try:
            _remove_at(above, name)
        finally:
            os.close(above)


def _remove_at(folder: int, name: str) -> None:
    try:
        os.unlink(name, dir_fd=folder)
    except FileNotFoundError:
        return
    except IsADirectoryError:
        fd = os.open(name, _FOLDER, dir_fd=folder)
        try:
            for child in os.listdir(fd):  # noqa: PTH208 - a descriptor
                _remove_at(fd, child)
        finally:
            os.close(fd)
        os.rmdir(name, dir_fd=folder)


def _parts(fd: int, size: int) -> Iterator[tuple[int, int]]:
    """(start, end) of the parts of a file to copy; holes cost nothing, however large they claim to be."""
    start = 0
    while start < size:
        try:
            start = os.lseek(fd, start, os.SEEK_DATA)
        except OSError as exc:
            if exc.errno == errno.ENXIO:  # a hole to the end, or cut shorter meanwhile
                return
            raise
        end = min(start + _CHUNK, size)
        if start < end:
            yield start, end
        start = end


def _content(inward: int, outward: int, start: int, end: int) -> int:
    """Copy a range, holes left out; the bytes copied."""
    copied = 0
    while start < end:
        try:
            start = os.lseek(inward, start, os.SEEK_DATA) if end - start > 4096 else start
            stop = min(end, os.lseek(inward, start, os.SEEK_HOLE)) if end - start > 4096 else end
        except OSError as exc:
            if exc.errno == errno.ENXIO:  # a hole to the end, or cut shorter meanwhile
                break
            raise
        while start < stop:
            count = _transfer(inward, outward, start, stop - start)
            if count == 0:
                return copied
            copied += count
            start += count
    return copied


def _transfer(inward: int, outward: int, start: int, count: int) -> int:
    """Copy some bytes by way of our memory: copy_file_range(2) goes through a pipe on ext4, at a fifth of the speed."""
    if not hasattr(_buffers, "own"):
        _buffers.own = bytearray(_PIECE)
    piece = memoryview(_buffers.own)[: min(count, _PIECE)]
    got = os.preadv(inward, [piece], start)
    piece = piece[:got]
    while piece:
        written = os.pwrite(outward, piece, start)
        start += written
        piece = piece[written:]
    return got


def _complete(inward: int, outward: int, info: os.stat_result) -> None:
    """Size, attributes and times of a file whose content is there."""
    if os.fstat(outward).st_size != info.st_size:
        os.ftruncate(outward, info.st_size)
    _attributes(inward, outward, info)
    os.utime(outward, ns=(info.st_atime_ns, info.st_mtime_ns))


def _attributes(inward: int, outward: int, info: os.stat_result) -> None:
    """Owner, then mode (chown clears set-user-id), then what else there is."""
    os.fchown(outward, info.st_uid, info.st_gid)
    os.fchmod(outward, stat.S_IMODE(info.st_mode))
    names: Callable[[int], list[str]] = os.listxattr
    for name in names(inward):
        if name.startswith("user.overlay.") and not name.startswith("user.overlay.overlay.") and name not in _OWN_XATTRS:
            continue  # overlayfs's notes on an upper layer
        if name.startswith(("user.", "security.capability", "system.posix_acl_")):
            with contextlib.suppress(OSError):
                os.setxattr(outward, name, os.getxattr(inward, name))

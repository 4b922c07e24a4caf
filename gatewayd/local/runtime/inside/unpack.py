"""Unpack one image layer into a folder, with the ids and the reach of a sandbox: a process of its own.

Started with ``python -I -S unpack.py N``; the plan is one JSON object on descriptor N, the archive (tar, also gzip, bzip2 or xz)
comes on standard input, and one JSON object on standard output says how it went. The work is done by a child in a user namespace,
its root folder changed to the one being filled: whatever names and links the archive holds, they lead nowhere else.

Plan: ``{"folder": path, "lower": [path, …], "id_map": …, "max_bytes": N, "max_entries": N}``. With lower layers the folder is an
overlay's upper layer (`folder`/upper, `folder`/work) and whiteouts mean what they say (OCI image specification, layer.md);
without, the folder itself is filled.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import stat
import sys
import tarfile
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[4]))  # -I -S leaves our own packages out

from gatewayd.local.runtime.inside import idspace, kernel

_PLAN_MAX = 65536  # bytes
_CHUNK = 1 << 20  # bytes copied at a time
_MEMORY_MAX = 1 << 30  # bytes of address space: a header may claim any size
_NAME_MAX, _PATH_MAX = 255, 4096  # bytes (limits.h)
_ID_MAX = 65535  # ids mapped into a sandbox
_WHITEOUT, _OPAQUE = ".wh.", ".wh..wh..opq"
_XATTR = "SCHILY.xattr."  # PAX records with extended attributes begin so
_MOUNTPOINTS = ("/mnt", "/media", "/srv", "/opt")  # covered in a private mount namespace only


class LayerError(Exception):
    """The archive cannot be unpacked; the message is for the user."""


class Unpacker:
    """Fills the root folder of this process from one archive."""

    def __init__(self, max_bytes: int, max_entries: int) -> None:
        self._left = max_bytes  # bytes of content that may still come
        self._entries_left = max_entries
        self._made: set[str] = set()  # what this layer brought: whiteouts concern only what lies below
        self._folders: dict[str, float] = {}  # their times are set at the end
        self.bytes = 0  # of content written
        self.entries = 0
        self.skipped = 0  # device nodes: a sandbox has its own /dev

    def run(self, tar: tarfile.TarFile) -> None:
        """Raises LayerError, tarfile.TarError, OSError."""
        for member in tar:
            vars(tar)["members"].clear()  # a stream's members are never looked up again
            self._entries_left -= 1
            if self._entries_left < 0:
                raise LayerError("the layer has too many entries")
            self._entry(tar, member)
            self.entries += 1
        for path, mtime in sorted(self._folders.items(), reverse=True):
            with contextlib.suppress(OSError):  # replaced by a later entry
                os.utime(path, (mtime, mtime), follow_symlinks=False)

    def _entry(self, tar: tarfile.TarFile, member: tarfile.TarInfo) -> None:
        path = _inside(member.name)
        folder, name = os.path.split(path)
        if path == "/":
            if member.isdir():
                self._attributes("/", member)
            return
        self._parents(folder)
        if name == _OPAQUE:
            self._clear(folder)
        elif name.startswith(_WHITEOUT):
            hidden = f"{folder.rstrip('/')}/{name.removeprefix(_WHITEOUT)}"
            if name.removeprefix(_WHITEOUT) in ("", ".", ".."):
                raise LayerError(f"not a whiteout: {_shown(member.name)}")
            if hidden not in self._made:
                _remove(hidden)
        else:
            self._make(tar, member, path)

    def _make(self, tar: tarfile.TarFile, member: tarfile.TarInfo, path: str) -> None:
        if member.ischr() or member.isblk():
            self.skipped += 1
            return
        if member.isdir():
            if not _is_folder(path):
                _remove(path)
                os.mkdir(path)  # noqa: PTH102 - pathlib costs twice the time on a hundred thousand entries
            self._folders[path] = member.mtime
        else:
            _remove(path)
            if member.issym():
                os.symlink(member.linkname, path)  # noqa: PTH211
            elif member.islnk():
                os.link(_inside(member.linkname), path, follow_symlinks=False)
            elif member.isfifo():
                os.mkfifo(path)
            elif member.isreg():
                self._file(tar, member, path)
            else:
                raise LayerError(f"an entry of an unknown type: {_shown(member.name)}")
        self._made.add(path)
        if not member.islnk():
            self._attributes(path, member)

    def _file(self, tar: tarfile.TarFile, member: tarfile.TarInfo, path: str) -> None:
        source = tar.extractfile(member)
        if source is None:
            raise LayerError(f"an entry without content: {_shown(member.name)}")
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        try:
            end = 0  # of what was written: zeros are skipped, so that a sparse file stays one
            position = 0
            while data := source.read(_CHUNK):
                position += len(data)
                self._left -= len(data)  # zeros too: they cost no disk, but reading them takes as long
                if self._left < 0:
                    raise LayerError("the image is larger than it may be")
                if not data.strip(b"\0"):
                    continue
                os.lseek(fd, position - len(data), os.SEEK_SET)
                view = memoryview(data)
                while view:
                    view = view[os.write(fd, view) :]
                end = position
                self.bytes += len(data)
            if position != member.size:
                raise LayerError(f"the archive ends within {_shown(member.name)}")
            if end < position:
                os.ftruncate(fd, position)
        finally:
            os.close(fd)

    def _attributes(self, path: str, member: tarfile.TarInfo) -> None:
        """Owner, then mode (chown clears set-user-id), then what else there is."""
        if not (0 <= member.uid <= _ID_MAX and 0 <= member.gid <= _ID_MAX):
            whose = f"user {member.uid}, group {member.gid}"
            raise LayerError(f"{_shown(member.name)} belongs to {whose}: a sandbox has ids up to {_ID_MAX}")
        os.chown(path, member.uid, member.gid, follow_symlinks=False)
        if not member.issym():
            os.chmod(path, member.mode & 0o7777)  # noqa: PTH101
        for key, value in member.pax_headers.items():
            name = key.removeprefix(_XATTR)
            if name is not key and name.startswith(("user.", "security.capability")) and not name.startswith("user.overlay."):
                with contextlib.suppress(OSError):  # a file system without them
                    os.setxattr(path, name, value.encode("utf-8", "surrogateescape"), follow_symlinks=False)
        if not member.isdir():
            os.utime(path, (member.mtime, member.mtime), follow_symlinks=False)

    def _parents(self, folder: str) -> None:
        """Make what is missing above an entry; links among it are followed, within this root."""
        if _is_folder(folder, follow=True):
            return
        above = os.path.dirname(folder)  # noqa: PTH120
        if above != folder:
            self._parents(above)
        if not os.path.lexists(folder):
            os.mkdir(folder, 0o755)  # noqa: PTH102
            self._made.add(folder)
        elif not _is_folder(folder, follow=True):
            raise LayerError(f"not a folder: {_shown(folder)}")

    def _clear(self, folder: str) -> None:
        """Remove what layers below put into a folder."""
        prefix = folder.rstrip("/") + "/"
        with os.scandir(folder) as entries:
            names = [entry.name for entry in entries]
        for name in names:
            path = prefix + name
            if path not in self._made:
                _remove(path)


def _inside(name: str) -> str:
    """An absolute path in the image for an entry's name. Raises LayerError."""
    parts = [part for part in name.split("/") if part not in ("", ".")]
    path = "/" + "/".join(parts)
    if ".." in parts:
        raise LayerError(f"a name that leads out of the image: {_shown(name)}")
    if len(os.fsencode(path)) >= _PATH_MAX or any(len(os.fsencode(part)) > _NAME_MAX for part in parts) or "\0" in name:
        raise LayerError(f"a name too long for a file system: {_shown(name)}")
    return path


def _is_folder(path: str, *, follow: bool = False) -> bool:
    try:
        return stat.S_ISDIR(os.stat(path, follow_symlinks=follow).st_mode)  # noqa: PTH116
    except OSError:
        return False


def _remove(path: str) -> None:
    """Remove a file, or a folder with all it holds, without following links; no error when there is nothing."""
    if not _is_folder(path):
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            os.unlink(path)  # noqa: PTH108
        return
    for folder, folders, files in os.walk(path, topdown=False, followlinks=False):
        for name in files:
            os.unlink(f"{folder}/{name}")  # noqa: PTH108
        for name in folders:
            entry = f"{folder}/{name}"
            if _is_folder(entry):
                os.rmdir(entry)  # noqa: PTH106
            else:
                os.unlink(entry)  # noqa: PTH108
    os.rmdir(path)  # noqa: PTH106


def _shown(text: str) -> str:
    """A name from an archive, fit for a message."""
    return repr(text if len(text) <= 100 else text[:100] + "…")


def _explain(exc: BaseException) -> str:
    if isinstance(exc, LayerError | idspace.MapError):
        return str(exc)
    if isinstance(exc, OSError):
        return f"{_shown(str(exc.filename))}: {exc.strerror}" if exc.filename else (exc.strerror or "input/output error")
    if isinstance(exc, tarfile.TarError | EOFError):
        return f"not an archive, or cut short: {exc}"
    return f"cannot read the archive: {type(exc).__name__}"


def _answer(message: dict[str, Any]) -> None:
    os.write(1, json.dumps(message).encode() + b"\n")


def _enter(plan: dict[str, Any], unshared: int, mapped: int) -> None:
    """Become root of a sandbox's ids, with the folder to fill as the root folder."""
    folder, lower = plan["folder"], plan["lower"]
    privileged = plan["id_map"]["method"] == "direct"

    def mount() -> None:
        kernel.unshare(kernel.CLONE_NEWNS)
        kernel.mount("none", "/", "none", kernel.MS_REC | kernel.MS_PRIVATE)
        options = f"lowerdir={':'.join(lower)},upperdir=upper,workdir=work,userxattr"
        kernel.mount("overlay", next(path for path in _MOUNTPOINTS if _is_folder(path)), "overlay", 0, options)

    os.chdir(folder)
    if lower and privileged:  # as `boot`: root's overlay is made while the state folder can be read
        mount()
    kernel.unshare(kernel.CLONE_NEWUSER)
    os.write(unshared, b"x")
    if os.read(mapped, 1) != b"x":
        raise LayerError("its ids were not mapped")
    idspace.become_root()
    if lower and not privileged:
        mount()
    os.chroot(next(path for path in _MOUNTPOINTS if _is_folder(path)) if lower else ".")
    os.chdir("/")
    os.umask(0)
    kernel.keep_only(kernel.SANDBOX_CAPABILITIES)
    kernel.gain_no_privileges()


def _unpack(plan: dict[str, Any], unshared: int, mapped: int) -> int:
    unpacker = Unpacker(plan["max_bytes"], plan["max_entries"])
    source = sys.stdin.buffer
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_MAX, _MEMORY_MAX))
    try:
        _enter(plan, unshared, mapped)
        with tarfile.open(fileobj=source, mode="r|*", bufsize=_CHUNK, errors="surrogateescape") as tar:
            unpacker.run(tar)
        while source.read(_CHUNK):  # padding: whoever writes the archive shall not find a broken pipe
            pass
    except (LayerError, OSError, tarfile.TarError, EOFError, ValueError, MemoryError, RecursionError) as exc:
        _answer({"failed": _explain(exc), "errno": exc.errno if isinstance(exc, OSError) else None})
        return 1
    _answer({"bytes": unpacker.bytes, "entries": unpacker.entries, "skipped": unpacker.skipped})
    return 0


def main() -> int:
    """Unpack one layer; 0 when all of it is there."""
    kernel.die_with_parent(signal.SIGKILL)
    plan_fd = int(sys.argv[1])
    plan: dict[str, Any] = json.loads(os.read(plan_fd, _PLAN_MAX))
    os.close(plan_fd)
    unshared_r, unshared_w = os.pipe()
    mapped_r, mapped_w = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            kernel.die_with_parent(signal.SIGKILL)
            os.close(unshared_r)
            os.close(mapped_w)
            status = _unpack(plan, unshared_w, mapped_r)
        finally:
            os._exit(status)
    os.close(unshared_w)
    os.close(mapped_r)
    try:
        if os.read(unshared_r, 1) == b"x":
            idspace.write_maps(child, plan["id_map"])
            os.write(mapped_w, b"x")
    except (idspace.MapError, OSError) as exc:
        _answer({"failed": _explain(exc), "errno": None})
    os.close(mapped_w)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


if __name__ == "__main__":
    sys.exit(main())

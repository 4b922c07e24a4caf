"""Unpack one image layer into a folder, with the ids and the reach of a sandbox: a process of its own (`mapped`).

The archive comes on standard input, and one answer says how it went. The child's root folder is changed to the one being filled:
whatever names and links the archive holds, they lead nowhere else.

Plan: ``{"folder": path, "lower": [path, …], "id_map": …, "max_bytes": N, "max_entries": N, "digest": "", "diff_id": "",
"compression": "", "finish": null}``. With lower layers (relative to the folder) the folder is an overlay's upper layer
(`folder`/upper, `folder`/work) and whiteouts mean what they say (OCI image specification, layer.md); without, the folder itself
is filled. With a digest standard input is a file, and nothing of it is looked at before it is the one that was named.
"""

from __future__ import annotations

import contextlib
import os
import resource
import stat
import sys
import tarfile
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[4]))  # -I -S leaves our own packages out

from gatewayd.local.runtime.inside import archives, idspace, kernel, mapped
from gatewayd.local.runtime.inside.archives import LayerError

_CHUNK = 1 << 20  # bytes copied at a time
_MEMORY_MAX = 1 << 30  # bytes of address space: a header may claim any size
_NAME_MAX, _PATH_MAX = 255, 4096  # bytes (limits.h)
_ID_MAX = 65535  # ids mapped into a sandbox
_WHITEOUT, _OPAQUE = ".wh.", ".wh..wh..opq"
_XATTR = "SCHILY.xattr."  # PAX records with extended attributes begin so
_ABSURD = (ValueError, ArithmeticError, MemoryError, RecursionError)  # numbers and sizes that no file has: a time of 1e300, say
_MOUNTPOINTS = ("/mnt", "/media", "/srv", "/opt")  # covered in a private mount namespace only


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

    def finish(self, wanted: dict[str, Any]) -> None:
        """Make the root file system one that a sandbox can stand on: `folders` for what is mounted, and what programs count on.

        Args:
            wanted: ``folders`` (mode by path) must be folders themselves, not links; ``work_dir`` exists, if it is given.
        """
        for path, mode in wanted["folders"].items():
            if not _is_folder(path):
                _remove(path)
                os.mkdir(path)  # noqa: PTH102
                os.chmod(path, mode)  # noqa: PTH101
        if wanted["work_dir"]:
            self._parents(_inside(wanted["work_dir"]))
        if _is_folder("/etc") and not _has_content("/etc/hosts"):
            _remove("/etc/hosts")
            Path("/etc/hosts").write_text(wanted["hosts"])
            os.chmod("/etc/hosts", 0o644)  # noqa: PTH101

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


def _has_content(path: str) -> bool:
    try:
        info = os.stat(path, follow_symlinks=False)  # noqa: PTH116
    except OSError:
        return False
    return not stat.S_ISREG(info.st_mode) or info.st_size > 0


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


def _enter(plan: dict[str, Any], door: mapped.Door) -> None:
    """Become root of a sandbox's ids, with the folder to fill as the working folder of this process."""
    lower = plan["lower"]
    privileged = plan["id_map"]["method"] == "direct"

    def mount() -> None:
        kernel.unshare(kernel.CLONE_NEWNS)
        kernel.mount("none", "/", "none", kernel.MS_REC | kernel.MS_PRIVATE)
        options = f"lowerdir={':'.join(lower)},upperdir=upper,workdir=work,userxattr"
        kernel.mount("overlay", next(path for path in _MOUNTPOINTS if _is_folder(path)), "overlay", 0, options)

    os.chdir(plan["folder"])
    if lower and privileged:  # as `boot`: root's overlay is made while the state folder can be read
        mount()
    door.enter()
    if lower and not privileged:
        mount()


def _unpack(plan: dict[str, Any], door: mapped.Door) -> int:
    unpacker = Unpacker(plan["max_bytes"], plan["max_entries"])
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_MAX, _MEMORY_MAX))
    try:
        if plan["digest"]:
            archives.check_file(0, plan["digest"])
        _enter(plan, door)
        # what decompresses is a program of this machine's: started before the root folder changes, with the sandbox's ids
        source = archives.Source(0, plan["compression"], plan["max_bytes"] + (plan["max_entries"] << 10))
        os.chroot(next(path for path in _MOUNTPOINTS if _is_folder(path)) if plan["lower"] else ".")
        os.chdir("/")
        door.settle()
        stream: Any = source  # a stream is read and nothing else
        with tarfile.open(fileobj=stream, mode=source.mode, bufsize=_CHUNK, errors="surrogateescape") as tar:
            unpacker.run(tar)
        source.drain()  # padding: whoever writes the archive shall not find a broken pipe
        if plan["diff_id"]:
            source.check(plan["diff_id"])
        if plan["finish"] is not None:
            unpacker.finish(plan["finish"])
    except (LayerError, idspace.MapError, OSError, tarfile.TarError, EOFError, *_ABSURD) as exc:
        mapped.answer({"failed": _explain(exc), "errno": exc.errno if isinstance(exc, OSError) else None})
        return 1
    mapped.answer({"bytes": unpacker.bytes, "entries": unpacker.entries, "skipped": unpacker.skipped})
    return 0


if __name__ == "__main__":
    sys.exit(mapped.main(sys.argv[1], _unpack))

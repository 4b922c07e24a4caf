"""Layers made from archives: folders of files that lie, read-only, under sandboxes' writable ones."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import IO, Any

from gatewayd.local.runtime.base import Finish, LayerSource, RuntimeFailure
from gatewayd.local.runtime.helpers import helper, report_of
from gatewayd.local.runtime.idmap import IdMap

log = logging.getLogger(__name__)

ARCHIVE_PREFIX = "tar-"  # names of layers that are whole root file systems of their own
MAX_BYTES = 64 << 30  # of content in one layer
MAX_ENTRIES = 4_000_000
_MOUNTED = {"/dev": 0o755, "/proc": 0o555, "/run": 0o755, "/tmp": 0o1777}  # noqa: S108 - every sandbox has something mounted on them
_HOSTS = "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n"  # what Docker would mount as /etc/hosts
_DEADLINE = 1800.0  # seconds for one layer


async def unpack(
    archive: IO[bytes],
    folder: Path,
    ids: IdMap,
    *,
    lower: Sequence[str] = (),
    max_bytes: int = MAX_BYTES,
    source: LayerSource | None = None,
    finish: Finish | None = None,
) -> dict[str, Any]:
    """Unpack one archive (tar, perhaps compressed) into `folder`, as the users of a sandbox.

    Args:
        archive: open file, or pipe, at the archive's beginning.
        folder: owned by the sandbox's root; with `lower`, it has the folders upper and work.
        lower: layers below, topmost first, as paths from `folder`.
        max_bytes: content that is too much.
        source: what the archive must be; None: whatever it is.
        finish: what the root file system must have afterwards.

    Returns:
        ``bytes`` and ``entries`` unpacked, ``skipped`` device nodes.

    Raises:
        RuntimeFailure: the archive is not one, holds what it must not, or the disk is full; `folder` is left half filled.
    """
    plan = {
        "folder": str(folder),
        "lower": list(lower),
        "id_map": ids.plan(),
        "max_bytes": max_bytes,
        "max_entries": MAX_ENTRIES,
        "digest": source.digest if source else "",
        "diff_id": source.diff_id if source else "",
        "compression": source.compression if source else "",
        "finish": finish and {"folders": _MOUNTED, "work_dir": finish.work_dir, "hosts": _HOSTS},
    }
    try:
        async with asyncio.timeout(_DEADLINE), helper("unpack.py", plan, archive) as process:
            return await report_of(process, "unpack the image")
    except TimeoutError:
        raise RuntimeFailure(f"cannot unpack the image: not done within {_DEADLINE:.0f} s") from None


async def ensure_archive(bases: Path, archive: Path, ids: IdMap, delete: Callable[[Path], Awaitable[None]]) -> str:
    """Make the layer for a root file system's archive if it is not there yet; returns its folder's name under `bases`.

    Args:
        delete: removes a folder with files of all of a sandbox's users.

    Raises:
        RuntimeFailure: the archive cannot be read or unpacked; nothing is left behind.
    """
    what = f"cannot use {archive.name} as a root file system"
    try:
        info = archive.stat()
        identity = f"{info.st_dev} {info.st_ino} {info.st_size} {info.st_mtime_ns}"
        name = ARCHIVE_PREFIX + hashlib.sha256(identity.encode()).hexdigest()[:16]
        if (bases / name).is_dir():
            return name
        bases.mkdir(mode=0o700, parents=True, exist_ok=True)
        draft = bases / f".{name}"
        if draft.exists():  # of a service that was killed
            await delete(draft)
        draft.mkdir()
        draft.chmod(0o755)
        os.chown(draft, ids.root_uid, ids.root_gid)
        try:
            with archive.open("rb") as file:
                report = await unpack(file, draft, ids)
            if missing := [entry for entry in _MOUNTED if not (draft / entry[1:]).is_dir()]:
                raise RuntimeFailure(f"{what}: it has no folder {missing[0]}")
            draft.rename(bases / name)
        except BaseException:
            await delete(draft)
            raise
    except OSError as exc:
        raise RuntimeFailure(f"{what}: {exc.strerror}") from exc
    log.info("unpacked %s: %d entries, %d bytes", archive.name, report["entries"], report["bytes"])
    return name

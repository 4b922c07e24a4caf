"""Layers made from archives: folders of files that lie, read-only, under sandboxes' writable ones."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import os
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import IO, Any

from gatewayd.local.runtime.base import RuntimeFailure
from gatewayd.local.runtime.idmap import IdMap

log = logging.getLogger(__name__)

ARCHIVE_PREFIX = "tar-"  # names of layers that are whole root file systems of their own
MAX_BYTES = 64 << 30  # of content in one layer
MAX_ENTRIES = 4_000_000
_MOUNTED = ("dev", "proc", "run", "tmp")  # folders that every sandbox has something mounted on
_DEADLINE = 1800.0  # seconds for one layer
_UNPACKER = Path(__file__).parent / "inside" / "unpack.py"


async def unpack(archive: IO[bytes], folder: Path, ids: IdMap, *, lower: list[str] | None = None) -> dict[str, Any]:
    """Unpack one archive (tar, perhaps compressed) into `folder`, as the users of a sandbox.

    Args:
        archive: open file, or pipe, at the archive's beginning.
        folder: owned by the sandbox's root; with `lower`, it has the folders upper and work.
        lower: layers below, topmost first, as absolute paths.

    Returns:
        ``bytes`` and ``entries`` unpacked, ``skipped`` device nodes.

    Raises:
        RuntimeFailure: the archive is not one, holds what it must not, or the disk is full; `folder` is left half filled.
    """
    plan = {
        "folder": str(folder),
        "lower": lower or [],
        "id_map": ids.plan(),
        "max_bytes": MAX_BYTES,
        "max_entries": MAX_ENTRIES,
    }
    plan_fd = os.memfd_create("plan")
    os.write(plan_fd, json.dumps(plan).encode())
    os.lseek(plan_fd, 0, os.SEEK_SET)
    try:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-I",
            "-S",
            str(_UNPACKER),
            str(plan_fd),
            stdin=archive,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            pass_fds=[plan_fd],
        )
    finally:
        os.close(plan_fd)
    try:
        async with asyncio.timeout(_DEADLINE):
            answer, _ = await process.communicate()
    except TimeoutError:
        raise RuntimeFailure(f"cannot unpack the image: not done within {_DEADLINE:.0f} s") from None
    finally:
        if process.returncode is None:  # cancelled, or too late
            process.kill()
            await process.wait()
    try:
        report: dict[str, Any] = json.loads(answer)
    except ValueError:
        raise RuntimeFailure("cannot unpack the image: its unpacker died") from None
    if "failed" in report:
        raise RuntimeFailure(f"cannot unpack the image: {report['failed']}")
    return report


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
            if missing := [entry for entry in _MOUNTED if not (draft / entry).is_dir()]:
                raise RuntimeFailure(f"{what}: it has no folder /{missing[0]}")
            draft.rename(bases / name)
        except BaseException:
            await delete(draft)
            raise
    except OSError as exc:
        raise RuntimeFailure(f"{what}: {exc.strerror}") from exc
    log.info("unpacked %s: %d entries, %d bytes", archive.name, report["entries"], report["bytes"])
    return name

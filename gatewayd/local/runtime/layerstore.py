"""The native runtime's layers on disk: made from images, captured from sandboxes, shared, and removed when nobody needs them.

A layer's name is its path below the state folder, ``layers/ID`` (or ``bases/HASH``, made elsewhere). While one is made it is
a folder whose name begins with a dot, with the folders upper and work.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import secrets
import tarfile
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import IO

from gatewayd.local.runtime import layers
from gatewayd.local.runtime.base import Box, Captured, Finish, LayerSource, RuntimeFailure, box_dir
from gatewayd.local.runtime.helpers import helper, report_of
from gatewayd.local.runtime.idmap import IdMap
from gatewayd.local.runtime.inside import loopdisk
from gatewayd.local.runtime.nativebox import NativeBox

log = logging.getLogger(__name__)

FOLDER = "layers"
BASES = "bases"  # where `rootfs` and `layers.ensure_archive` make theirs
MARKER = "base"  # file in a box's folder: the names of its layers, topmost first
MAX_LAYERS = 100  # under one sandbox: the names of all of them are one mount option, which is a page at most (mount(2))
_ON_USR = "u"  # ids of merged layers that belong on this machine's /usr begin so; all others are hexadecimal
_CAPTURE_DEADLINE = 1800.0  # seconds
_STILL_DEADLINE = 60.0  # seconds that a sandbox may stand still


class LayerStore:
    """See `base.Layers`."""

    def __init__(self, state_dir: Path, ids: IdMap, delete: Callable[[Path], Awaitable[None]]) -> None:
        """`delete` removes a folder with files of all of a sandbox's users."""
        self._state_dir = state_dir
        self._folder = state_dir / FOLDER
        self._ids = ids
        self._delete = delete
        self._at_work: set[str] = set()  # folders that are being made: not garbage

    def has(self, name: str) -> bool:
        """Whether there is such a layer."""
        return (self._state_dir / name).is_dir()

    def stack_of(self, box_id: str) -> tuple[str, ...]:
        """The layers under a box, topmost first; empty for one without a disk."""
        try:
            lines = (box_dir(self._state_dir, box_id) / MARKER).read_text().split()
        except FileNotFoundError:
            return ()
        return tuple(line if "/" in line else f"{BASES}/{line}" for line in lines)

    async def unpack(
        self,
        name: str,
        sources: Sequence[LayerSource],
        below: Sequence[str],
        *,
        max_bytes: int,
        finish: Finish | None = None,
        on_done: Callable[[int], None] = lambda done: None,
    ) -> int:
        """Make a layer from parts of an image, lowest first. See `base.Layers`. Raises RuntimeFailure."""
        size = 0
        draft = _Draft(self, name)
        async with draft:
            for number, source in enumerate(sources, 1):
                try:
                    archive = source.path.open("rb")
                except OSError as exc:
                    raise RuntimeFailure(f"cannot unpack the image: a layer cannot be read: {exc.strerror}") from exc
                with archive:
                    report = await layers.unpack(
                        archive,
                        draft.path if below else draft.upper,
                        self._ids,
                        lower=[f"../../{layer}" for layer in below],
                        max_bytes=max_bytes - size,
                        source=source,
                    )
                size += report["bytes"]
                on_done(number)
            if finish is not None:
                with _nothing() as nothing:
                    lower = [f"../../{layer}" for layer in below]
                    await layers.unpack(nothing, draft.path if below else draft.upper, self._ids, lower=lower, finish=finish)
            await draft.keep()
        return size

    async def capture(self, box_id: str, box: Box | None) -> Captured:
        """Make a layer of what a box has written. See `base.Layers`. Raises RuntimeFailure."""
        below = self.stack_of(box_id)
        if not below:
            raise RuntimeFailure("cannot capture the sandbox: it has never been started")
        name = f"{FOLDER}/{secrets.token_hex(8)}"
        async with _Draft(self, name) as draft:
            size = await self._copy_of(box_id, box, draft)
            await draft.keep()
        if len(below) < MAX_LAYERS:
            return Captured((name, *below), name, size)
        whole = f"{FOLDER}/{_ON_USR if on_host_usr(below) else ''}{secrets.token_hex(8)}"
        async with _Draft(self, whole) as draft:
            plan = {"source": "", "image": None, "merge": [f"../../../{layer}" for layer in (name, *below)], "live": False}
            size = await self._copy(plan, None, draft)
            await draft.keep()
        await self._delete(self._state_dir / name)
        return Captured((whole,), whole, size)

    async def _copy_of(self, box_id: str, box: Box | None, draft: _Draft) -> int:
        folder = box_dir(self._state_dir, box_id).absolute()
        sized = (folder / loopdisk.IMAGE).exists()
        running = box if isinstance(box, NativeBox) else None
        source = folder / loopdisk.MOUNTPOINT / "upper" if sized else folder / "upper"
        if sized and running is not None:  # mounted where only its own processes see it
            source = Path(f"/proc/{running.outer_pid}/root") / source.relative_to("/")
        image = str(folder) if sized and running is None else None
        return await self._copy({"source": str(source), "image": image, "merge": [], "live": running is not None}, running, draft)

    async def _copy(self, plan: Mapping[str, object], running: NativeBox | None, draft: _Draft) -> int:
        what = "capture the sandbox"
        plan = {**plan, "target": str(draft.upper), "id_map": self._ids.plan()}
        try:
            async with asyncio.timeout(_CAPTURE_DEADLINE), helper("capture.py", plan, asyncio.subprocess.PIPE) as process:
                report = await report_of(process, what)
                if running is not None:
                    async with asyncio.timeout(_STILL_DEADLINE), running.standing_still() as mapped:
                        if process.stdin is not None:
                            process.stdin.write(json.dumps({"again": mapped}).encode() + b"\n")
                        report = await report_of(process, what)
        except TimeoutError:
            raise RuntimeFailure(f"cannot {what}: it takes too long") from None
        except OSError as exc:
            raise RuntimeFailure(f"cannot {what}: {exc.strerror or exc}") from exc
        return int(report["bytes"])

    async def keep_only(self, names: Collection[str]) -> None:
        """Remove all other layers, and what was half made; boxes' own layers stay."""
        if not self._folder.is_dir():
            return
        wanted = set(names)
        boxes = self._state_dir / "boxes"
        for box in boxes.iterdir() if boxes.is_dir() else ():
            wanted.update(self.stack_of(box.name))
        for entry in list(self._folder.iterdir()):
            if f"{FOLDER}/{entry.name}" not in wanted and entry.name not in self._at_work:
                await self._delete(entry)


class _Draft:
    """A layer being made: in place after `keep`, gone after the block without it."""

    def __init__(self, store: LayerStore, name: str) -> None:
        self._store = store
        self._final = store._state_dir / name
        self.path = self._final.with_name(f".{self._final.name}.{secrets.token_hex(2)}")  # holds upper and work
        self.upper = self.path / "upper"  # its files

    async def __aenter__(self) -> _Draft:
        ids = self._store._ids
        self._store._at_work |= {self.path.name, self._final.name}
        try:
            self.path.parent.mkdir(mode=0o700, exist_ok=True)
            for folder, mode in ((self.path, 0o711), (self.upper, 0o755), (self.path / "work", 0o755)):
                folder.mkdir()
                folder.chmod(mode)
                os.chown(folder, ids.root_uid, ids.root_gid)
        except OSError as exc:
            await self.__aexit__()
            raise RuntimeFailure(f"cannot make a layer: {exc.strerror}") from exc
        return self

    async def keep(self) -> None:
        """It is complete."""
        try:
            self.upper.rename(self._final)
        except OSError as exc:
            raise RuntimeFailure(f"cannot make a layer: {exc.strerror}") from exc

    async def __aexit__(self, *_: object) -> None:
        try:
            if self.path.exists():
                await asyncio.shield(self._store._delete(self.path))
        finally:
            self._store._at_work -= {self.path.name, self._final.name}


def _nothing() -> IO[bytes]:
    """An archive without entries."""
    file = os.fdopen(os.memfd_create("nothing"), "w+b")
    file.write(bytes(tarfile.RECORDSIZE))
    file.seek(0)
    return file


def on_host_usr(stack: Sequence[str]) -> bool:
    """Whether a stack of layers is completed by this machine's /usr."""
    own = [name for name in stack if name.startswith(f"{BASES}/") and not name.startswith(f"{BASES}/{layers.ARCHIVE_PREFIX}")]
    return bool(own) or any(name.startswith(f"{FOLDER}/{_ON_USR}") for name in stack)

"""From an image's reference to layers: fetched into a private folder, verified, unpacked one upon the other.

A layer's name comes from what it is together with all below it, so images that begin alike share what they have in common.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

from gatewayd.local import oci
from gatewayd.local.oci import ImageError
from gatewayd.local.references import Reference
from gatewayd.local.runtime.base import Finish, Layers, LayerSource
from gatewayd.local.skopeo import Access, Bounds, Skopeo
from gatewayd.local.storage import ADVICE

log = logging.getLogger(__name__)

MAX_STACK = 60  # layers of an image; of more, the lowest are merged, so that there is room for what is captured later
SLACK = 16 << 20  # bytes that may come beyond what a manifest says: the manifest itself, unfinished parts
MAX_IMAGE = 64 << 30  # bytes of content, whatever the disk has
KEEP_FREE = 256 << 20  # bytes of this machine's disk that no image may take; of a small one, a twentieth


@dataclass
class Progress:
    """How far a build is."""

    phase: str = "waiting"  # pulling, unpacking
    bytes: int = 0  # that have come
    total_bytes: int | None = None  # None: not known
    layers: int = 0  # unpacked, or already there
    total_layers: int | None = None

    def view(self) -> dict[str, Any]:
        """As answered."""
        return dict(vars(self))

    def text(self) -> str:
        """For people."""
        if self.phase == "unpacking":
            return f"unpacking: {self.layers} of {self.total_layers} layers"
        whole = f" of {self.total_bytes}" if self.total_bytes is not None else ""
        return f"pulling: {self.bytes}{whole} bytes" if self.phase == "pulling" else self.phase


@dataclass
class Built:
    """What a build has made."""

    digest: str = ""  # of the manifest, as the registry names it
    layers: tuple[str, ...] = ()  # topmost first
    sizes: dict[str, int] = field(default_factory=dict)  # bytes of content of each of them
    config: oci.Config | None = None  # set when it is complete


class Builder:
    """Makes layers of images."""

    def __init__(self, folder: Path, layers: Layers, environ: Mapping[str, str]) -> None:
        """`folder` is for what is under way; `environ` names the way out (`skopeo.PASSED_ON`)."""
        self._folder = folder
        self._layers = layers
        self._environ = environ
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()  # of layers that are being made, by name

    def clean(self) -> None:
        """Remove what a killed service left."""
        shutil.rmtree(self._folder, ignore_errors=True)

    async def build(
        self,
        key: str,
        reference: Reference,
        access: Access,
        *,
        capacity: int,
        work_dir: str,
        known: Callable[[str], int | None],
        progress: Progress,
        built: Built,
    ) -> None:
        """Fetch and unpack an image.

        Args:
            key: of the build; names its folder.
            capacity: bytes of content at most; 0: as this machine's disk allows.
            work_dir: a folder that must exist; "": the image's own.
            known: the size of a layer that is already there.
            built: filled in as layers are made, so that nobody takes them for garbage.

        Raises:
            ImageError: the image cannot be had, or makes no sense.
            RuntimeFailure: a layer cannot be unpacked.
            OSError: this machine's disk.
        """
        folder = self._folder / key
        folder.mkdir(mode=0o700, parents=True)
        try:
            skopeo = Skopeo(folder, reference, access, self._environ)
            progress.phase = "pulling"
            limit = min(capacity or MAX_IMAGE, self._room())
            bounds = Bounds(2 * (limit + SLACK), self._room)  # an archive is unpacked, then copied
            manifest = await self._look(skopeo, reference, bounds, built)
            if manifest is not None:
                progress.total_bytes, progress.total_layers = manifest.size, len(manifest.layers)
                if manifest.size > self._room():
                    raise ImageError(ADVICE)
                if manifest.size > limit:
                    raise ImageError(f"it has {manifest.size} bytes packed, and {limit} may be in it")

            def on_bytes(count: int) -> None:
                progress.bytes = count if manifest is None else min(count, manifest.size)

            layout = folder / "oci"
            pulled = (manifest.size if manifest is not None else limit) + SLACK
            await skopeo.copy("" if reference.local else built.digest, layout, on_bytes, pulled, bounds)
            image, config = await asyncio.to_thread(_read, layout)
            progress.phase, progress.total_layers = "unpacking", len(image.layers)
            limit = min(capacity or MAX_IMAGE, self._room())
            await self._stack(layout, image, config, work_dir, limit, known, progress, built)
            built.config = config
        finally:
            await asyncio.shield(asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True))

    async def _look(self, skopeo: Skopeo, reference: Reference, bounds: Bounds, built: Built) -> oci.Manifest | None:
        """The image's digest, and its manifest if it says anything about sizes."""
        content = await skopeo.manifest(bounds)
        if not reference.local:
            built.digest = oci.digest_of(content)
            if reference.digest and built.digest != reference.digest:
                raise ImageError("what came is not what its digest says")
            if (instance := oci.platform_digest(content)) is not None:
                content = await skopeo.manifest(bounds, instance)
                if oci.digest_of(content) != instance:
                    raise ImageError("what came is not what its digest says")
        try:
            return oci.manifest(content)
        except ImageError:
            if reference.local:
                return None  # an archive of several, say: skopeo knows better
            raise

    def _room(self) -> int:
        disk = shutil.disk_usage(self._folder)
        return max(0, disk.free - min(KEEP_FREE, disk.total // 20))

    async def _stack(
        self,
        layout: Path,
        image: oci.Manifest,
        config: oci.Config,
        work_dir: str,
        limit: int,
        known: Callable[[str], int | None],
        progress: Progress,
        built: Built,
    ) -> None:
        """Unpack what is not there yet."""
        blobs = layout / "blobs"
        pairs = zip(image.layers, config.diff_ids, strict=True)
        sources = [LayerSource(blobs / blob.file, blob.digest, diff_id, blob.compression) for blob, diff_id in pairs]
        chain = oci.chain_ids(config.diff_ids)
        lowest = max(1, len(sources) - MAX_STACK + 1) if sources else 0  # how many make the lowest layer
        groups = [(sources[:lowest], f"merged {lowest} {chain[lowest - 1]}" if lowest > 1 else chain[0])] if sources else []
        groups += [([source], chain[number]) for number, source in enumerate(sources) if number >= lowest]
        finish = Finish(work_dir or config.run_config.get("work_dir", ""))
        groups.append(([], f"finish {chain[-1] if chain else ''} {finish.work_dir}"))
        before = 0
        for group, identity in groups:
            name = f"layers/{hashlib.sha256(identity.encode()).hexdigest()[:16]}"
            lock = self._locks.setdefault(name, asyncio.Lock())
            async with lock:
                built.layers = (name, *built.layers)  # before it is made: from then on it is wanted
                size = known(name) if self._layers.has(name) else None
                if size is None:

                    def on_done(count: int, before: int = before) -> None:
                        progress.layers = before + count

                    left = limit - sum(built.sizes.values())
                    size = await self._layers.unpack(
                        name, group, built.layers[1:], max_bytes=left, finish=None if group else finish, on_done=on_done
                    )
                built.sizes[name] = size
            if sum(built.sizes.values()) > limit:
                raise ImageError(f"the image holds more than {limit} bytes")
            before += len(group)
            progress.layers = before


def _read(layout: Path) -> tuple[oci.Manifest, oci.Config]:
    """The manifest and configuration in a layout, verified. Raises ImageError, OSError."""

    def blob(wanted: oci.Blob, what: str) -> bytes:
        path = layout / "blobs" / wanted.file
        if not path.is_file() or path.stat().st_size > oci.MAX_JSON:
            raise ImageError(f"its {what} is missing, or too large")
        content = path.read_bytes()
        if oci.digest_of(content) != wanted.digest:
            raise ImageError(f"its {what} is not what its digest says")
        return content

    image = oci.manifest(blob(oci.layout_manifest((layout / "index.json").read_bytes()), "manifest"))
    config = oci.config(blob(image.config, "configuration"))
    if len(config.diff_ids) != len(image.layers):
        raise ImageError(f"it has {len(image.layers)} layers, and its configuration names {len(config.diff_ids)}")
    return image, config

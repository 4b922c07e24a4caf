"""The default snapshot as a Docker image: imported from the allow-list of `rootfs`, so nothing is downloaded.

/usr is bound read-only from this machine into each container; the daemon must therefore be this machine's.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import tarfile
import tempfile
from pathlib import Path

from gatewayd.local.runtime import rootfs
from gatewayd.local.runtime.base import RuntimeFailure
from gatewayd.local.runtime.docker_api import DockerApi, DockerError, part

_IMPORT_DEADLINE = 120.0  # seconds for an image of a few megabytes


class Images:
    """Default images of one service."""

    def __init__(self, api: DockerApi, folder: Path, repository: str, label: tuple[str, str]) -> None:
        self._api = api
        self._folder = folder  # for the layer and its archive
        self._repository = repository  # all of ours are tags of it
        self._label = label  # name and value that mark them as ours
        self._lock = asyncio.Lock()  # one import at a time

    async def ensure(self) -> str:
        """Make the image for this machine's present state if it is not there yet; returns its reference.

        Raises:
            RuntimeFailure: it cannot be made.
        """
        async with self._lock:
            bases = self._folder / "bases"
            try:
                name = await asyncio.to_thread(self._layer, bases)
                reference = f"{self._repository}:{name}"
                if not await self._exists(reference):
                    with await asyncio.to_thread(self._archive, bases / name) as archive:
                        query = {
                            "fromSrc": "-",
                            "repo": self._repository,
                            "tag": name,
                            "changes": "LABEL " + "=".join(self._label),
                        }
                        await self._api.request(
                            "import the default snapshot",
                            "POST",
                            "/images/create",
                            query=query,
                            upload=archive,
                            deadline=_IMPORT_DEADLINE,
                        )
                    await self._remove_others(reference)
            except OSError as exc:
                raise RuntimeFailure(f"cannot make the default snapshot: {exc.strerror}") from exc
            return reference

    @staticmethod
    def _layer(bases: Path) -> str:
        bases.mkdir(mode=0o700, parents=True, exist_ok=True)
        return rootfs.ensure_base(bases, os.getuid(), os.getgid())

    async def _exists(self, reference: str) -> bool:
        try:
            await self._api.request("find the default snapshot", "GET", f"/images/{part(reference)}/json")
        except DockerError as exc:
            if exc.status == 404:
                return False
            raise
        return True

    def _archive(self, folder: Path) -> tempfile._TemporaryFileWrapper[bytes]:
        """The layer as a tar file, everything root's."""

        def owned_by_root(info: tarfile.TarInfo) -> tarfile.TarInfo:
            info.uid = info.gid = 0
            info.uname = info.gname = "root"
            return info

        archive = tempfile.NamedTemporaryFile(dir=self._folder)  # noqa: SIM115 - the caller closes it
        with tarfile.open(fileobj=archive, mode="w") as tar:
            for entry in sorted(folder.iterdir()):
                tar.add(entry, arcname=entry.name, filter=owned_by_root)
        return archive

    async def _remove_others(self, reference: str) -> None:
        """Remove older default images that no container uses."""
        for old in await self._mine():
            if old != reference:
                with contextlib.suppress(DockerError):  # 409: in use
                    await self._api.request("remove an old snapshot", "DELETE", f"/images/{part(old)}")

    async def _mine(self) -> list[str]:
        query = {"filters": json.dumps({"label": ["=".join(self._label)]})}
        found = await self._api.request("list snapshots", "GET", "/images/json", query=query)
        images = [image for image in found or [] if isinstance(image, dict)] if isinstance(found, list) else []
        tags = [tag for image in images for tag in image.get("RepoTags") or []]
        return [tag for tag in tags if isinstance(tag, str) and tag.startswith(self._repository + ":")]

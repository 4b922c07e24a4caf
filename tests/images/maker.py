"""Images made by hand: layers as tar files, put together as the OCI image specification says, right or deliberately wrong."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import shutil
import subprocess
import tarfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gatewayd.local.oci import architecture

PASSED = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
APPLETS = ("sh", "ls", "cat", "echo", "mkdir", "rm", "ln", "stat", "id", "env", "pwd", "sleep", "head", "wc", "find", "grep")


class Layer:
    """A tar file being made, entry by entry."""

    def __init__(self) -> None:
        self._file = io.BytesIO()
        self._tar = tarfile.open(fileobj=self._file, mode="w", format=tarfile.PAX_FORMAT)  # noqa: SIM115 - closed by content

    def add(self, name: str, content: bytes = b"", kind: bytes = tarfile.REGTYPE, **fields: Any) -> Layer:
        info = tarfile.TarInfo(name)
        info.type, info.size, info.mode = kind, len(content), 0o755 if kind == tarfile.DIRTYPE else 0o644
        for name_of, value in fields.items():
            setattr(info, name_of, value)
        self._tar.addfile(info, io.BytesIO(content))
        return self

    def folder(self, *names: str) -> Layer:
        for name in names:
            self.add(name, kind=tarfile.DIRTYPE)
        return self

    def content(self) -> bytes:
        self._tar.close()
        return self._file.getvalue()


def busybox() -> Layer:
    """A root file system of one static program."""
    layer = Layer().folder("bin", "etc", "home", "root", "home/app")
    layer.add("bin/busybox", Path(shutil.which("busybox") or "/bin/busybox").read_bytes(), mode=0o755)
    for applet in APPLETS:
        layer.add(f"bin/{applet}", kind=tarfile.SYMTYPE, linkname="busybox")
    layer.add("etc/passwd", b"root:x:0:0:root:/root:/bin/sh\napp:x:1000:1000::/home/app:/bin/sh\n")
    layer.add("etc/group", b"root:x:0:\napp:x:1000:\n")
    return layer


def digest_of(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


@dataclass
class Image:
    """What an image is made of."""

    layers: list[bytes]  # tar files, lowest first
    config: dict[str, Any] = field(default_factory=dict)  # Env, User, WorkingDir, …
    compression: str = "gzip"  # or "zstd", "none"
    machine: str = field(default_factory=architecture)
    spoil: dict[str, Any] = field(default_factory=dict)  # what is deliberately wrong

    def layout(self, folder: Path) -> Path:
        """Write it as an OCI layout."""
        blobs = folder / "blobs" / "sha256"
        blobs.mkdir(parents=True)

        def keep(data: bytes) -> str:
            digest = digest_of(data)
            (blobs / digest.removeprefix("sha256:")).write_bytes(data)
            return digest

        packed = [_pack(layer, self.compression) for layer in self.layers]
        diff_ids = self.spoil.get("diff_ids", [digest_of(layer) for layer in self.layers])
        config = json.dumps(
            {
                "architecture": self.machine,
                "os": "linux",
                "config": self.config,
                "rootfs": {"type": "layers", "diff_ids": diff_ids},
            }
        ).encode()
        ending = {"gzip": "+gzip", "zstd": "+zstd", "none": ""}[self.compression]
        manifest = json.dumps(
            {
                "schemaVersion": 2,
                "mediaType": "application/vnd.oci.image.manifest.v1+json",
                "config": {
                    "mediaType": "application/vnd.oci.image.config.v1+json",
                    "digest": keep(config),
                    "size": len(config),
                },
                "layers": [
                    {"mediaType": f"application/vnd.oci.image.layer.v1.tar{ending}", "digest": keep(data), "size": len(data)}
                    for data in packed
                ],
            }
        ).encode()
        for data in packed:
            if "cut" in self.spoil:
                (blobs / digest_of(data).removeprefix("sha256:")).write_bytes(data[: self.spoil["cut"]])
            if "flip" in self.spoil:
                (blobs / digest_of(data).removeprefix("sha256:")).write_bytes(bytes([*data[:-1], data[-1] ^ 1]))
        entry = {
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "digest": keep(manifest),
            "size": len(manifest),
            "annotations": {"org.opencontainers.image.ref.name": "image"},
        }
        (folder / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [entry]}))
        (folder / "oci-layout").write_text('{"imageLayoutVersion":"1.0.0"}')
        return folder

    def archive(self, path: Path) -> Path:
        """Write it as an `oci-archive`."""
        layout = self.layout(path.with_suffix(".layout"))
        with tarfile.open(path, "w") as tar:
            for entry in sorted(layout.iterdir()):
                tar.add(entry, entry.name)
        shutil.rmtree(layout)
        return path


def _pack(data: bytes, compression: str) -> bytes:
    if compression == "gzip":
        return gzip.compress(data, 1, mtime=0)
    if compression == "zstd":
        return subprocess.run(["zstd", "-q", "-c", "-1"], input=data, stdout=subprocess.PIPE, check=True).stdout
    return data


def skopeo(*words: str) -> None:
    """skopeo as somebody else runs it."""
    subprocess.run(["skopeo", "--insecure-policy", *words], env=PASSED, check=True, capture_output=True, timeout=120)

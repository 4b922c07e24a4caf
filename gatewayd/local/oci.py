"""What an image says about itself: manifests, indexes and configurations, all of them from strangers. Pure.

OCI image specification: manifest.md, image-index.md, config.md, image-layout.md; and Docker's own formats, which registries still
have.
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

MAX_JSON = 4 << 20  # bytes of a manifest or configuration
MAX_LAYERS = 1000
MAX_ENV = 128 * 1024  # bytes of all variables together
MAX_LABELS, MAX_LABEL = 64, 256  # labels taken over; characters of key and value
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_INDEXES = ("application/vnd.oci.image.index.v1+json", "application/vnd.docker.distribution.manifest.list.v2+json")
_COMPRESSION = {"tar": "none", "tar+gzip": "gzip", "tar+zstd": "zstd", "tar.gzip": "gzip", "tar.zstd": "zstd"}
_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64", "armv7l": "arm", "i686": "386"}  # uname's → Go's


class ImageError(Exception):
    """The image makes no sense, or is of no use here; the message is for the user."""


@dataclass(frozen=True)
class Blob:
    """One part of an image."""

    digest: str  # "sha256:…" of its bytes
    size: int  # bytes, as claimed
    compression: str  # of a layer: "none", "gzip", "zstd"

    @property
    def file(self) -> str:
        """Where it is in a layout (image-layout.md)."""
        return self.digest.replace(":", "/", 1)


@dataclass(frozen=True)
class Manifest:
    """What an image consists of."""

    config: Blob
    layers: tuple[Blob, ...]  # lowest first

    @property
    def size(self) -> int:
        """Bytes of all layers, as claimed."""
        return sum(layer.size for layer in self.layers)


@dataclass(frozen=True)
class Config:
    """How an image wants to be run."""

    diff_ids: tuple[str, ...]  # of the layers' content, lowest first
    run_config: dict[str, Any]  # user, work_dir, env_vars; only what it says
    image_config: dict[str, Any]  # entrypoint, cmd
    labels: dict[str, str]


def architecture() -> str:
    """This machine's, by Go's name."""
    machine = platform.machine()
    return _ARCHITECTURES.get(machine, machine)


def digest_of(content: bytes) -> str:
    """``sha256:HEX``."""
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def _object(content: bytes, what: str) -> dict[str, Any]:
    if len(content) > MAX_JSON:
        raise ImageError(f"its {what} is larger than {MAX_JSON} bytes")
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):
        raise ImageError(f"its {what} is no JSON") from None
    if not isinstance(found, dict):
        raise ImageError(f"its {what} is no JSON object")
    return found


def platform_digest(content: bytes) -> str | None:
    """The manifest for this machine in an index of several; None when `content` is no index. Raises ImageError."""
    found = _object(content, "manifest")
    entries = found.get("manifests")
    if found.get("mediaType") not in _INDEXES and not isinstance(entries, list):
        return None
    offered = []
    for entry in entries if isinstance(entries, list) else []:
        where = entry.get("platform") if isinstance(entry, dict) else None
        if not isinstance(where, dict):
            continue
        name = (where.get("os"), where.get("architecture"))
        digest = entry.get("digest")
        if name == ("linux", architecture()) and isinstance(digest, str) and _DIGEST.fullmatch(digest):
            return digest
        offered.append("/".join(str(part)[:20] for part in name))
    shown = ", ".join(sorted(set(offered))[:8]) or "none"
    raise ImageError(f"there is none of it for linux/{architecture()} (there are: {shown})")


def manifest(content: bytes) -> Manifest:
    """One image's manifest. Raises ImageError."""
    found = _object(content, "manifest")
    entries = found.get("layers")
    if not isinstance(entries, list) or not isinstance(found.get("config"), dict):
        raise ImageError("its manifest is of a kind that is not supported (Docker's schema 2 and OCI are)")
    if len(entries) > MAX_LAYERS:
        raise ImageError(f"it has {len(entries)} layers; {MAX_LAYERS} are possible")
    return Manifest(_blob(found["config"], layer=False), tuple(_blob(entry, layer=True) for entry in entries))


def _blob(entry: Any, *, layer: bool) -> Blob:
    if not isinstance(entry, dict):
        raise ImageError("its manifest makes no sense")
    digest, size, kind = entry.get("digest"), entry.get("size"), entry.get("mediaType")
    if not isinstance(digest, str) or not _DIGEST.fullmatch(digest) or type(size) is not int or size < 0:
        raise ImageError("its manifest makes no sense: a digest or size is none")
    if not layer:
        return Blob(digest, size, "none")
    ending = str(kind).rpartition(".v1.")[2] if ".v1." in str(kind) else str(kind).rpartition(".diff.")[2]
    if str(kind).startswith("application/vnd.docker.image.rootfs."):
        ending = str(kind).rpartition(".diff.")[2]
    if ending not in _COMPRESSION:
        raise ImageError(f"a layer is of a kind that is not supported: {str(kind)[:100]!r}")
    return Blob(digest, size, _COMPRESSION[ending])


def layout_manifest(index: bytes) -> Blob:
    """The one manifest that a layout's index.json names. Raises ImageError."""
    entries = _object(index, "index").get("manifests")
    if not isinstance(entries, list) or len(entries) != 1:
        raise ImageError("its index names not one image")
    return _blob(entries[0], layer=False)


def config(content: bytes) -> Config:
    """An image's configuration, as far as it concerns a sandbox. Raises ImageError."""
    found = _object(content, "configuration")
    made_for = found.get("architecture")
    if isinstance(made_for, str) and made_for and made_for != architecture():
        raise ImageError(f"it is for {made_for[:20]}, and this machine is {architecture()}")
    if found.get("os") not in (None, "", "linux"):
        raise ImageError("it is not for Linux")
    rootfs = found.get("rootfs")
    diff_ids = rootfs.get("diff_ids") if isinstance(rootfs, dict) else None
    if not isinstance(diff_ids, list) or not all(isinstance(item, str) and _DIGEST.fullmatch(item) for item in diff_ids):
        raise ImageError("its configuration does not name its layers")
    own = found.get("config")
    own = own if isinstance(own, dict) else {}
    commands = {"entrypoint": _words(own.get("Entrypoint")), "cmd": _words(own.get("Cmd"))}
    image_config = {key: words for key, words in commands.items() if words}
    return Config(tuple(diff_ids), _run_config(own), image_config, _labels(own.get("Labels")))


def _run_config(own: Mapping[str, Any]) -> dict[str, Any]:
    """What LangSmith calls run_config. Raises ImageError."""
    made: dict[str, Any] = {}
    user, work_dir = own.get("User"), own.get("WorkingDir")
    if isinstance(user, str) and user:
        if len(user) > 256 or not user.isprintable():
            raise ImageError("its USER makes no sense")
        made["user"] = user
    if isinstance(work_dir, str) and work_dir:
        if len(work_dir) > 4096 or "\0" in work_dir or ".." in work_dir.split("/"):
            raise ImageError("its WORKDIR makes no sense")
        made["work_dir"] = work_dir if work_dir.startswith("/") else f"/{work_dir}"
    env: dict[str, str] = {}
    for item in own.get("Env") or [] if isinstance(own.get("Env"), list) else []:
        if isinstance(item, str):
            name, equals, value = item.partition("=")
            if name and equals and "\0" not in item:
                env[name] = value
    if sum(len(name.encode("utf-8", "replace")) + len(value.encode("utf-8", "replace")) for name, value in env.items()) > MAX_ENV:
        raise ImageError(f"its ENV has more than {MAX_ENV} bytes")
    if env:
        made["env_vars"] = env
    return made


def _words(value: Any) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(word, str) for word in value) or sum(map(len, value)) > MAX_ENV:
        return []
    return value


def _labels(value: Any) -> dict[str, str]:
    if not isinstance(value, dict):
        return {}
    fitting = {
        key: text
        for key, text in value.items()
        if isinstance(text, str) and 0 < len(key) <= MAX_LABEL and len(text) <= MAX_LABEL and "=" not in key
    }
    return dict(sorted(fitting.items())[:MAX_LABELS])


def chain_ids(diff_ids: tuple[str, ...]) -> list[str]:
    """What each layer is together with all below it (config.md, *Layer ChainID*)."""
    chain: list[str] = []
    for diff_id in diff_ids:
        chain.append(digest_of(f"{chain[-1]} {diff_id}".encode()) if chain else diff_id)
    return chain

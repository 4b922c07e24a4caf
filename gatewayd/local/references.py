"""Where an image is: references as users write them, and as skopeo(1) wants them. Pure.

The grammar is that of github.com/distribution/reference; the forms that name files and the daemon of this machine are ours alone
(containers-transports(5)).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import urlsplit

MAX_REFERENCE = 4500  # characters: a path may be 4,096 long
DOCKER_HUB = "docker.io"
_HUB_HOSTS = ("docker.io", "index.docker.io", "registry-1.docker.io", "registry.hub.docker.com")
_TAG = r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}"
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_LABEL = r"[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?"
_HOST = re.compile(rf"(?:{_LABEL}(?:\.{_LABEL})*|\[[0-9a-fA-F:]+\])(?::\d{{1,5}})?")
_PATH = re.compile(r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*(?:/[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*)*")
_FILES = ("docker-archive", "oci-archive")


@dataclass(frozen=True)
class Reference:
    """One image."""

    transport: str  # "docker", or where on this machine: "docker-archive", "oci-archive", "docker-daemon"
    host: str  # of the registry, with its port; "" for an image on this machine
    path: str  # repository, file, or name in the daemon
    tag: str  # "" for none
    digest: str  # "sha256:…", or "" for none

    @property
    def local(self) -> bool:
        """Whether it is on this machine already."""
        return not self.host

    def source(self, digest: str = "") -> str:
        """As skopeo takes it; at one of its digests if there is a registry that can be asked for it."""
        if self.transport == "docker":
            version = f"@{digest or self.digest}" if digest or self.digest else f":{self.tag or 'latest'}"
            return f"docker://{self.host}/{self.path}{version}"
        if self.transport == "docker-daemon":
            return f"docker-daemon:{self.path}:{self.tag or 'latest'}"
        return f"{self.transport}:{self.path}" + (f":{self.tag}" if self.tag else "")


def parse(text: str) -> Reference:
    """The image that a user means. Raises ValueError with the reason."""
    if len(text) > MAX_REFERENCE or not text.isprintable() or text != text.strip():
        raise ValueError("is no image reference")
    transport, colon, rest = text.partition(":")
    if colon and transport in _FILES:
        return _file(transport, rest)
    if colon and transport == "docker-daemon":
        name, tag, digest = _split(rest)
        if digest or not _PATH.fullmatch(name.rpartition("/")[2]) or name.startswith("-"):
            raise ValueError("must be docker-daemon:NAME or docker-daemon:NAME:TAG")
        return Reference(transport, "", name, tag, "")
    name, tag, digest = _split(text.removeprefix("docker://"))
    host, slash, path = name.partition("/")
    if not slash or not ("." in host or ":" in host or host == "localhost"):
        host, path = DOCKER_HUB, name
    if not _HOST.fullmatch(host) or not _PATH.fullmatch(path):
        raise ValueError("must be an image such as debian:12 or registry.example.com/team/app:1.0")
    if host in _HUB_HOSTS:
        host = DOCKER_HUB
        path = path if "/" in path else f"library/{path}"
    return Reference("docker", host, path, tag, digest)


def _split(text: str) -> tuple[str, str, str]:
    """(name, tag, digest)"""
    name, at, digest = text.partition("@")
    if at and not _DIGEST.fullmatch(digest):
        raise ValueError("has a digest that is not sha256: and 64 hexadecimal digits")
    tag = ""
    if ":" in name.rpartition("/")[2]:
        name, _, tag = name.rpartition(":")
        if not re.fullmatch(_TAG, tag):
            raise ValueError("has a tag that is none")
    return name, tag, digest


def _file(transport: str, text: str) -> Reference:
    path, _, tag = text.partition(":")
    if not path.startswith("/") or ".." in path.split("/"):
        raise ValueError(f"must name its file by an absolute path without '..': {transport}:/path/to/image.tar")
    if tag and not re.fullmatch(r"[A-Za-z0-9_./:-]{1,256}", tag):
        raise ValueError("has a name in the archive that is none")
    return Reference(transport, "", path, tag, "")


@dataclass(frozen=True)
class RegistryUrl:
    """Where a registry is."""

    host: str  # with its port; docker.io for Docker's own
    plain: bool  # it was asked for without TLS


def parse_registry(url: str) -> RegistryUrl:
    """A registry's address: ``HOST[:PORT]``, or a URL of it. Raises ValueError with the reason."""
    whole = url if "://" in url else f"https://{url}"
    parts = urlsplit(whole)
    if parts.scheme not in ("http", "https") or parts.query or parts.fragment or "@" in parts.netloc:
        raise ValueError("must be HOST[:PORT], or an https:// or http:// URL without a user in it")
    if not _HOST.fullmatch(parts.netloc):
        raise ValueError("names no host")
    host = parts.netloc.lower()
    return RegistryUrl(DOCKER_HUB if host in _HUB_HOSTS else host, parts.scheme == "http")

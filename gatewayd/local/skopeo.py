"""skopeo(1), which fetches images: no credential in its arguments, watched while it works, understood when it fails."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from gatewayd.local.envelope import printable
from gatewayd.local.oci import MAX_JSON, ImageError
from gatewayd.local.references import Reference
from gatewayd.local.storage import ADVICE

PULL_DEADLINE = 3600.0  # seconds for one image
_ASK_DEADLINE = 60.0  # seconds for a manifest
_LOOK_INTERVAL = 0.25  # seconds between looks at what has come
_MAX_COMPLAINT = 65536  # bytes of standard error that are kept
_TOO_LARGE = "the image is larger than it may be, or than it said"
_SEARCH = os.defpath + ":/usr/local/bin:/usr/sbin"
# of the service's environment: who else's certificates to trust (Go's crypto/x509), and the way out
PASSED_ON = ("SSL_CERT_FILE", "SSL_CERT_DIR", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy")

_MEANINGS = (  # in what skopeo says → what it means; the first that fits
    (r"no space left on device|disk quota exceeded", ADVICE),
    (r"x509:|certificate", "the registry's certificate is not trusted: give the registry its `ca_cert`"),
    (r"server gave HTTP response to HTTPS client", "the registry speaks plain HTTP: use one whose url begins with http://"),
    (
        r"unauthorized|authentication required|access to the resource is denied|denied:|40[13] ",
        "the registry refuses the credentials, or wants some",
    ),
    (r"manifest unknown|name unknown|not found|no such image|404 |reference does not exist", "there is no such image"),
    (r"toomanyrequests|429 ", "the registry has had too many requests: try again later"),
    (r"[Dd]igest did not match|does not match|Digests? .*mismatch", "what came is not what its digest says"),
    (r"[Cc]annot connect to the Docker daemon|docker\.sock", "there is no Docker daemon that this service may use"),
    (r"no such file or directory", "there is no such file"),
    (r"permission denied", "the service may not read that file"),
    (r"unexpected EOF|invalid tar header|archive/tar|gzip: invalid|invalid character", "the image is damaged, or is none"),
    (r"connection refused|no such host|i/o timeout|unreachable|EOF$|connection reset", "the registry cannot be reached"),
)


@dataclass(frozen=True)
class Access:
    """How to get at an image."""

    host: str = ""  # of the registry that the rest is about
    plain: bool = False  # without TLS
    username: str = ""
    password: str = ""
    ca: str = ""  # PEM


@dataclass(frozen=True)
class Bounds:
    """When skopeo is ended, whatever it is doing: archives are unpacked into the private folder before anything is copied."""

    folder: int  # bytes of all files in the private folder, at most
    room: Callable[[], int]  # bytes that the disk may still take; asked in a thread


class Skopeo:
    """One image's transport, with a private folder for what is needed on the way."""

    def __init__(self, folder: Path, reference: Reference, access: Access, environ: Mapping[str, str]) -> None:
        """Write the credentials into `folder`, which is the service's alone. Raises OSError."""
        self._reference = reference
        self._plain = access.plain
        self._folder = folder
        passed = {name: environ[name] for name in PASSED_ON if name in environ}
        own = dict.fromkeys(("HOME", "TMPDIR", "XDG_RUNTIME_DIR"), str(folder))  # nobody's configuration, nobody's credentials
        self._env = {**passed, **own, "PATH": _SEARCH}
        auths = {}
        if access.username or access.password:
            pair = f"{access.username}:{access.password}".encode()
            auths[access.host] = {"auth": base64.b64encode(pair).decode("ascii")}
        self._auth_file = _private(folder / "auth.json", json.dumps({"auths": auths}))
        self._certificates: Path | None = None  # folder with the registry's own authorities
        if access.ca:
            self._certificates = folder / "certs"
            self._certificates.mkdir(mode=0o700)
            _private(self._certificates / "ca.crt", access.ca)

    def _options(self, prefix: str) -> list[str]:
        if self._reference.local:
            return []
        made = [f"--authfile={self._auth_file}"]
        if self._certificates is not None:
            made.append(f"--{prefix}cert-dir={self._certificates}")
        if self._plain:
            made.append(f"--{prefix}tls-verify=false")
        return made

    async def manifest(self, bounds: Bounds, digest: str = "") -> bytes:
        """The manifest of the image, or of one of the images in its index; archives are unpacked for it. Raises ImageError."""
        source = self._reference.source(digest)
        return await self._run(["inspect", "--raw", *self._options(""), source], _ASK_DEADLINE, lambda: self._excess(bounds))

    async def copy(self, digest: str, layout: Path, on_bytes: Callable[[int], None], limit: int, bounds: Bounds) -> None:
        """Copy the image into an OCI layout.

        Args:
            digest: of its manifest, so that it is the one that was looked at; "" for an image on this machine.
            on_bytes: called with what has come, now and then.
            limit: bytes; more than it in the layout is refused.

        Raises:
            ImageError: it cannot be had.
        """
        source = self._reference.source(digest)
        options = ["--quiet", "--retry-times=2", "--dest-oci-accept-uncompressed-layers", *self._options("src-")]
        words = ["copy", *options, source, f"oci:{layout}:image"]
        loop = asyncio.get_running_loop()

        def look() -> str:
            size = _size_of(layout)
            loop.call_soon_threadsafe(on_bytes, size)
            return _TOO_LARGE if size > limit else self._excess(bounds)

        await self._run(words, PULL_DEADLINE, look)

    def _excess(self, bounds: Bounds) -> str:
        """What is wrong with what is there by now; "": nothing."""
        if _size_of(self._folder) > bounds.folder:
            return _TOO_LARGE
        return ADVICE if bounds.room() <= 0 else ""

    async def _run(self, words: list[str], deadline: float, look: Callable[[], str]) -> bytes:
        """Its output. `look` is called in a thread now and then, and a last time when it has ended: why to end it, or ""."""
        # archives are unpacked in /var/tmp otherwise, whatever TMPDIR says
        common = ["--insecure-policy", f"--tmpdir={self._folder}"]
        # it ends with the service, whatever ends that
        command = ["setpriv", "--pdeathsig", "KILL", "--", "skopeo", *common, *words]
        try:
            process = await asyncio.create_subprocess_exec(
                *command,
                env=self._env,
                cwd=self._folder,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                limit=MAX_JSON,
                start_new_session=True,
            )
        except FileNotFoundError:
            raise ImageError("setpriv is not installed (apt-get install util-linux)") from None
        excess = ""
        try:
            async with asyncio.timeout(deadline):
                reading = _some(process.stdout, MAX_JSON), _some(process.stderr, _MAX_COMPLAINT)
                (out, err), excess = await asyncio.gather(asyncio.gather(*reading), _watched(process, look))
                code = await process.wait()
        except TimeoutError:
            raise ImageError(f"it did not come within {deadline:.0f} s") from None
        finally:
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
                await process.wait()
        if code != 0 and excess:
            raise ImageError(excess)
        if code != 0:
            raise ImageError(self._explain(err.decode("utf-8", "replace"), code))
        return out

    def _explain(self, said: str, code: int) -> str:
        if code == 127 or "failed to execute skopeo" in said:
            return "skopeo is not installed (apt-get install skopeo)"
        for pattern, meaning in _MEANINGS:
            if re.search(pattern, said.strip()):
                return meaning
        lines = [line for line in said.replace(str(self._folder), "").splitlines() if line.strip()]
        last = lines[-1] if lines else f"skopeo ended with {code}"
        found = re.search(r'msg="?(.*)', last)
        return printable(found[1].rstrip('"') if found else last, 300)


async def _watched(process: asyncio.subprocess.Process, look: Callable[[], str]) -> str:
    """Wait for a process, and kill it when `look` says why; returns that, or ""."""
    while True:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LOOK_INTERVAL):
                await process.wait()
        excess = await asyncio.to_thread(look)
        if excess and process.returncode is None:
            process.kill()
            return excess
        if process.returncode is not None:
            return ""


async def _some(stream: asyncio.StreamReader | None, most: int) -> bytes:
    """All of a stream, of which the first `most` bytes are kept."""
    kept = b""
    while stream is not None and (data := await stream.read(65536)):
        kept += data[: most - len(kept)]
    return kept


def _private(path: Path, content: str) -> Path:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "w", encoding="utf-8") as file:
        file.write(content)
    return path


def _size_of(folder: Path) -> int:
    """Bytes of all files in a folder that somebody fills."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                total += Path(place, name).lstat().st_size
    return total

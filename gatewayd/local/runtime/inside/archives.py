"""The bytes of a layer's archive on their way to the unpacker: verified, decompressed, counted."""

from __future__ import annotations

import hashlib
import os
import subprocess
import zlib
from typing import Any, Literal, Protocol

_CHUNK = 1 << 20  # bytes read at a time
_GZIP = 16 + zlib.MAX_WBITS  # zlib's way to say "with gzip's header and trailer" (RFC 1952)
ZSTD = ("zstd", "-d", "-c", "-q", "--no-progress")  # with its own limit of 128 MiB on the window


class LayerError(Exception):
    """The archive cannot be unpacked; the message is for the user."""


class _Reader(Protocol):
    def read(self, size: int) -> bytes: ...


def check_file(fd: int, digest: str) -> None:
    """Require that an open file is what it is called, and rewind it.

    Args:
        digest: ``sha256:HEX``.

    Raises:
        LayerError: it is not.
    """
    if _digest_of(fd) != digest:
        raise LayerError(f"a layer is not what its digest {digest[:19]}… says: it was damaged or replaced on its way")
    os.lseek(fd, 0, os.SEEK_SET)


def _digest_of(fd: int) -> str:
    state = hashlib.sha256()
    while data := os.read(fd, _CHUNK):
        state.update(data)
    return f"sha256:{state.hexdigest()}"


class _Plain:
    """What a descriptor gives, as it is."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def read(self, size: int) -> bytes:
        return os.read(self._fd, size)


class _Gunzip:
    """Any number of gzip members, one after the other (RFC 1952 section 2.2), never more than asked for in memory."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._inflate = zlib.decompressobj(_GZIP)
        self._pending = b""  # read and not decompressed yet
        self._fresh = True  # no byte of the present member has come

    def read(self, size: int) -> bytes:
        while True:
            if not self._pending:
                self._pending = os.read(self._fd, _CHUNK)
                if not self._pending:
                    if not self._fresh:
                        raise EOFError("the compressed data ends too early")
                    return b""
            self._fresh = False
            try:
                data = self._inflate.decompress(self._pending, size)
            except zlib.error as exc:
                raise LayerError(f"the compressed data is damaged: {exc}") from exc
            self._pending = self._inflate.unconsumed_tail
            if self._inflate.eof:
                self._pending = self._inflate.unused_data
                self._inflate = zlib.decompressobj(_GZIP)
                self._fresh = True
            if data:
                return data


class _Unzstd:
    """zstd(1) of this machine, as a process with our present rights."""

    def __init__(self, fd: int) -> None:
        try:
            self._process = subprocess.Popen(
                ZSTD,
                stdin=fd,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={"PATH": os.defpath + ":/usr/local/bin"},
            )
        except FileNotFoundError:
            raise LayerError("its layers are compressed with zstd, which is not installed (apt-get install zstd)") from None
        if self._process.stdout is None:
            raise LayerError("zstd has no output")
        self._output = self._process.stdout

    def read(self, size: int) -> bytes:
        data = self._output.read1(size)  # type: ignore[attr-defined]  # a pipe's reader is buffered
        if not data and self._process.wait() != 0:
            raise LayerError("the compressed data is damaged, or ends too early")
        return bytes(data)


class Source:
    """A readable file of the archive's own bytes: as many as there are, and no more than `limit`."""

    def __init__(self, fd: int, compression: str, limit: int) -> None:
        """`compression`: "none", "gzip", "zstd"; "": as tarfile finds out by itself."""
        readers: dict[str, Any] = {"gzip": _Gunzip, "zstd": _Unzstd}
        self._reader: _Reader = readers.get(compression, _Plain)(fd)
        self._left = limit  # bytes that may still come
        self._digest = hashlib.sha256()  # of all that came
        self.mode: Literal["r|", "r|*"] = "r|" if compression else "r|*"  # for tarfile.open

    def read(self, size: int = _CHUNK) -> bytes:
        """Up to `size` bytes; b"" at the end. Raises LayerError, OSError, EOFError."""
        parts = []
        while size > 0 and (data := self._reader.read(size)):
            self._left -= len(data)
            if self._left < 0:
                raise LayerError("the image is larger than it may be")
            self._digest.update(data)
            parts.append(data)
            size -= len(data)
        return b"".join(parts)

    def drain(self) -> None:
        """Read what is left."""
        while self.read():
            pass

    def check(self, diff_id: str) -> None:
        """Require that all that was read has this digest (OCI image specification, config.md, *DiffIDs*). Raises LayerError."""
        if f"sha256:{self._digest.hexdigest()}" != diff_id:
            raise LayerError(f"the content of a layer is not what the image says ({diff_id[:19]}…)")

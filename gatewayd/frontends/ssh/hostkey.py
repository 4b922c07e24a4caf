"""The gateway's SSH host key: one for all sandboxes, made when it is first needed, this user's alone."""

from __future__ import annotations

import base64
import binascii
import os
import stat
import struct
from contextlib import suppress
from pathlib import Path

from gatewayd.api import ErrorKind
from gatewayd.errors import GatewayError

HOST_KEY = "ssh_host_ed25519_key"  # in the state directory
ALGORITHM = "ssh-ed25519"
FILE_MAX = 16384  # bytes of a key file
_HEAD = b"-----BEGIN OPENSSH PRIVATE KEY-----"
_TAIL = b"-----END OPENSSH PRIVATE KEY-----"
_MAGIC = b"openssh-key-v1\0"
_LENGTH = struct.Struct(">I")


def host_key_path(state_dir: Path) -> Path:
    """Where the private key is, or will be."""
    return state_dir / HOST_KEY


def public_host_key(state_dir: Path) -> str:
    """The public half, ``ssh-ed25519 AAAA…``; the key is made when there is none.

    Making it imports asyncssh and writes to disk: call it on a thread where that matters.

    Raises:
        GatewayError: kind config: the key can be read by others, or is no key.
    """
    return public_half(private_host_key(state_dir), host_key_path(state_dir))


def private_host_key(state_dir: Path) -> bytes:
    """The private key, OpenSSH's format; made when there is none. Raises GatewayError as `public_host_key`."""
    path = host_key_path(state_dir)
    try:
        with suppress(FileNotFoundError):
            return _read(path)
        _make(path)
        return _read(path)
    except OSError as exc:
        raise _error(f"cannot use the host key {path}: {exc.strerror or exc}", "make the state directory writable") from exc


def public_half(data: bytes, path: Path) -> str:
    """The public key inside an OpenSSH private key file, where it stands in the clear (PROTOCOL.key, section 1)."""
    try:
        body = data.strip()
        if not body.startswith(_HEAD) or not body.endswith(_TAIL):
            raise ValueError("no OpenSSH private key")
        blob = base64.b64decode(body[len(_HEAD) : -len(_TAIL)])
        if not blob.startswith(_MAGIC):
            raise ValueError("another format")
        at = len(_MAGIC)
        for _ in ("cipher", "key derivation", "its options"):
            _, at = _string(blob, at)
        (count,) = _LENGTH.unpack_from(blob, at)
        key, _ = _string(blob, at + _LENGTH.size)
        if count != 1 or _string(key, 0)[0] != ALGORITHM.encode():
            raise ValueError(f"no {ALGORITHM} key")
    except (ValueError, struct.error, binascii.Error) as exc:
        raise _error(
            f"cannot use the host key {path}: it is no OpenSSH {ALGORITHM} key",
            "remove the file for a new key; `sandbox ssh-setup` then makes ssh know it",
        ) from exc
    return f"{ALGORITHM} {base64.b64encode(key).decode()}"


def _string(blob: bytes, at: int) -> tuple[bytes, int]:
    """The string at `at` and where it ends (RFC 4251, section 5)."""
    (length,) = _LENGTH.unpack_from(blob, at)
    end = at + _LENGTH.size + length
    if end > len(blob):
        raise ValueError("the key is cut short")
    return blob[at + _LENGTH.size : end], end


def _read(path: Path) -> bytes:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    with os.fdopen(fd, "rb") as file:
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode):
            raise _error(f"the host key {path} is no regular file", "remove it: a new key is made")
        if info.st_mode & 0o077 or info.st_uid != os.geteuid():
            raise _error(
                f"the host key {path} is not this user's alone (mode {info.st_mode & 0o777:04o})",
                f"if nobody else has read it: chmod 600 {path}; else remove it for a new one",
            )
        return file.read(FILE_MAX)


def _make(path: Path) -> None:
    """Write a new key. When two do so at once, the first one's stays and both use it."""
    import asyncssh

    key = asyncssh.generate_private_key(ALGORITHM, comment="gatewayd")
    data: bytes = key.export_private_key()
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{os.urandom(4).hex()}")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        try:
            os.write(fd, data)
            os.fsync(fd)
        finally:
            os.close(fd)
        with suppress(FileExistsError):
            os.link(temporary, path)  # unlike a rename, never replaces what is there
    finally:
        temporary.unlink()
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with suppress(OSError):
            os.fsync(directory)  # file systems that cannot are left alone
    finally:
        os.close(directory)


def _error(message: str, hint: str) -> GatewayError:
    return GatewayError(message, kind=ErrorKind.CONFIG, hint=hint)

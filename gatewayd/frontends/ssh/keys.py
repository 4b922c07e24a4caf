"""Who may come in over TCP: authorized keys and certificate authorities, read again when their files change."""

from __future__ import annotations

import asyncio
import logging
import os
import stat
from pathlib import Path

import asyncssh

from gatewayd.api import ErrorKind
from gatewayd.errors import GatewayError, printable
from gatewayd.frontends.ssh.authorized import AuthorizedKeys, parse_lines

log = logging.getLogger(__name__)

FILE_MAX = 1 << 20  # bytes
_Signature = tuple[int, int, int, int]


class KeyFile:
    """A file of public keys that nobody but its owner, this user or root, can change."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._signature: _Signature | None = None  # of the file that _text came from
        self._text = ""

    def text(self) -> tuple[str, bool]:
        """The content, and whether it is another one than last time. Raises GatewayError (config)."""
        try:
            fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            with os.fdopen(fd, "rb") as file:
                info = os.fstat(fd)
                self._check(info)
                signature = (info.st_ino, info.st_size, info.st_mtime_ns, info.st_mode)
                if signature == self._signature:
                    return self._text, False
                self._text = file.read(FILE_MAX).decode("utf-8", "replace")
                self._signature = signature
                return self._text, True
        except OSError as exc:
            self._signature = None
            raise _error(f"cannot read {self.path}: {exc.strerror or exc}", "create the file, or change [ssh]") from exc

    def _check(self, info: os.stat_result) -> None:
        parent = self.path.parent.stat()
        if not stat.S_ISREG(info.st_mode):
            raise _error(f"{self.path} is not a regular file", "name a file of public keys in [ssh]")
        for what, found in ((self.path, info), (self.path.parent, parent)):
            sticky = stat.S_ISDIR(found.st_mode) and found.st_mode & stat.S_ISVTX
            if found.st_uid not in (os.geteuid(), 0) or (found.st_mode & 0o022 and not sticky):
                raise _error(f"{what} can be changed by others (mode {found.st_mode & 0o777:04o})", f"chmod go-w {what}")


class Keys:
    """Both files."""

    def __init__(self, authorized_keys: Path | None, trusted_user_ca_keys: Path | None) -> None:
        self._users = KeyFile(authorized_keys) if authorized_keys else None
        self._signers = KeyFile(trusted_user_ca_keys) if trusted_user_ca_keys else None
        self._authorized: AuthorizedKeys | None = None  # None: no key in the file
        self._authorities: list[asyncssh.SSHKey] = []

    async def current(self) -> tuple[AuthorizedKeys | None, list[asyncssh.SSHKey]]:
        """Authorized keys and certificate authorities, as the files are now. Raises GatewayError (config)."""
        return await asyncio.to_thread(self._read)

    def _read(self) -> tuple[AuthorizedKeys | None, list[asyncssh.SSHKey]]:
        if self._users is not None:
            text, changed = self._users.text()
            if changed:
                self._authorized = None  # should what follows fail
                self._authorized = _import_authorized(text, self._users.path)
        if self._signers is not None:
            text, changed = self._signers.text()
            if changed:
                self._authorities = []
                self._authorities = _import_authorities(text, self._signers.path)
        return self._authorized, self._authorities


def _import_authorized(text: str, path: Path) -> AuthorizedKeys | None:
    good, bad = parse_lines(text)
    for because in bad:
        log.warning("ssh: %s, %s: this key is refused", path, because)
    if bad and not good:
        raise _error(f"cannot use {path}: {bad[0]}", "one public key a line, as sshd(8) has it")
    return AuthorizedKeys(good) if good else None


def _import_authorities(text: str, path: Path) -> list[asyncssh.SSHKey]:
    try:
        return [
            asyncssh.import_public_key(line) for line in text.splitlines() if line.strip() and not line.strip().startswith("#")
        ]
    except (ValueError, asyncssh.KeyImportError) as exc:
        raise _error(f"cannot use {path}: {printable(exc, 200)}", "one public key of an authority a line") from exc


def _error(message: str, hint: str) -> GatewayError:
    return GatewayError(message, kind=ErrorKind.CONFIG, hint=hint)

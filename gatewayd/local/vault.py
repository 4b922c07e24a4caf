"""Secrets at rest: AES-256-GCM under a key that lies beside the state file, for its owner's eyes alone.

Whoever reads the state file without the key file (a backup, a copy sent to somebody) learns no password.
"""

from __future__ import annotations

import base64
import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

KEY_FILE = "secrets.key"
_NONCE = 12  # bytes (NIST SP 800-38D section 8.2.1)


class VaultError(Exception):
    """A secret cannot be kept, or not be read; the message says why, and nothing of the secret."""


class Vault:
    """Encrypts and decrypts with the key of one state directory, made at the first use."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / KEY_FILE

    def seal(self, secret: str, owner: str) -> str:
        """`secret`, encrypted for the row with the id `owner`. Raises VaultError."""
        nonce = os.urandom(_NONCE)
        return base64.b64encode(nonce + self._cipher().encrypt(nonce, secret.encode(), owner.encode())).decode("ascii")

    def open(self, sealed: str, owner: str) -> str:
        """The secret again. Raises VaultError when it was sealed with another key, or for another row."""
        from cryptography.exceptions import InvalidTag  # only now: most services keep no password

        try:
            data = base64.b64decode(sealed, validate=True)
            return self._cipher().decrypt(data[:_NONCE], data[_NONCE:], owner.encode()).decode()
        except (InvalidTag, ValueError):
            raise VaultError(f"the stored password cannot be decrypted: {KEY_FILE} is not the one it was stored with") from None

    def _cipher(self) -> AESGCM:
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM

        try:
            try:
                fd = os.open(self._file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            except FileExistsError:
                key = self._file.read_bytes()
            else:
                key = AESGCM.generate_key(256)
                with os.fdopen(fd, "wb") as file:
                    file.write(key)
                    file.flush()
                    os.fsync(fd)
        except OSError as exc:
            raise VaultError(f"cannot use {KEY_FILE}: {exc.strerror}") from exc
        if len(key) != 32:
            raise VaultError(f"{KEY_FILE} is damaged: remove it, and give the registries their passwords again")
        return AESGCM(key)

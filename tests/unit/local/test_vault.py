"""Passwords at rest."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from gatewayd.local.vault import KEY_FILE, Vault, VaultError


def test_what_is_sealed_is_opened_again_by_its_own_row_alone(tmp_path: Path) -> None:
    sealed = Vault(tmp_path).seal("s3cret", "row-1")
    assert "s3cret" not in sealed
    assert sealed != Vault(tmp_path).seal("s3cret", "row-1")
    assert Vault(tmp_path).open(sealed, "row-1") == "s3cret"
    assert stat.S_IMODE((tmp_path / KEY_FILE).stat().st_mode) == 0o600
    with pytest.raises(VaultError, match="cannot be decrypted"):
        Vault(tmp_path).open(sealed, "row-2")
    for damaged in ("", "!", sealed[:-8], sealed[:20]):
        with pytest.raises(VaultError):
            Vault(tmp_path).open(damaged, "row-1")


def test_another_key_opens_nothing(tmp_path: Path) -> None:
    sealed = Vault(tmp_path).seal("s3cret", "row")
    (tmp_path / KEY_FILE).write_bytes(bytes(32))
    with pytest.raises(VaultError, match="not the one it was stored with"):
        Vault(tmp_path).open(sealed, "row")
    (tmp_path / KEY_FILE).write_bytes(b"short")
    with pytest.raises(VaultError, match="is damaged"):
        Vault(tmp_path).seal("s3cret", "row")

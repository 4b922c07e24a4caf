"""The [ssh] table."""

from __future__ import annotations

from pathlib import Path

import pytest

from gatewayd.config import load
from gatewayd.errors import GatewayError


def read(tmp_path: Path, text: str) -> dict[str, str]:
    (tmp_path / "config.toml").write_text(text)
    return {"GATEWAYD_CONFIG": str(tmp_path / "config.toml"), "HOME": str(tmp_path / "home"), "GATEWAYD_STATE_DIR": str(tmp_path)}


def test_without_it_nothing_listens(tmp_path: Path) -> None:
    assert load(read(tmp_path, "")).ssh.host == ""
    assert load(read(tmp_path, "[ssh]\nauthorized_keys = 'keys'\n")).ssh.host == ""


def test_all_of_it(tmp_path: Path) -> None:
    text = "[ssh]\nlisten='localhost:2222'\nauthorized_keys='~/keys'\ntrusted_user_ca_keys='ca.pub'\nprofile='work'\n"
    ssh = load(read(tmp_path, text)).ssh
    assert (ssh.host, ssh.port, ssh.profile) == ("127.0.0.1", 2222, "work")
    assert (ssh.authorized_keys, ssh.trusted_user_ca_keys) == (tmp_path / "home" / "keys", tmp_path / "ca.pub")
    assert load(read(tmp_path, "[ssh]\nlisten='[::1]:22'\nauthorized_keys='/k'\n")).ssh.host == "::1"


def test_others_reach_it_only_if_that_is_said(tmp_path: Path) -> None:
    text = "[ssh]\nlisten='0.0.0.0:2222'\nauthorized_keys='/k'\n"
    with pytest.raises(GatewayError, match="others can reach"):
        load(read(tmp_path, text))
    assert load(read(tmp_path, text + "beyond_loopback=true\n")).ssh.host == "0.0.0.0"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ssh = 3", "must be a table"),
        ("[ssh]\nport = 3", "unknown key 'port'"),
        ("[ssh]\nlisten = 3", "must be a string"),
        ("[ssh]\nbeyond_loopback = 'yes'", "must be true or false"),
        ("[ssh]\nlisten = '127.0.0.1'\nauthorized_keys='/k'", "not an address"),
        ("[ssh]\nlisten = 'example.com:22'\nauthorized_keys='/k'", "not an address"),
        ("[ssh]\nlisten = '127.0.0.1:x'\nauthorized_keys='/k'", "not a port"),
        ("[ssh]\nlisten = '127.0.0.1:70000'\nauthorized_keys='/k'", "not a port"),
        ("[ssh]\nlisten = '127.0.0.1:2222'", "nobody could log in"),
    ],
)
def test_what_is_wrong_is_told(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(GatewayError, match=message):
        load(read(tmp_path, text))

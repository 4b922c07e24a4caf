"""The state directory: private, held by one, and telling where that one listens."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from gatewayd.local.statedir import StateDir, StateDirError, StateDirInUse


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_everything_is_the_users_alone(tmp_path: Path) -> None:
    path = tmp_path / "a" / "state"
    state = StateDir(path)
    key = state.key()
    state.publish("http://127.0.0.1:1")
    assert mode(path) == 0o700
    assert mode(path / "api-key") == mode(path / "lock") == mode(path / "endpoint.json") == 0o600
    assert len(key) >= 32
    assert state.key() == key
    assert state.published()["endpoint"] == "http://127.0.0.1:1"
    assert state.published()["pid"] == os.getpid()
    state.close()
    state.close()
    assert not (path / "endpoint.json").exists()
    assert sorted(entry.name for entry in path.iterdir()) == ["api-key", "lock"]


def test_a_second_one_is_told_who_is_there(tmp_path: Path) -> None:
    state = StateDir(tmp_path)
    state.publish("http://127.0.0.1:4321")
    with pytest.raises(StateDirInUse) as caught:
        StateDir(tmp_path)
    assert f"pid {os.getpid()} " in str(caught.value)
    assert "http://127.0.0.1:4321" in str(caught.value)
    assert state.published()  # the refused one left it alone
    state.close()
    StateDir(tmp_path).close()


def test_leftovers_of_a_killed_service(tmp_path: Path) -> None:
    (tmp_path / "endpoint.json").write_text('{"endpoint": "http://127.0.0.1:1", "pid": 1}')
    (tmp_path / "lock").write_text("99999999 and more\n")
    state = StateDir(tmp_path)
    assert state.published() == {}
    assert (tmp_path / "lock").read_text() == f"{os.getpid()}\n"
    state.close()


def test_a_key_that_was_readable_is_closed_up(tmp_path: Path) -> None:
    (tmp_path / "api-key").write_text("a-key-that-somebody-wrote\n")
    (tmp_path / "api-key").chmod(0o644)
    state = StateDir(tmp_path)
    assert state.key() == "a-key-that-somebody-wrote"
    assert mode(tmp_path / "api-key") == 0o600
    state.close()


def test_an_empty_key_opens_nothing(tmp_path: Path) -> None:
    (tmp_path / "api-key").write_text("\n")
    state = StateDir(tmp_path)
    with pytest.raises(StateDirError, match="too short"):
        state.key()
    state.close()


def test_a_file_in_its_place(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("")
    with pytest.raises(StateDirError):
        StateDir(tmp_path / "state")

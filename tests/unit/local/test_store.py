"""Rows survive: a reopened file, a killed process; and what is not ours is refused."""

from __future__ import annotations

import signal
import sqlite3
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gatewayd.local.store import Record, Store, StoreError, now


def record(number: int = 1, **changes: Any) -> Record:
    made = Record(
        id=f"id-{number}",
        name=f"name-{number}",
        status="ready",
        created_at=now(),
        updated_at=now(),
        idle_ttl_seconds=600,
        delete_after_stop_seconds=0,
    )
    return replace(made, **changes)


def test_what_is_stored_comes_back(tmp_path: Path) -> None:
    store = Store(tmp_path / "state.db")
    full = record(
        status_message="ünïcode",
        stopped_at=now(),
        millicores=1500,
        mem_bytes=1 << 40,
        fs_capacity_bytes=1,
        labels={"a": "b"},
        env_vars={"X": "y\n"},
        run_config={"user": "u", "env_vars": {"A": "1"}},
    )
    store.insert(full)
    store.insert(second := record(2))
    store.save(changed := replace(full, status="stopped", labels={}))
    store.close()
    store = Store(tmp_path / "state.db")
    assert store.load() == [changed, second]
    store.delete("id-1")
    store.delete("id-1")
    assert [row.id for row in store.load()] == ["id-2"]
    store.close()


def test_names_and_ids_are_unique(tmp_path: Path) -> None:
    store = Store(tmp_path / "state.db")
    store.insert(record(1))
    store.insert(record(2))
    with pytest.raises(sqlite3.IntegrityError):
        store.insert(record(3, name="name-1"))
    with pytest.raises(sqlite3.IntegrityError):
        store.insert(record(1, name="other"))
    with pytest.raises(sqlite3.IntegrityError):
        store.save(record(2, name="name-1"))
    assert [row.name for row in store.load()] == ["name-1", "name-2"]
    store.close()


def test_rows_survive_a_killed_process(tmp_path: Path) -> None:
    script = f"""
import pathlib, sys
from gatewayd.local.store import Record, Store, now
store = Store(pathlib.Path({str(tmp_path / "state.db")!r}))
for number in range(50):
    store.insert(Record(f"id-{{number}}", f"name-{{number}}", "ready", now(), now(), 600, 0))
    print(number, flush=True)
sys.stdin.read()
"""
    process = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with process:
        assert process.stdout is not None
        for number in range(50):
            assert process.stdout.readline() == f"{number}\n"
        process.send_signal(signal.SIGKILL)
    store = Store(tmp_path / "state.db")
    assert {row.id for row in store.load()} == {f"id-{number}" for number in range(50)}
    store.close()


def test_another_version_is_refused(tmp_path: Path) -> None:
    store = Store(tmp_path / "state.db")
    store.close()
    db = sqlite3.connect(tmp_path / "state.db")
    db.execute("PRAGMA user_version = 99")
    db.close()
    with pytest.raises(StoreError, match="version 99"):
        Store(tmp_path / "state.db")


def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    (tmp_path / "state.db").write_bytes(b"not a database" * 100)
    with pytest.raises(StoreError, match=r"state\.db"):
        Store(tmp_path / "state.db")

"""State files of earlier versions are taken over, as they are."""

from __future__ import annotations

import sqlite3
from pathlib import Path

from gatewayd.local.records import LayerRecord, RegistryRecord, SnapshotRecord
from gatewayd.local.store import SCHEMA_VERSION, Store

# What the first version of this program wrote, word for word: never changed.
FIRST = """
CREATE TABLE boxes (
    id TEXT PRIMARY KEY, name TEXT NOT NULL UNIQUE, status TEXT NOT NULL, status_message TEXT, created_at TEXT NOT NULL,
    updated_at TEXT NOT NULL, stopped_at TEXT, idle_ttl_seconds INTEGER NOT NULL, delete_after_stop_seconds INTEGER NOT NULL,
    millicores INTEGER, mem_bytes INTEGER, fs_capacity_bytes INTEGER, labels TEXT NOT NULL, env_vars TEXT NOT NULL,
    run_config TEXT
) STRICT;
INSERT INTO boxes VALUES ('id-1', 'one', 'stopped', NULL, '2026-01-01T00:00:00.000000Z', '2026-01-01T00:00:00.000000Z', NULL,
    600, 0, 1500, NULL, NULL, '{"a": "b"}', '{}', '{"user": "app"}');
PRAGMA user_version = 1;
"""


def test_a_file_of_the_first_version(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    db = sqlite3.connect(path)
    db.executescript(FIRST)
    db.close()
    store = Store(path)
    [record] = store.load()
    assert (record.id, record.labels, record.run_config, record.snapshot_id) == ("id-1", {"a": "b"}, {"user": "app"}, None)
    snapshot = SnapshotRecord("s", "name", "latest", "ready", "t", "t", tags=["latest"], layers=["layers/a"], labels={"x": "y"})
    store.snapshots.insert(snapshot)
    store.layers.insert(LayerRecord("layers/a", 5, "t"))
    store.registries.insert(RegistryRecord("r", "reg", "url", "t", "t", secret="sealed"))
    store.close()
    again = Store(path)
    assert again.load() == [record]
    assert again.snapshots.load() == [snapshot]
    assert [(layer.name, layer.size) for layer in again.layers.load()] == [("layers/a", 5)]
    assert [registry.secret for registry in again.registries.load()] == ["sealed"]
    again.close()
    db = sqlite3.connect(path)
    assert db.execute("PRAGMA user_version").fetchone() == (SCHEMA_VERSION,)
    db.close()

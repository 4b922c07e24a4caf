"""What the service knows of its sandboxes and snapshots, in SQLite (WAL): a row that was answered for survives kill -9.

Calls are short and made from the event loop; one connection, one thread.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gatewayd.local.clock import Clock
from gatewayd.local.records import LayerRecord, RegistryRecord, SecretRecord, SnapshotRecord
from gatewayd.local.storage import Reserve, has_room
from gatewayd.local.tables import Table

STATUSES = ("provisioning", "ready", "failed", "stopped", "deleting")

_VERSION_1 = (
    """
CREATE TABLE boxes (
    id TEXT PRIMARY KEY,
    name TEXT NOT NULL UNIQUE,
    status TEXT NOT NULL,
    status_message TEXT,
    created_at TEXT NOT NULL,
    updated_at TEXT NOT NULL,
    stopped_at TEXT,
    idle_ttl_seconds INTEGER NOT NULL,
    delete_after_stop_seconds INTEGER NOT NULL,
    millicores INTEGER,
    mem_bytes INTEGER,
    fs_capacity_bytes INTEGER,
    labels TEXT NOT NULL,
    env_vars TEXT NOT NULL,
    run_config TEXT
) STRICT
""",
)
_VERSION_2 = (
    "ALTER TABLE boxes ADD COLUMN snapshot_id TEXT",
    """
CREATE TABLE snapshots (
    id TEXT PRIMARY KEY,
    name TEXT NOT NULL,
    tag TEXT NOT NULL,
    status TEXT NOT NULL,
    created_at TEXT NOT NULL,
    updated_at TEXT NOT NULL,
    status_message TEXT,
    docker_image TEXT,
    image_digest TEXT,
    fs_capacity_bytes INTEGER NOT NULL,
    source_sandbox_id TEXT,
    registry_id TEXT,
    description TEXT,
    labels TEXT NOT NULL,
    tags TEXT NOT NULL,
    run_config TEXT,
    image_config TEXT,
    layers TEXT NOT NULL
) STRICT
""",
    "CREATE TABLE layers (name TEXT PRIMARY KEY, size INTEGER NOT NULL, created_at TEXT NOT NULL) STRICT",
    """
CREATE TABLE registries (
    id TEXT PRIMARY KEY,
    name TEXT NOT NULL UNIQUE,
    url TEXT NOT NULL,
    created_at TEXT NOT NULL,
    updated_at TEXT NOT NULL,
    username TEXT,
    secret TEXT,
    ca TEXT
) STRICT
""",
)
_VERSION_3 = (
    "ALTER TABLE boxes ADD COLUMN proxy_config TEXT",
    "CREATE TABLE secrets (key TEXT PRIMARY KEY, created_at TEXT NOT NULL, sealed TEXT NOT NULL) STRICT",
)
# what makes each version of the file out of the one before; never changed, only added to
MIGRATIONS = (_VERSION_1, _VERSION_2, _VERSION_3)
SCHEMA_VERSION = len(MIGRATIONS)  # PRAGMA user_version of the file


class StoreError(Exception):
    """The state file cannot be used; the message says why."""


@dataclass(frozen=True)
class Record:
    """One sandbox as it is stored. Times are ISO 8601, UTC."""

    id: str  # UUID, for the sandbox's whole life
    name: str  # unique, can be changed
    status: str  # one of STATUSES
    created_at: str
    updated_at: str  # of the last change to any field
    idle_ttl_seconds: int  # 0: never stopped for lack of use
    delete_after_stop_seconds: int  # 0: never deleted by itself
    status_message: str | None = None  # why it failed or stopped by itself, what of its limits is not enforced
    stopped_at: str | None = None  # when it was last stopped; None while it runs
    millicores: int | None = None  # thousandths of a CPU; None: no limit
    mem_bytes: int | None = None  # None: no limit
    fs_capacity_bytes: int | None = None  # as asked for
    labels: Mapping[str, str] = field(default_factory=dict)
    env_vars: Mapping[str, str] = field(default_factory=dict)  # set for every command
    run_config: Mapping[str, Any] | None = None  # user, work_dir, env_vars: a layer below env_vars; begins as the snapshot's
    snapshot_id: str | None = None  # what it was made from; None: the default snapshot
    proxy_config: Mapping[str, Any] | None = None  # as `proxyconfig.stored` makes it; None: every public host, and no rules


def now() -> str:
    """The current time as stored and answered."""
    return Clock().stamp()


class Store:
    """The state file. Raises StoreError when it cannot be opened or is not ours."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.reserve = Reserve(path.parent)  # room for deleting on a full disk
        try:
            self._db = sqlite3.connect(path, isolation_level=None)  # autocommit: each call is one transaction
        except sqlite3.Error as exc:
            raise StoreError(f"cannot open the state file {path.name}: {exc}") from exc
        try:
            self._open()
        except sqlite3.Error as exc:
            self._db.close()
            raise StoreError(f"cannot use the state file {path.name}: {exc}") from exc
        except StoreError:
            self._db.close()
            raise
        self._boxes = Table(self._db, "boxes", Record, ("labels", "env_vars", "run_config", "proxy_config"))
        json_columns = ("labels", "tags", "run_config", "image_config", "layers")
        self.snapshots = Table(self._db, "snapshots", SnapshotRecord, json_columns)
        self.layers = Table(self._db, "layers", LayerRecord)
        self.registries = Table(self._db, "registries", RegistryRecord)
        self.secrets = Table(self._db, "secrets", SecretRecord)

    def _open(self) -> None:
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = NORMAL")  # a killed process loses nothing; a power cut at most the last rows
        (version,) = self._db.execute("PRAGMA user_version").fetchone()
        if version > SCHEMA_VERSION:
            raise StoreError(f"cannot use the state file: it has version {version}, this program knows {SCHEMA_VERSION}")
        if version == SCHEMA_VERSION:
            return
        self._db.execute("BEGIN IMMEDIATE")
        try:
            for statements in MIGRATIONS[version:]:
                for statement in statements:
                    self._db.execute(statement)
            self._db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
            self._db.execute("COMMIT")
        except sqlite3.Error:
            self._db.execute("ROLLBACK")
            raise

    @property
    def folder(self) -> Path:
        """The state directory that the file is in."""
        return self._path.parent

    @property
    def has_room(self) -> bool:
        """Whether the disk under the file has space left."""
        return has_room(self._path.parent)

    def close(self) -> None:
        """Close the file; idempotent."""
        self._db.close()

    def insert(self, record: Record) -> None:
        """Add a sandbox. Raises sqlite3.IntegrityError when its id or name is taken, WriteFailure."""
        self._boxes.insert(record)

    def save(self, record: Record) -> None:
        """Write a known sandbox's row. Raises sqlite3.IntegrityError when its name is taken by another, WriteFailure."""
        self._boxes.save(record)

    def delete(self, box_id: str) -> None:
        """Forget a sandbox; no error when it is not there. Raises WriteFailure."""
        self._boxes.delete(box_id)

    def load(self) -> list[Record]:
        """All sandboxes, oldest first."""
        return self._boxes.load()

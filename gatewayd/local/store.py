"""What the service knows of its sandboxes, in SQLite (WAL): a row that was answered for survives kill -9.

Calls are short and made from the event loop; one connection, one thread.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from gatewayd.local.clock import Clock
from gatewayd.local.storage import Reserve, WriteFailure, has_room

SCHEMA_VERSION = 1  # PRAGMA user_version of the file
STATUSES = ("provisioning", "ready", "failed", "stopped", "deleting")

_SCHEMA = """
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
"""


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
    run_config: Mapping[str, Any] | None = None  # user, work_dir, env_vars: a layer below env_vars


_COLUMNS = tuple(column.name for column in fields(Record))
_JSON = ("labels", "env_vars", "run_config")


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

    def _open(self) -> None:
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = NORMAL")  # a killed process loses nothing; a power cut at most the last rows
        (version,) = self._db.execute("PRAGMA user_version").fetchone()
        if version == 0:
            self._db.execute("BEGIN IMMEDIATE")
            self._db.execute(_SCHEMA)
            self._db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
            self._db.execute("COMMIT")
        elif version != SCHEMA_VERSION:
            raise StoreError(f"cannot use the state file: it has version {version}, this program knows {SCHEMA_VERSION}")

    @property
    def has_room(self) -> bool:
        """Whether the disk under the file has space left."""
        return has_room(self._path.parent)

    def _write(self, statement: str, values: tuple[Any, ...]) -> None:
        try:
            self._db.execute(statement, values)
        except sqlite3.IntegrityError:
            raise
        except sqlite3.Error as exc:
            raise WriteFailure(str(exc)) from exc

    def close(self) -> None:
        """Close the file; idempotent."""
        self._db.close()

    def insert(self, record: Record) -> None:
        """Add a sandbox. Raises sqlite3.IntegrityError when its id or name is taken, WriteFailure."""
        marks = ", ".join("?" * len(_COLUMNS))
        self._write(f"INSERT INTO boxes ({', '.join(_COLUMNS)}) VALUES ({marks})", _row(record))  # noqa: S608 - own constants

    def save(self, record: Record) -> None:
        """Write a known sandbox's row. Raises sqlite3.IntegrityError when its name is taken by another, WriteFailure."""
        sets = ", ".join(f"{column} = ?" for column in _COLUMNS)
        self._write(f"UPDATE boxes SET {sets} WHERE id = ?", (*_row(record), record.id))  # noqa: S608 - own constants

    def delete(self, box_id: str) -> None:
        """Forget a sandbox; no error when it is not there. Raises WriteFailure."""
        self._write("DELETE FROM boxes WHERE id = ?", (box_id,))

    def load(self) -> list[Record]:
        """All sandboxes, oldest first."""
        rows = self._db.execute(f"SELECT {', '.join(_COLUMNS)} FROM boxes ORDER BY created_at, id")  # noqa: S608 - own constants
        return [_record(row) for row in rows]


def _row(record: Record) -> tuple[Any, ...]:
    values = []
    for column in _COLUMNS:
        value = getattr(record, column)
        values.append(json.dumps(value) if column in _JSON and value is not None else value)
    return tuple(values)


def _record(row: tuple[Any, ...]) -> Record:
    values = dict(zip(_COLUMNS, row, strict=True))
    for column in _JSON:
        if values[column] is not None:
            values[column] = json.loads(values[column])
    return Record(**values)

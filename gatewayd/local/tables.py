"""Frozen dataclasses as rows of SQLite tables: one column a field, mappings and sequences as JSON."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable
from dataclasses import fields
from typing import Any, Generic, TypeVar

from gatewayd.local.storage import WriteFailure

T = TypeVar("T")


class Table(Generic[T]):
    """The rows of one kind. Each call is one transaction."""

    def __init__(self, db: sqlite3.Connection, name: str, kind: Callable[..., T], json_columns: tuple[str, ...] = ()) -> None:
        """`kind` is a dataclass whose fields are the columns, the first of them the primary key."""
        self._db = db
        self._name = name
        self._kind = kind
        self._columns = tuple(column.name for column in fields(kind))  # type: ignore[arg-type]  # a dataclass
        self._json = json_columns

    def insert(self, row: T) -> None:
        """Add a row. Raises sqlite3.IntegrityError when its key or another unique value is taken, WriteFailure."""
        marks = ", ".join("?" * len(self._columns))
        self._write(f"INSERT INTO {self._name} ({', '.join(self._columns)}) VALUES ({marks})", self._values(row))  # noqa: S608

    def save(self, row: T) -> None:
        """Write a known row. Raises sqlite3.IntegrityError when a unique value is taken by another, WriteFailure."""
        values = self._values(row)
        sets = ", ".join(f"{column} = ?" for column in self._columns)
        self._write(f"UPDATE {self._name} SET {sets} WHERE {self._columns[0]} = ?", (*values, values[0]))  # noqa: S608

    def delete(self, key: str) -> None:
        """Forget a row; no error when it is not there. Raises WriteFailure."""
        self._write(f"DELETE FROM {self._name} WHERE {self._columns[0]} = ?", (key,))  # noqa: S608 - own constants

    def load(self) -> list[T]:
        """All rows, oldest first."""
        query = f"SELECT {', '.join(self._columns)} FROM {self._name} ORDER BY created_at, {self._columns[0]}"  # noqa: S608
        return [self._row(row) for row in self._db.execute(query)]

    def _write(self, statement: str, values: tuple[Any, ...]) -> None:
        try:
            self._db.execute(statement, values)
        except sqlite3.IntegrityError:
            raise
        except sqlite3.Error as exc:
            raise WriteFailure(str(exc)) from exc

    def _values(self, row: T) -> tuple[Any, ...]:
        found = ((column, getattr(row, column)) for column in self._columns)
        return tuple(json.dumps(value) if column in self._json and value is not None else value for column, value in found)

    def _row(self, row: tuple[Any, ...]) -> T:
        values = dict(zip(self._columns, row, strict=True))
        for column in self._json:
            if values[column] is not None:
                values[column] = json.loads(values[column])
        return self._kind(**values)

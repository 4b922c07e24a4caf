"""Lists a page at a time: a cursor names the last entry of a page by what it is sorted by, so that what is created or deleted
meanwhile neither hides an entry nor repeats one. Pure.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from fastapi.exceptions import RequestValidationError

T = TypeVar("T")

MAX_CURSOR = 1024  # characters


@dataclass(frozen=True)
class Page(Generic[T]):
    """Part of a list."""

    entries: list[T]
    next_cursor: str | None  # None: it is the last
    offset: int  # of the first entry, when asked for by offset


@dataclass(frozen=True)
class Order(Generic[T]):
    """How a list is sorted."""

    by: str  # name of the field
    descending: bool
    value: Callable[[T], str | int | None]  # of the field; None sorts before all others
    identity: Callable[[T], str]  # decides between equal values

    def _key(self, entry: T) -> tuple[Any, ...]:
        return _comparable(self.value(entry), self.identity(entry))

    def page(self, entries: Iterable[T], size: int, *, cursor: str | None = None, offset: int = 0) -> Page[T]:
        """The page behind a cursor, or at an offset.

        Raises:
            RequestValidationError: the cursor is none of ours, or of a list sorted otherwise.
        """
        ordered = sorted(entries, key=self._key, reverse=self.descending)
        if cursor is not None:
            after = self._decoded(cursor)
            offset = 0
            ordered = [entry for entry in ordered if (self._key(entry) < after if self.descending else self._key(entry) > after)]
        found = ordered[offset : offset + size]
        more = offset + size < len(ordered)
        return Page(found, self._encoded(found[-1]) if more and found else None, offset)

    def _encoded(self, entry: T) -> str:
        content = json.dumps([self.by, self.descending, self.value(entry), self.identity(entry)], separators=(",", ":"))
        return base64.urlsafe_b64encode(content.encode()).decode().rstrip("=")

    def _decoded(self, cursor: str) -> tuple[Any, ...]:
        try:
            if len(cursor) > MAX_CURSOR:
                raise ValueError
            by, descending, value, identity = json.loads(base64.urlsafe_b64decode(cursor.encode("ascii") + b"=="))
            if not isinstance(identity, str) or not isinstance(value, str | int | None):
                raise TypeError
        except (ValueError, TypeError, RecursionError) as exc:
            raise invalid("cursor", "is not a next_cursor of this list") from exc
        if (by, descending) != (self.by, self.descending):
            raise invalid("cursor", "belongs to a list that is sorted otherwise")
        return _comparable(value, identity)


def _comparable(value: str | int | None, identity: str) -> tuple[Any, ...]:
    if isinstance(value, str):
        return 2, value, identity
    return (0, 0, identity) if value is None else (1, value, identity)


def invalid(field: str, message: str) -> RequestValidationError:
    """A value of the query that is refused."""
    return RequestValidationError([{"loc": ("query", field), "msg": message, "type": "value_error"}])

"""HTTP byte ranges and validators (RFC 9110 sections 8.8, 13 and 14), pure."""

from __future__ import annotations

import os
import re
from email.utils import formatdate, parsedate_to_datetime

_RANGE = re.compile(r"bytes=\s*(\d{0,18})-(\d{0,18})\s*")


class RangeNotSatisfiable(Exception):
    """The range starts past the end of the file."""


def etag_of(info: os.stat_result) -> str:
    """A strong validator: it changes whenever the file is written or replaced."""
    return f'"{info.st_ino:x}-{info.st_size:x}-{info.st_mtime_ns:x}"'


def last_modified_of(info: os.stat_result) -> str:
    """The modification time as an HTTP date."""
    return formatdate(int(info.st_mtime), usegmt=True)


def unchanged(if_none_match: str | None, etag: str) -> bool:
    """Whether If-None-Match makes the answer 304 (weak comparison, section 13.1.2)."""
    if not if_none_match:
        return False
    tags = [tag.strip().removeprefix("W/") for tag in if_none_match.split(",")]
    return "*" in tags or etag in tags


def range_applies(if_range: str | None, etag: str, info: os.stat_result) -> bool:
    """Whether If-Range lets the range count (strong comparison, section 13.1.5)."""
    if not if_range:
        return True
    if if_range.startswith(('"', "W/")):
        return if_range == etag
    try:
        return parsedate_to_datetime(if_range).timestamp() == int(info.st_mtime)
    except (ValueError, OverflowError):
        return False


def parse_range(header: str | None, size: int) -> tuple[int, int] | None:
    """First byte and the one past the last, or None to send the whole file.

    Other units, several ranges and malformed ones are ignored, as section 14.2 allows.

    Raises:
        RangeNotSatisfiable: nothing of the range lies in the file.
    """
    match = _RANGE.fullmatch(header) if header else None
    if match is None:
        return None
    first, last = match.groups()
    if not first and not last:
        return None
    if not first:
        length = min(int(last), size)
        if not length:
            raise RangeNotSatisfiable
        return size - length, size
    start = int(first)
    if last and int(last) < start:
        return None
    if start >= size:
        raise RangeNotSatisfiable
    return start, min(int(last) + 1, size) if last else size

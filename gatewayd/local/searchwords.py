"""What runs inside a sandbox to search its files, and how its output is read. Pure.

The output is hostile: a name can hold anything but ``/`` and NUL, and the programs may not be what they are called. Paths begin
with ``./`` and never hold two slashes in a row, so ``//`` ends one.
"""

from __future__ import annotations

import re
import stat
from dataclasses import dataclass
from datetime import UTC, datetime

NO_ENTRY, NO_FOLDER, NO_ACCESS, NO_TOOLS = 66, 67, 68, 69  # exit codes of the scripts

_ENTER = f"""
[ -d "$1" ] || {{ [ -e "$1" ] || [ -L "$1" ] || exit {NO_ENTRY}; exit {NO_FOLDER}; }}
cd -- "$1" 2>/dev/null || exit {NO_ACCESS}
"""
# $1 the folder, $2 a folder in it or "", then tests for find
GLOB_SCRIPT = f"""{_ENTER}
command -v find >/dev/null && command -v stat >/dev/null || exit {NO_TOOLS}
[ -z "$2" ] || cd -- "./$2" 2>/dev/null || exit 0
shift 2
exec find . -mindepth 1 "$@" -exec stat -c '%f %s %Y %n//' {{}} + 2>/dev/null
"""
# the same; the words are in $WORDS. What the kernel makes up is not read. The first line says what separates a name from the
# rest: greps that do not know -Z (BusyBox) give way to awk.
GREP_SCRIPT = f"""{_ENTER}
command -v find >/dev/null || exit {NO_TOOLS}
[ -z "$2" ] || cd -- "./$2" 2>/dev/null || exit 0
shift 2
set -- -type f "$@"
[ "$(pwd -P)" != / ] || set -- '(' -path ./proc -o -path ./sys -o -path ./dev ')' -prune -o "$@"
if echo x | grep -qsIZHnF -e x 2>/dev/null; then
  echo grep
  exec find . "$@" -exec grep -sIZHnF -e "$WORDS" -- {{}} + 2>/dev/null
fi
command -v awk >/dev/null || exit {NO_TOOLS}
echo awk
exec find . "$@" -exec awk 'index($0, ENVIRON["WORDS"]) {{ printf "%s//%d:%s\\n", FILENAME, FNR, $0 }}' {{}} + 2>/dev/null
"""

MAX_TEXT = 4096  # bytes of a line that are passed on
_MAX_RECORD = 64 * 1024  # bytes of a record without its text; PATH_MAX is 4096
_ENTRY = re.compile(rb"([0-9a-f]{1,8}) (\d{1,19}) (-?\d{1,12}) \./(.+)", re.DOTALL)
_LINE = re.compile(rb"(\d{1,18}):")


class Garbage(Exception):
    """The output is not what the scripts print."""


@dataclass(frozen=True)
class Entry:
    """A file, folder or anything else that has a name."""

    path: str  # relative to where the search began
    is_dir: bool
    size: int  # bytes
    modified: str | None  # RFC 3339, to the second; None: no time a calendar has


@dataclass(frozen=True)
class Line:
    """A line that has the words."""

    path: str  # relative to where the search began
    number: int  # 1-based
    text: str  # at most MAX_TEXT bytes of it


class EntryParser:
    """The output of GLOB_SCRIPT, as it comes."""

    def __init__(self) -> None:
        self._buffer = b""  # of the record that is not complete

    def feed(self, data: bytes) -> list[Entry]:
        """The entries that are complete now. Raises Garbage."""
        *records, self._buffer = (self._buffer + data).split(b"//\n")
        if len(self._buffer) > _MAX_RECORD:
            raise Garbage
        return [_entry(record) for record in records]


class LineParser:
    """The output of GREP_SCRIPT, as it comes."""

    def __init__(self) -> None:
        self._buffer = b""  # of what is not complete
        self._separator = b""  # behind a name; known after the first line
        self._at = 0  # how much of the buffer is worked off
        self._skipping = False  # the rest of a line that is too long

    def feed(self, data: bytes) -> list[Line]:
        """The lines that are complete now, or long enough. Raises Garbage."""
        self._buffer += data
        self._at = 0
        found: list[Line] = []
        if self._separator or self._header():
            while (line := self._next()) is not None:
                found.append(line)
        self._buffer = self._buffer[self._at :]
        return found

    @property
    def fallback(self) -> bool:
        """It was awk that searched: it may stop at a file that it cannot read."""
        return self._separator == b"//"

    def _header(self) -> bool:
        end = self._buffer.find(b"\n")
        kind = self._buffer[: end if end >= 0 else 5]
        if end < 0 and len(kind) < 5:
            return False
        if kind not in (b"grep", b"awk"):
            raise Garbage
        self._separator = b"\0" if kind == b"grep" else b"//"
        self._at = end + 1
        return True

    def _next(self) -> Line | None:
        buffer = self._buffer
        if self._skipping:
            end = buffer.find(b"\n", self._at)
            self._at = end + 1 if end >= 0 else len(buffer)
            if end < 0:
                return None
            self._skipping = False
        split = buffer.find(self._separator, self._at)
        if split < 0:
            if len(buffer) - self._at > _MAX_RECORD:
                raise Garbage
            return None
        start = split + len(self._separator)
        end = buffer.find(b"\n", start)
        if end < 0 and len(buffer) - start < MAX_TEXT + 20:
            return None  # 20: more than a number takes
        number = _LINE.match(buffer, start)
        if number is None or not buffer.startswith(b"./", self._at):
            raise Garbage
        name = buffer[self._at + 2 : split]
        text = buffer[number.end() : end if end >= 0 else len(buffer)]
        self._skipping = end < 0
        self._at = end + 1 if end >= 0 else len(buffer)
        return Line(_text(name), int(number[1]), _text(text[:MAX_TEXT]))


def _entry(record: bytes) -> Entry:
    match = _ENTRY.fullmatch(record)
    if match is None:
        raise Garbage
    mode, size, modified, name = match.groups()
    return Entry(_text(name), stat.S_ISDIR(int(mode, 16)), int(size), _time(int(modified)))


def _time(seconds: int) -> str | None:
    try:
        return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    except (ValueError, OverflowError, OSError):
        return None


def _text(data: bytes) -> str:
    """What is not UTF-8 becomes U+FFFD: JSON has no other way to carry it."""
    return data.decode("utf-8", "replace")

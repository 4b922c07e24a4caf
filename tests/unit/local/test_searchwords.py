"""The output of searches: whole, byte by byte, and hostile; and the scripts themselves, on this machine's own tools."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from gatewayd.local.searchwords import GREP_SCRIPT, MAX_TEXT, Entry, EntryParser, Garbage, Line, LineParser

ENTRIES = b"41ed 4096 1700000000 ./a dir//\n81a4 5 -1 ./a dir/new\nline//\n81a4 7 999999999999 ./\xff//\n"


def test_entries() -> None:
    expected = [
        Entry("a dir", True, 4096, "2023-11-14T22:13:20Z"),
        Entry("a dir/new\nline", False, 5, "1969-12-31T23:59:59Z"),
        Entry("\ufffd", False, 7, None),
    ]
    assert EntryParser().feed(ENTRIES) == expected
    parser = EntryParser()
    assert [entry for byte in ENTRIES for entry in parser.feed(bytes([byte]))] == expected


@pytest.mark.parametrize(
    "data", [b"//\n", b"81a4 5 0 a//\n", b"zz 5 0 ./a//\n", b"81a4 -5 0 ./a//\n", b"x" * 70000, b"81a4 5 0 ./" + b"/\n" * 40000]
)
def test_entries_that_are_none(data: bytes) -> None:
    with pytest.raises(Garbage):
        EntryParser().feed(data)


LONG = b"y" * (3 * MAX_TEXT)


@pytest.mark.parametrize(("kind", "end"), [(b"grep", b"\0"), (b"awk", b"//")])
def test_lines(kind: bytes, end: bytes) -> None:
    data = kind + b"\n./a" + end + b"1:text: with // and \xff\n./new\nline" + end + b"22:" + LONG + b"\n./b" + end + b"3:\n"
    expected = [
        Line("a", 1, "text: with // and \ufffd"),
        Line("new\nline", 22, "y" * MAX_TEXT),
        Line("b", 3, ""),
    ]
    for size in (1, 7, 1000, len(data)):
        parser = LineParser()
        assert [line for at in range(0, len(data), size) for line in parser.feed(data[at : at + size])] == expected
        assert parser.fallback == (kind == b"awk")


@pytest.mark.parametrize(
    "data",
    [b"sed\n", b"x" * 10, b"grep\n/etc\0001:x\n", b"grep\n./a\000x\n", b"grep\n" + b"x" * 70000, b"awk\n./a//1" + b"1" * 5000],
)
def test_lines_that_are_none(data: bytes) -> None:
    with pytest.raises(Garbage):
        LineParser().feed(data)


@pytest.mark.parametrize("fallback", [False, True])
def test_both_ways_to_search_find_the_same(tmp_path: Path, fallback: bool) -> None:
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("sh", "find", "awk", "grep"):
        found = next(Path(folder) / name for folder in ("/usr/bin", "/bin") if (Path(folder) / name).exists())
        if name != "grep" or not fallback:
            (tools / name).symlink_to(found)
    files = tmp_path / "files"
    (files / "sub=x").mkdir(parents=True)
    (files / "a").write_bytes(b"one\nw*rds [here]\n\xff w*rds [here]\n")
    (files / "sub=x" / "new\nline:1").write_bytes(b"w*rds [here] without end")
    (files / b"\xff.txt".decode("utf-8", "surrogateescape")).write_bytes(b"W*rds [here]\nwxrds [here]\n")
    ran = subprocess.run(
        ["/bin/sh", "-c", GREP_SCRIPT, "sh", str(files), "", "-name", "*"],
        env={"PATH": str(tools), "WORDS": "w*rds [here]", "LC_ALL": "C"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=True,
    )
    parser = LineParser()
    assert sorted(parser.feed(ran.stdout), key=lambda line: (line.path, line.number)) == [
        Line("a", 2, "w*rds [here]"),
        Line("a", 3, "\ufffd w*rds [here]"),
        Line("sub=x/new\nline:1", 1, "w*rds [here] without end"),
    ]
    assert parser.fallback is fallback
    assert os.listdir(files)  # noqa: PTH208 - nothing was written

"""Byte ranges and validators."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gatewayd.local.ranges import RangeNotSatisfiable, etag_of, last_modified_of, parse_range, range_applies, unchanged


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        (None, None),
        ("bytes=0-0", (0, 1)),
        ("bytes=0-", (0, 10)),
        ("bytes=3-5", (3, 6)),
        ("bytes=3-500", (3, 10)),
        ("bytes=-3", (7, 10)),
        ("bytes=-300", (0, 10)),
        ("bytes=5-3", None),
        ("bytes=-", None),
        ("bytes=0-1,3-4", None),
        ("lines=0-1", None),
        ("bytes=a-b", None),
    ],
)
def test_ranges_of_ten_bytes(header: str | None, expected: tuple[int, int] | None) -> None:
    assert parse_range(header, 10) == expected


@pytest.mark.parametrize("header", ["bytes=10-", "bytes=10-20", "bytes=-0"])
def test_ranges_outside(header: str) -> None:
    with pytest.raises(RangeNotSatisfiable):
        parse_range(header, 10)


@given(st.text(alphabet="bytes=-0123456789, ", max_size=30), st.integers(0, 1000))
def test_any_range_lies_in_the_file(header: str, size: int) -> None:
    try:
        found = parse_range(header, size)
    except RangeNotSatisfiable:
        return
    assert found is None or 0 <= found[0] < found[1] <= size


def test_validators(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"one")
    first = path.stat()
    os.utime(path, ns=(first.st_atime_ns, first.st_mtime_ns + 1))
    second = path.stat()
    assert etag_of(first) != etag_of(second)
    assert unchanged(etag_of(first), etag_of(first))
    assert unchanged(f'"x", W/{etag_of(first)}', etag_of(first))
    assert unchanged("*", etag_of(first))
    assert not unchanged(etag_of(first), etag_of(second))
    assert not unchanged(None, etag_of(first))
    assert range_applies(None, etag_of(first), first)
    assert range_applies(etag_of(first), etag_of(first), first)
    assert not range_applies(f"W/{etag_of(first)}", etag_of(first), first)
    assert range_applies(last_modified_of(first), etag_of(first), first)
    assert not range_applies("Mon, 01 Jan 2001 00:00:00 GMT", etag_of(first), first)
    assert not range_applies("nonsense", etag_of(first), first)

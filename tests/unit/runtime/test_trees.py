"""Copies of trees: what is in them, and what large files cost."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from gatewayd.local.runtime.inside import trees

SIZES = ((1 << 63) - 1, (1 << 43) + 1)  # bytes: what the kernel can count, and what every file system of ours takes


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """A tree, and where its copy goes."""
    for name in ("source", "target"):
        (tmp_path / name).mkdir()
    return tmp_path / "source", tmp_path / "target"


@contextmanager
def opened(*paths: Path) -> Iterator[list[int]]:
    fds = [os.open(path, os.O_RDONLY) for path in paths]
    try:
        yield fds
    finally:
        for fd in fds:
            os.close(fd)


def copy(source: Path, target: Path) -> int:
    """Copy the tree; returns the bytes of content copied."""
    with opened(source, target) as fds:
        made = trees.TreeCopy(*fds)
        try:
            made.update(last=True)
        finally:
            made.close()
    return made.bytes


def stretch(path: Path) -> int:
    """Make a file as large as it can be; returns its size."""
    for size in SIZES:
        try:
            os.truncate(path, size)
        except OSError:
            continue
        return size
    pytest.skip("this file system has no large files")


def test_huge_holes_cost_nothing(folders: tuple[Path, Path]) -> None:
    source, target = folders
    places = (0, (1 << 40) + 4096, (1 << 42) - 3)
    with (source / "sparse").open("wb") as file:
        for place in places:
            file.seek(place)
            file.write(b"here")
    (source / "empty").touch()
    sizes = {name: stretch(source / name) for name in ("sparse", "empty")}
    with opened(source / "sparse", source / "empty") as (sparse, empty):
        assert len(list(trees._parts(sparse, sizes["sparse"]))) == len(places)
        assert list(trees._parts(empty, sizes["empty"])) == []
    copy(source, target)
    for name, size in sizes.items():
        assert (target / name).stat().st_size == size
        assert (target / name).stat().st_blocks <= (source / name).stat().st_blocks
    with (target / "sparse").open("rb") as file:
        for place in places:
            file.seek(place)
            assert file.read(4) == b"here"


def test_a_large_file_arrives_whole(folders: tuple[Path, Path]) -> None:
    source, target = folders
    content = os.urandom(1 << 20) * 70 + b"end"
    (source / "large").write_bytes(content)
    (source / "large").chmod(0o640)
    assert copy(source, target) >= len(content)
    assert (target / "large").read_bytes() == content
    assert (target / "large").stat().st_mode == (source / "large").stat().st_mode
    assert (target / "large").stat().st_mtime_ns == (source / "large").stat().st_mtime_ns

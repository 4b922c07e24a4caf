"""Archives become layers: what they hold is where it belongs, whatever they claim."""

from __future__ import annotations

import asyncio
import io
import os
import stat
import subprocess
import tarfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from gatewayd.local.runtime import idmap, layers
from gatewayd.local.runtime.base import BoxSpec, RuntimeFailure, SpawnSpec
from gatewayd.local.runtime.native import NativeRuntime

IDS = idmap.current()
needs_mapping = pytest.mark.skipif(IDS.method == "single", reason="this user has no range of ids in /etc/subuid")
pytestmark = needs_mapping


class Archive:
    """A tar file being made, entry by entry."""

    def __init__(self) -> None:
        self._file = io.BytesIO()
        self._tar = tarfile.open(fileobj=self._file, mode="w", format=tarfile.PAX_FORMAT)  # noqa: SIM115 - closed by save

    def add(self, name: str, kind: bytes = tarfile.REGTYPE, content: bytes = b"", **fields: object) -> Archive:
        info = tarfile.TarInfo(name)
        info.type, info.size, info.mode = kind, len(content), 0o755 if kind == tarfile.DIRTYPE else 0o644
        for field, value in fields.items():
            setattr(info, field, value)
        self._tar.addfile(info, io.BytesIO(content))
        return self

    def save(self, path: Path) -> Path:
        self._tar.close()
        path.write_bytes(self._file.getvalue())
        return path


@pytest.fixture
def work() -> Iterator[Path]:
    """A folder that a sandbox's root can reach through, removed with everybody's files."""
    path = Path("/var/tmp" if os.getuid() == 0 else Path.home()) / f"layers-{os.getpid()}-{os.urandom(4).hex()}"
    path.mkdir(mode=0o711)
    yield path
    remover = ["rm", "-rf", str(path)]
    if os.getuid() != 0:
        remover = ["unshare", "--user", "--map-root-user", "--map-auto", "--", *remover]
    subprocess.run(remover, check=True)


async def fill(work: Path, archive: Archive, name: str = "layer", lower: list[Path] | None = None) -> Path:
    """Unpack into a new folder of `work`; returns the folder with the files."""
    folder = work / name
    made = [folder] if lower is None else [folder, folder / "upper", folder / "work"]
    for path in made:
        path.mkdir()
        os.chown(path, IDS.root_uid, IDS.root_gid)
    with archive.save(work / f"{name}.tar").open("rb") as file:
        await layers.unpack(file, folder, IDS, lower=[str(path) for path in lower or []])
    return folder if lower is None else folder / "upper"


async def test_files_links_modes_and_owners_arrive(work: Path) -> None:
    archive = (
        Archive()
        .add("./", tarfile.DIRTYPE, mode=0o755)
        .add("./bin", tarfile.SYMTYPE, linkname="usr/bin")
        .add("usr/bin", tarfile.DIRTYPE)
        .add("bin/tool", content=b"#!", mode=0o4755)  # through the link, within the image
        .add("usr/bin/same", tarfile.LNKTYPE, linkname="bin/tool")
        .add("home/u/note", content=b"hi", uid=1000, gid=1000, mtime=1_000_000_000, mode=0o600)
        .add("pipe", tarfile.FIFOTYPE)
        .add("abs", tarfile.SYMTYPE, linkname="/etc/shadow")
        .add("dev/null", tarfile.CHRTYPE, devmajor=1, devminor=3)
    )
    root = await fill(work, archive)
    tool = (root / "usr/bin/tool").lstat()
    assert stat.S_IMODE(tool.st_mode) == 0o4755
    assert (root / "usr/bin/same").lstat().st_ino == tool.st_ino
    note = (root / "home/u/note").lstat()
    assert (note.st_mtime, stat.S_IMODE(note.st_mode)) == (1_000_000_000, 0o600)
    inside = {row[0]: row[1] for row in IDS.uid}
    assert tool.st_uid == inside[0]
    assert note.st_uid == (inside[0] + 1000 if 1 not in inside else inside[1] + 999)
    assert (root / "abs").is_symlink()
    assert stat.S_ISFIFO((root / "pipe").lstat().st_mode)
    assert not os.path.lexists(root / "dev/null")


HOSTILE = {
    "dot-dot": Archive().add("../escaped", content=b"x"),
    "dot-dot within": Archive().add("a/../../escaped", content=b"x"),
    "hard link out": Archive().add("a", tarfile.LNKTYPE, linkname="../../etc/passwd"),
    "hard link to nothing": Archive().add("a", tarfile.LNKTYPE, linkname="/etc/passwd"),
    "long name": Archive().add("n" * 300, content=b"x"),
    "long path": Archive().add("/".join(["d" * 200] * 30), content=b"x"),
    "ids": Archive().add("a", content=b"x", uid=70_000),
    "whiteout of the parent": Archive().add("a/.wh...", content=b""),
    "file as folder": Archive().add("a", content=b"x").add("a/b", content=b"x"),
    "unknown type": Archive().add("a", b"Z"),
}


@pytest.mark.parametrize("name", HOSTILE)
async def test_hostile_entries_are_refused(work: Path, name: str) -> None:
    before = sorted(work.parent.iterdir())
    with pytest.raises(RuntimeFailure, match="cannot unpack the image"):
        await fill(work, HOSTILE[name])
    assert sorted(work.parent.iterdir()) == before
    assert not (work / "escaped").exists()


@pytest.mark.parametrize("mtime", [1e300, -1e300, float("inf"), float("nan")])
@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.DIRTYPE])
async def test_a_time_that_no_file_can_have_is_refused(work: Path, kind: bytes, mtime: float) -> None:
    archive = Archive().add("when", kind, pax_headers={"mtime": str(mtime)})
    with pytest.raises(RuntimeFailure, match=r"cannot unpack the image.*cannot read the archive: (Overflow|Value)Error"):
        await fill(work, archive)


async def test_links_lead_nowhere_else(work: Path) -> None:
    victim = work / "victim"
    victim.mkdir(mode=0o777)
    victim.chmod(0o777)
    archive = (
        Archive()
        .add("out", tarfile.SYMTYPE, linkname=str(victim))
        .add("up", tarfile.SYMTYPE, linkname="../../../../../../../../" + str(victim))
        .add("loop", tarfile.SYMTYPE, linkname="loop")
    )
    for link in ("out", "up", "loop"):
        archive.add(f"{link}/file", content=b"x")
    with pytest.raises(RuntimeFailure, match="cannot unpack"):
        await fill(work, archive)
    assert list(victim.iterdir()) == []


async def test_garbage_and_truncated_archives_are_refused(work: Path) -> None:
    good = Archive().add("a", content=os.urandom(100_000)).save(work / "good.tar").read_bytes()
    for number, content in enumerate((b"", b"garbage" * 1000, good[:50_000], b"\x1f\x8b" + os.urandom(5000))):
        folder = work / f"f{number}"
        folder.mkdir()
        os.chown(folder, IDS.root_uid, IDS.root_gid)
        path = work / f"{number}.tar"
        path.write_bytes(content)
        with path.open("rb") as file, pytest.raises(RuntimeFailure, match="cannot unpack the image"):
            await layers.unpack(file, folder, IDS)


async def test_a_header_that_claims_any_size_costs_no_memory(work: Path) -> None:
    info = tarfile.TarInfo("pax")
    info.type, info.size = tarfile.XHDTYPE, 1 << 40
    path = work / "pax.tar"
    path.write_bytes(info.tobuf() + b"x" * 10240)
    (work / "f").mkdir()
    os.chown(work / "f", IDS.root_uid, IDS.root_gid)
    with path.open("rb") as file, pytest.raises(RuntimeFailure, match="cannot unpack the image"):
        await layers.unpack(file, work / "f", IDS)


async def test_whiteouts_hide_what_lies_below(work: Path) -> None:
    below = await fill(
        work,
        Archive().add("etc/a", content=b"1").add("etc/b", content=b"1").add("opt/x/y", content=b"1").add("opt/z", content=b"1"),
        "below",
    )
    upper = await fill(
        work,
        Archive()
        .add("etc/.wh.a")
        .add("etc/c", content=b"2")
        .add("opt/new", content=b"2")
        .add("opt/.wh..wh..opq")
        .add("etc/.wh.c"),  # of its own layer: does not count
        "upper",
        [below],
    )
    assert sorted(entry.name for entry in (below / "etc").iterdir()) == ["a", "b"]  # the layer below is as it was
    hidden = (upper / "etc/a").lstat()
    assert stat.S_ISCHR(hidden.st_mode), "a whiteout of the overlay"
    assert (upper / "etc/c").read_bytes() == b"2"
    assert (upper / "opt/new").read_bytes() == b"2"
    assert not os.path.lexists(upper / "etc/b")
    assert stat.S_ISCHR((upper / "opt/z").lstat().st_mode)


async def test_sparse_files_stay_sparse(work: Path) -> None:
    root = await fill(work, Archive().add("big", content=b"\0" * (32 << 20) + b"end"))
    info = (root / "big").stat()
    assert info.st_size == (32 << 20) + 3
    assert info.st_blocks * 512 < 2 << 20


@asynccontextmanager
async def runtime(state: Path, base: Path) -> AsyncIterator[NativeRuntime]:
    made = NativeRuntime(state, base)
    try:
        yield made
    finally:
        await made.aclose()


async def test_a_sandbox_on_an_archive_has_only_what_is_in_it(work: Path) -> None:
    busybox = Path("/bin/busybox")  # Debian's busybox-static
    if not busybox.exists():
        pytest.skip("busybox is not installed (apt-get install busybox-static)")
    archive = Archive().add("bin/busybox", content=busybox.read_bytes(), mode=0o755)
    for name in ("sh", "sleep", "ls", "cat"):
        archive.add(f"bin/{name}", tarfile.SYMTYPE, linkname="busybox")
    for folder in ("dev", "proc", "run", "tmp", "root"):
        archive.add(folder, tarfile.DIRTYPE)
    archive.add("etc/passwd", content=b"root:x:0:0:root:/root:/bin/sh\n")
    state = work / "state"
    state.mkdir(mode=0o700)
    base = archive.save(work / "tiny.tar")
    async with runtime(state, base) as native:
        boxes = await asyncio.gather(*(native.start(BoxSpec(f"b{number}", f"b{number}")) for number in range(3)))
        process = await boxes[0].spawn(SpawnSpec(["/bin/sh", "-c", "ls /; ls /usr 2>&1"]))
        async with asyncio.timeout(20):
            assert await process.exited != 0
        os.set_blocking(process.stdout, True)
        listed = os.read(process.stdout, 65536).decode().split("\n")
        assert {"bin", "etc", "root"} <= set(listed)
        assert "home" not in listed
        for fd in (process.stdin, process.stdout, process.stderr):
            if fd is not None:
                os.close(fd)
        for box in boxes:
            await box.stop()
    assert [entry.name for entry in (state / "bases").iterdir() if not entry.name.startswith("tar-")] == []


async def test_a_bad_archive_leaves_nothing(work: Path) -> None:
    state = work / "state"
    state.mkdir(mode=0o700)
    base = Archive().add("bin/sh", content=b"x").save(work / "bad.tar")
    async with runtime(state, base) as native:
        with pytest.raises(RuntimeFailure, match="no folder /dev"):
            await native.start(BoxSpec("b", "b"))
    assert list((state / "bases").iterdir()) == []

"""Archives that are unpacked on the way: skopeo is ended before they fill the disk, whichever of its runs unpacks them."""

from __future__ import annotations

import asyncio
import os
import tarfile
import threading
import zlib
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from gatewayd.local.oci import ImageError
from gatewayd.local.references import parse
from gatewayd.local.skopeo import Access, Bounds, Skopeo
from gatewayd.local.storage import ADVICE

MIB = 1 << 20
DEADLINE = 15.0  # seconds
TOO_LARGE = "larger than it may be"


def gzipped() -> Iterator[bytes]:
    """A compressed archive that never ends: all of it is decompressed before anything of it is looked at."""
    packer = zlib.compressobj(1, zlib.DEFLATED, 31)
    yield from (packer.compress(_entry(f"f{number}")) + packer.flush(zlib.Z_SYNC_FLUSH) for number in range(1 << 20))


def packed() -> Iterator[bytes]:
    """An archive that never ends, as it is."""
    yield from (_entry(f"f{number}") for number in range(1 << 20))


def _entry(name: str) -> bytes:
    info = tarfile.TarInfo(name)
    info.size = MIB
    return info.tobuf() + bytes(MIB)


@pytest.fixture(params=[("docker-archive", gzipped), ("oci-archive", packed)], ids=lambda param: param[0])
def unending(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """How to ask for an archive that does not end before its reader does."""
    transport: str
    make: Callable[[], Iterator[bytes]]
    transport, make = request.param
    pipe = tmp_path / "image.tar"
    os.mkfifo(pipe)
    keeper = os.open(pipe, os.O_RDWR)  # so that the writer can begin at once; closed when the reader has ended
    stop = threading.Event()

    def write() -> None:
        fd = os.open(pipe, os.O_WRONLY)
        try:
            for data in make():
                view = memoryview(data)
                while view:
                    view = view[os.write(fd, view) :]
                if stop.is_set():
                    return
        except BrokenPipeError:  # the reader has ended
            return
        finally:
            os.close(fd)

    writer = threading.Thread(target=write)
    writer.start()
    yield f"{transport}:{pipe}"
    stop.set()
    os.close(keeper)
    writer.join(DEADLINE)
    assert not writer.is_alive()


@pytest.mark.parametrize("run", ["inspect", "copy"])
@pytest.mark.parametrize(("room", "message"), [(1 << 40, TOO_LARGE), (0, ADVICE)], ids=["limit", "disk"])
async def test_an_archive_is_not_unpacked_without_end(unending: str, tmp_path: Path, run: str, room: int, message: str) -> None:
    folder = tmp_path / "build"
    folder.mkdir()
    skopeo = Skopeo(folder, parse(unending), Access(), {})
    bounds = Bounds(32 * MIB if message is TOO_LARGE else 1 << 40, lambda: room)
    if run == "inspect":
        answer: Awaitable[object] = skopeo.manifest(bounds)
    else:
        answer = skopeo.copy("", folder / "oci", lambda _: None, 1 << 40, bounds)
    with pytest.raises(ImageError, match=message):
        await asyncio.wait_for(answer, DEADLINE)

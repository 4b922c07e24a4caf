"""What only the gVisor runtime can get wrong: the daemon's settings. The rest is `test_runtime.py`, which runs on it too."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from gatewayd.local.runtime.base import BoxSpec, RuntimeFailure
from gatewayd.local.runtime.gvisor import ARGUMENTS, RUNSC, GvisorRuntime

from . import dockerd
from .conftest import clear, run


@pytest.fixture
def other_socket(request: pytest.FixtureRequest) -> Iterator[Path]:
    """A daemon with the runtimes that the test names."""
    try:
        with dockerd.private(request.param) as path:
            yield path
    except dockerd.Unavailable as exc:
        pytest.skip(str(exc))


def needs_runsc() -> pytest.MarkDecorator:
    return pytest.mark.skipif(dockerd.RUNSC_PATH is None, reason="needs gVisor: install runsc, or `make runsc` (needs Go)")


@pytest.mark.parametrize("other_socket", [{}], indirect=True)
async def test_a_daemon_without_gvisor_is_told(other_socket: Path, tmp_path: Path) -> None:
    runtime = GvisorRuntime(tmp_path, other_socket)
    assert runtime.name == "runsc"
    finding = next(finding for finding in await runtime.check() if finding.what == "runsc")
    assert (finding.ok, bool(finding.remedy)) == (False, True)
    with pytest.raises(RuntimeFailure, match="no runtime 'runsc'"):
        await runtime.start(BoxSpec("box", "boxy"))
    assert await runtime.disks() == set()
    await runtime.aclose()


@needs_runsc()
@pytest.mark.parametrize("other_socket", [{RUNSC: ARGUMENTS[1:]}], indirect=True)
async def test_a_gvisor_that_would_forget_files_is_refused(other_socket: Path, tmp_path: Path) -> None:
    runtime = GvisorRuntime(tmp_path, other_socket)
    missing = {finding.what: finding.remedy for finding in await runtime.check() if finding.what in ("runsc", "files", "::1")}
    assert [what for what, remedy in missing.items() if remedy] == ["files"]
    assert "runsc install -- --overlay2=none --network=none" in missing["files"]
    with pytest.raises(RuntimeFailure, match=r"without --overlay2=none.*`runsc install"):
        await runtime.start(BoxSpec("box", "boxy"))
    assert await runtime.disks() == set()
    await runtime.aclose()


@needs_runsc()
async def test_the_kernel_is_gvisors(gvisor_socket: Path, tmp_path: Path) -> None:
    runtime = GvisorRuntime(tmp_path, gvisor_socket)
    well = {finding.what for finding in await runtime.check() if finding.ok}
    assert {"runsc", "files", "::1"} <= well
    box = await runtime.start(BoxSpec("box", "boxy"))
    try:
        ran = await run(box, "dmesg")  # gVisor's, which jokes; this machine's cannot be read from a sandbox
        assert b"Starting gVisor" in ran.out
        assert Path("/proc/version").read_bytes() != (await run(box, "cat", "/proc/version")).out
    finally:
        await box.stop(grace=0.1)
        await clear(runtime)

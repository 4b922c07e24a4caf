"""gVisor where there is none: the runtime says so. (Where there is one, `test_runtime.py` runs on it.)"""

from __future__ import annotations

from pathlib import Path

import pytest

from gatewayd.local.runtime.base import BoxSpec, RuntimeFailure
from gatewayd.local.runtime.docker_api import DockerApi
from gatewayd.local.runtime.gvisor import RUNSC, GvisorRuntime

from .conftest import HAVE_RUNSC


async def test_a_daemon_without_gvisor_is_told(docker_socket: Path, tmp_path: Path) -> None:
    info = await DockerApi(docker_socket).request("ask Docker", "GET", "/info")
    if RUNSC in info["Runtimes"]:
        pytest.skip("this daemon has gVisor")
    runtime = GvisorRuntime(tmp_path, docker_socket)
    assert runtime.name == "runsc"
    finding = next(finding for finding in await runtime.check() if finding.what == "runsc")
    assert (finding.ok, bool(finding.remedy)) == (False, True)
    with pytest.raises(RuntimeFailure, match="no runtime 'runsc'"):
        await runtime.start(BoxSpec("box", "boxy"))
    assert await runtime.disks() == set()
    await runtime.aclose()


def test_the_conformance_suite_runs_on_gvisor() -> None:
    if not HAVE_RUNSC:
        pytest.skip("runsc is not installed: the conformance suite does not run on gVisor here")

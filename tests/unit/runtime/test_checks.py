"""What the runtime says about this machine."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from gatewayd.local.runtime import checks, idmap
from gatewayd.local.runtime.native import NativeRuntime

from .conftest import needs_bubblewrap


@needs_bubblewrap
async def test_a_machine_that_runs_sandboxes_says_so(runtime: NativeRuntime, tmp_path: Path) -> None:
    found = {finding.what: finding for finding in await runtime.check()}
    assert list(found) == [
        *("user namespaces", "overlay", "bubblewrap", "id mapping", "control groups", "disk limits", "seccomp", "network"),
    ]
    for what in ("user namespaces", "overlay", "bubblewrap"):
        assert found[what].ok, found[what]
    for finding in found.values():
        assert finding.detail
        assert bool(finding.remedy) is not finding.ok
        assert str(tmp_path) not in finding.detail
    assert list((tmp_path / "state").iterdir()) == []  # the trials left nothing


async def test_what_is_missing_comes_with_a_remedy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(checks, "SEARCH", str(tmp_path))
    monkeypatch.setattr(os, "uname", lambda: os.uname_result(("Linux", "n", "6", "v", "riscv64")))
    single = idmap.IdMap("single", ((0, 1001, 1),), ((0, 1001, 1),))
    found = {finding.what: finding for finding in await checks.examine(tmp_path, single, {"pids"})}
    assert not any(finding.ok for finding in found.values())
    assert all(finding.remedy for finding in found.values())
    assert found["bubblewrap"].remedy == "apt-get install bubblewrap"
    assert found["control groups"].detail == "not enforced: mem_bytes, vcpus"
    assert "riscv64" in found["seccomp"].detail

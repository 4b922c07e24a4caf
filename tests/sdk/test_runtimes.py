"""Choosing a runtime, and what it says of the machine."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.sdk.conftest import Service


def run_local(*args: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "gatewayd", "local", *args],
        capture_output=True,
        text=True,
        timeout=30,
        stdin=subprocess.DEVNULL,
        env={**os.environ, **env},
        check=False,
    )


def test_what_the_machine_offers(tmp_path: Path) -> None:
    ran = run_local("--check", "--state-dir", str(tmp_path))
    lines = ran.stdout.splitlines()
    assert any(line.split(maxsplit=1)[1].startswith("bubblewrap") for line in lines)
    assert ran.returncode == (1 if any(line.startswith("MISSING") for line in lines) else 0)
    assert not any(tmp_path.iterdir())
    without = run_local("--check", "--state-dir", str(tmp_path), "--runtime", "docker", DOCKER_HOST="unix:///nowhere")
    assert without.returncode in (0, 1)
    assert without.stdout
    assert "Traceback" not in without.stderr


def test_a_state_directory_keeps_its_runtime(own_service: Callable[..., Service], name: str) -> None:
    service = own_service()
    with service.client() as client:
        client.create_sandbox(name=name)
    service.stop()
    other = run_local("--state-dir", str(service.state_dir), "--runtime", "docker")
    assert other.returncode == 72
    assert "--runtime native" in other.stderr
    service = own_service()
    with service.client() as client:
        client.delete_sandbox(name)


@pytest.mark.parametrize("args", [["--runtime", "other", "--check"], []])
def test_usage(args: list[str]) -> None:
    assert run_local(*args).returncode == 2

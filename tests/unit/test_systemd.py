"""The user units, judged by systemd itself."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from gatewayd import api

UNITS = Path(__file__).resolve().parents[2] / "systemd"


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
def test_systemd_has_nothing_to_say(tmp_path: Path) -> None:
    """`verify` exits 0 on unknown keys: any word on stderr is a failure."""
    program = tmp_path / ".local/bin/gatewayd"
    program.parent.mkdir(parents=True)
    program.symlink_to(Path(sys.executable).parent / "gatewayd")
    (tmp_path / "run").mkdir(mode=0o700)
    done = subprocess.run(
        ["systemd-analyze", "--user", "verify", *sorted(str(path) for path in UNITS.iterdir())],
        env={"PATH": os.environ["PATH"], "HOME": str(tmp_path), "XDG_RUNTIME_DIR": str(tmp_path / "run")},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_sockets_are_those_of_the_contract() -> None:
    text = (UNITS / "gatewayd.socket").read_text()
    for name in (api.CONTROL_SOCKET, api.CONNECT_SOCKET):
        assert f"ListenStream=%t/gatewayd/{name}\n" in text
    assert "SocketMode=0600" in text
    assert "DirectoryMode=0700" in text

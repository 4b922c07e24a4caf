"""What runs in a sandbox while the gateway is replaced by its next version."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from .conftest import BIN, Gateway, make

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).parents[2]


def test_exec_ps_and_attach_outlive_an_upgrade(own_gateway: Gateway) -> None:
    gateway = own_gateway
    installed = gateway.root / "installed"
    for package in ("gatewayd", "client"):
        shutil.copytree(ROOT / package, installed / package, ignore=shutil.ignore_patterns("__pycache__"))
    gateway.env["PYTHONPATH"] = str(installed)
    name = make(gateway, "busy")
    command = 'echo ready; read word; echo "got $word"; exit 3'
    gateway.sandbox("exec", "--detach", name, "--", "sh", "-c", "until [ -e /root/go ]; do sleep 0.05; done; echo gone; exit 4")
    attended = subprocess.Popen(
        [BIN / "sandbox", "exec", name, "--", "sh", "-c", command],
        env=gateway.env,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert attended.stdout is not None
    assert attended.stdout.readline() == b"ready\n"

    with (installed / "gatewayd" / "guest" / "guest.py").open("a") as guest:
        guest.write("# the next version\n")
    os.kill(gateway.daemon_pid, signal.SIGKILL)
    output, complaints = attended.communicate(b"all of it\n", timeout=60)
    assert (output, attended.returncode) == (b"got all of it\n", 3), complaints
    assert gateway.sh(name, "ls -d /tmp/.gatewayd-guest-* | wc -l").strip() == "2"

    new = gateway.json("exec", "--detach", name, "--", "sleep", "1000")["session"]
    sessions = [item["id"] for item in gateway.json("ps", name)["sessions"]]
    assert len(sessions) == 2
    assert sessions[1].startswith(new)
    gateway.sh(name, "touch /root/go")
    assert gateway.sandbox("attach", name, sessions[0], code=4).stdout == "gone\n"
    assert [item["id"] for item in gateway.json("ps", name)["sessions"]] == sessions[1:]

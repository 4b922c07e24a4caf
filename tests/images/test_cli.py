"""The command line builds, captures and deletes: a private registry, passwords from everywhere, a whole Debian."""

from __future__ import annotations

import json
import os
import pty
import subprocess
from typing import TYPE_CHECKING

import pytest

from tests.e2e.conftest import BIN, gateway
from tests.e2e.images import PLAIN, missing, root_filesystem
from tests.images.maker import Image
from tests.images.registry import PASSWORD, USER

if TYPE_CHECKING:
    from tests.e2e.conftest import Gateway
    from tests.images.registry import Authority, Registry

__all__ = ["gateway"]


@pytest.mark.e2e
@pytest.mark.skipif(bool(missing), reason="mmdebstrap is not installed")
def test_a_debian_without_python(gateway: Gateway, private: Registry, authority: Authority) -> None:
    debian = Image([root_filesystem(PLAIN).read_bytes()], {"Env": ["STAGE=image"]}, compression="zstd")
    image = private.push(debian, "base/debian:12")
    build = ("snapshot", "build", "debian:12", image, "--registry-username", USER, "--registry-ca", str(authority.ca))
    missing_one = gateway.sandbox("snapshot", "build", "none", image, "--registry-ca", str(authority.ca), code=1)
    assert "refuses the credentials, or wants some" in missing_one.stderr
    wrong = gateway.sandbox(*build, "--registry-password-stdin", stdin="wrong\n", code=1)
    assert "refuses the credentials" in wrong.stderr
    assert PASSWORD not in wrong.stderr
    made = gateway.json(*build, env={"GATEWAYD_REGISTRY_PASSWORD": PASSWORD})
    assert (made["status"], made["tags"]) == ("ready", ["12"])
    assert gateway.sandbox("create", "deb", "--snapshot", "debian:12", "--wait").stderr == ""
    said = gateway.sh("deb", "cat /etc/debian_version; echo $STAGE; command -v python3 || echo none")
    assert said.startswith("12.")
    assert said.endswith("\nimage\nnone\n")
    gateway.sh("deb", "echo more > /srv/more; rm /etc/issue")
    captured = gateway.json("snapshot", "capture", "deb", "debian:mine")
    in_use = gateway.sandbox("snapshot", "delete", made["id"], "--yes", code=73)
    assert "is used by deb" in in_use.stderr
    gateway.sandbox("create", "again", "--snapshot", captured["id"], "--wait")
    assert gateway.sh("again", "cat /srv/more; ls /etc/issue || true").startswith("more\n")
    listed = gateway.sandbox("snapshot", "list", "--format", "pretty").stdout
    assert "debian" in listed
    assert "default" in listed
    for name in ("deb", "again"):
        gateway.sandbox("delete", name, "--yes")
    failed = [one["id"] for one in gateway.json("snapshot", "list", "--status", "failed")]
    assert len(failed) == 2
    gateway.sandbox("snapshot", "delete", "debian:12", "debian:mine", *failed, "--yes")
    assert [one["name"] for one in gateway.json("snapshot", "list")] == ["default"]
    assert list((gateway.state / "local" / "layers").iterdir()) == []
    for log in gateway.state.glob("*.log"):
        assert PASSWORD not in log.read_text()


@pytest.mark.e2e
def test_progress_on_a_terminal_and_silence_in_a_pipe(gateway: Gateway, plain: Registry, app: Image) -> None:
    image = plain.push(app, "cli/app:1")
    words = ("snapshot", "build", "app", image, "--registry-url", plain.url)
    quiet = gateway.sandbox(*words)
    assert quiet.stderr == ""
    made = json.loads(quiet.stdout)
    assert gateway.json("snapshot", "get", "app")["id"] == made["id"]
    assert gateway.sandbox("snapshot", "wait", made["id"], "--format", "id").stdout == f"{made['id']}\n"
    ours, theirs = pty.openpty()
    process = subprocess.Popen([BIN / "sandbox", *words], env=gateway.env, stdin=theirs, stdout=subprocess.PIPE, stderr=theirs)
    os.close(theirs)
    out, _ = process.communicate(timeout=60)
    shown = os.read(ours, 65536).decode()
    os.close(ours)
    assert process.returncode == 0
    assert "snapshot app" in shown
    again = json.loads(out)
    assert gateway.json("snapshot", "get", made["id"])["tags"] == []
    assert "no such snapshot" in gateway.sandbox("snapshot", "get", "nothing", code=68).stderr
    gateway.sandbox("snapshot", "delete", made["id"], again["id"], "--yes")

"""ssh-setup --direct: from the answer of the daemon to files that the real ssh reads, and back."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from client.cli import cli
from gatewayd import api

from .conftest import PROJECT, Daemon
from .test_sshkeys import make_key

HOST_KEY = make_key("", fill=9)


def run(*args: str) -> Result:
    result = CliRunner().invoke(cli, list(args))
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


@pytest.fixture
def setup(daemon: Daemon, home: Path) -> Daemon:
    """A daemon that adds every key, and a key to add."""

    def add(body: Any) -> tuple[int, Any]:
        return 200, {"user": "root", "host_keys": [HOST_KEY], "added": body["public_keys"]}

    daemon.answers["POST", "/sandboxes/demo/ssh-setup"] = add
    daemon.answer("DELETE", "/sandboxes/demo/ssh-setup", None, 204)
    daemon.answer("GET", "/status", {"profile": "local"})
    daemon.answer("GET", "/sandboxes", {"sandboxes": []})
    (home / ".ssh").mkdir(mode=0o700)
    (home / ".ssh" / "id_ed25519.pub").write_text(make_key() + "\n")
    (home / ".ssh" / "id_ed25519").write_text("-----BEGIN OPENSSH PRIVATE KEY-----\n")
    return daemon


def test_there_and_back(setup: Daemon, home: Path) -> None:
    config = home / ".ssh" / "config"
    config.write_bytes(b"Host *\r\n  User x")
    config.chmod(0o640)
    result = run("ssh-setup", "demo", "--direct")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout) == {
        "host": "sandbox-demo",
        "command": f"ssh -F {home}/.ssh/config sandbox-demo",
        "user": "root",
        "identity": f"{home}/.ssh/id_ed25519.pub",
        "keys_added": 1,
        "config": f"{home}/.ssh/gatewayd/config",
        "known_hosts": f"{home}/.ssh/gatewayd/known_hosts",
    }
    assert "ssh reads the configuration of" in result.stderr  # this home directory is not the one of the user database
    assert config.read_bytes() == f"Include {home}/.ssh/gatewayd/config\n".encode() + b"Host *\r\n  User x"
    text = (home / ".ssh" / "gatewayd" / "config").read_text()
    assert f"    IdentityFile {home}/.ssh/id_ed25519\n" in text
    assert f"    ProxyCommand {sys.executable} -I -S {PROJECT}/client/proxy.py --direct --profile local sandbox-demo\n" in text
    assert (home / ".ssh" / "gatewayd" / "known_hosts").read_text() == f"sandbox-demo {HOST_KEY}\n"

    result = run("ssh-setup", "demo", "--remove")
    assert json.loads(result.stdout) == {"host": "sandbox-demo", "removed": True, "keys_removed": 1}
    method, path, body, headers = setup.requests[-1]
    assert (method, path, body) == ("DELETE", "/v1/sandboxes/demo/ssh-setup", {"public_keys": [make_key()]})
    assert headers["x-gatewayd-profile"] == "local"
    assert config.read_bytes() == b"Host *\r\n  User x"
    assert config.stat().st_mode & 0o777 == 0o640
    assert not (home / ".ssh" / "gatewayd").exists()


@pytest.mark.skipif(shutil.which("ssh") is None, reason="OpenSSH is not installed")
def test_ssh_reads_it(setup: Daemon, home: Path) -> None:
    command = json.loads(run("ssh-setup", "demo", "--direct").stdout)["command"].split()
    done = subprocess.run([*command[:1], "-G", *command[1:]], capture_output=True, text=True, check=True)
    seen = dict(line.partition(" ")[::2] for line in done.stdout.splitlines())
    assert seen["user"] == "root"
    assert seen["proxyusefdpass"] == "yes"
    assert seen["hostkeyalias"] == "sandbox-demo"


@pytest.mark.parametrize(
    ("environment", "args", "words"),
    [
        ({}, [], "--direct --profile local sandbox-demo"),
        ({}, ["--profile", "work"], "--direct --profile work sandbox-demo"),
        ({"GATEWAYD_PROFILE": "team"}, [], "--direct --profile team sandbox-demo"),
        ({"LANGSMITH_API_KEY": "s3cret", "LANGSMITH_ENDPOINT": "https://example.com"}, [], "--direct --profile env sandbox-demo"),
    ],
)
def test_ssh_uses_the_same_profile(
    setup: Daemon, home: Path, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], args: list[str], words: str
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert run("ssh-setup", "demo", "--direct", *args).exit_code == 0
    written = "".join(path.read_text() for path in (home / ".ssh").rglob("*") if path.is_file())
    assert f"proxy.py {words}\n" in written
    assert "s3cret" not in written


def test_twice(setup: Daemon, home: Path) -> None:
    """The second time nothing is added inside, and what the first time added is still known."""
    run("ssh-setup", "demo", "--direct")
    before = (home / ".ssh" / "gatewayd" / "config").read_bytes()
    setup.answer("POST", "/sandboxes/demo/ssh-setup", {"user": "root", "host_keys": [HOST_KEY], "added": []})
    assert json.loads(run("ssh-setup", "demo", "--direct").stdout)["keys_added"] == 0
    assert (home / ".ssh" / "gatewayd" / "config").read_bytes() == before


def test_print_writes_nothing_here(setup: Daemon, home: Path) -> None:
    before = sorted((home / ".ssh").rglob("*"))
    shown = run("ssh-setup", "demo", "--direct", "--print").stdout
    assert "\nHost sandbox-demo\n" in shown
    assert f"\nsandbox-demo {HOST_KEY}\n" in shown
    assert sorted((home / ".ssh").rglob("*")) == before


def test_removing_after_the_sandbox_is_gone(setup: Daemon, home: Path) -> None:
    run("ssh-setup", "demo", "--direct")
    setup.error("DELETE", "/sandboxes/demo/ssh-setup", 404, "not_found", "there is no sandbox 'demo'")
    result = run("ssh-setup", "demo", "--remove")
    assert json.loads(result.stdout) == {"host": "sandbox-demo", "removed": True, "keys_removed": 0}
    assert result.stderr == ""
    assert not (home / ".ssh" / "gatewayd").exists()


def test_removing_while_the_service_is_away(setup: Daemon, home: Path) -> None:
    run("ssh-setup", "demo", "--direct")
    setup.error("DELETE", "/sandboxes/demo/ssh-setup", 503, "unavailable", "the service is away")
    result = run("ssh-setup", "demo", "--remove")
    assert (result.exit_code, json.loads(result.stdout)["removed"]) == (0, True)
    assert result.stderr == "sandbox: the key stays in the sandbox: the service is away\n"


def test_removing_what_was_never_set_up(setup: Daemon, home: Path) -> None:
    assert run("ssh-setup", "demo", "--remove", "--format", "pretty").stdout == "sandbox-demo was not set up\n"
    assert setup.requests == []


@pytest.mark.parametrize(
    "answer",
    [
        None,
        {},
        {"user": "root", "host_keys": [], "added": []},
        {"user": "root\n    ProxyCommand evil", "host_keys": [HOST_KEY], "added": []},
        {"user": "root", "host_keys": ["ssh-ed25519 AAAA\nevil"], "added": []},
        {"user": "root", "host_keys": [HOST_KEY] * 17, "added": []},
        {"user": "root", "host_keys": [HOST_KEY], "added": ["x\nHost *"]},
    ],
)
def test_what_a_sandbox_says_is_checked(setup: Daemon, home: Path, answer: Any) -> None:
    setup.answer("POST", "/sandboxes/demo/ssh-setup", answer)
    result = run("ssh-setup", "demo", "--direct")
    assert result.exit_code == api.EXIT_CODES["failed"]
    assert "cannot use what the sandbox says" in result.stderr
    assert not (home / ".ssh" / "gatewayd").exists()


def test_no_sshd(setup: Daemon) -> None:
    setup.error("POST", "/sandboxes/demo/ssh-setup", 501, "unsupported", "sandbox demo has no sshd")
    result = run("ssh-setup", "demo", "--direct")
    assert (result.exit_code, result.stderr) == (69, "sandbox: sandbox demo has no sshd\n")

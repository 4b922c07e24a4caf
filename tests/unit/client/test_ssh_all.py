"""ssh-setup without --direct, and what other commands do where it was run."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gatewayd import api

from .conftest import PROJECT, Daemon
from .test_ssh_setup import HOST_KEY, run
from .test_sshkeys import make_key

GATEWAY_KEY = make_key("", fill=7)
INCLUDED = ".ssh/gatewayd/config"


@pytest.fixture
def gateway(daemon: Daemon) -> Daemon:
    """A daemon with two sandboxes."""
    daemon.answer("GET", "/ssh", {"host_key": GATEWAY_KEY})
    daemon.answer("GET", "/status", {"profile": "local"})
    daemon.answer("GET", "/sandboxes", {"sandboxes": [{"name": "web"}, {"name": "db"}, {"name": "Not A Name"}, {"name": 3}]})
    daemon.answer("GET", "/sandboxes/web/status", {"status": "ready", "status_message": None, "ssh": None, "link": None})
    daemon.answer("POST", "/sandboxes", {"name": "new", "status": "ready"})
    daemon.answer("DELETE", "/sandboxes/web", None, 204)
    return daemon


def listed(home: Path) -> list[str]:
    lines = (home / INCLUDED).read_text().splitlines()
    return [line.removeprefix("Host sandbox-") for line in lines if line.startswith("Host sandbox-") and "*" not in line]


def files(home: Path) -> dict[str, bytes]:
    return {str(path.relative_to(home)): path.read_bytes() for path in (home / ".ssh").rglob("*") if path.is_file()}


def test_there_and_back(gateway: Daemon, home: Path) -> None:
    result = run("ssh-setup")
    assert (result.exit_code, json.loads(result.stdout)) == (
        0,
        {
            "host": "sandbox-*",
            "command": f"ssh -F {home}/.ssh/config sandbox-NAME",
            "user": "sandbox",
            "changed": True,
            "keys_removed": 0,
            "config": f"{home}/.ssh/gatewayd/config",
            "known_hosts": f"{home}/.ssh/gatewayd/known_hosts",
        },
    )
    assert "ssh reads the configuration of" in result.stderr  # this home directory is not the one of the user database
    assert listed(home) == ["db", "web"]
    command = f"{sys.executable} -I -S {PROJECT}/client/proxy.py --profile local '%h'"
    assert f"    ProxyCommand {command}\n" in (home / INCLUDED).read_text()
    assert (home / ".ssh/gatewayd/known_hosts").read_text() == f"sandbox-* {GATEWAY_KEY}\n"
    assert [request[:2] for request in gateway.requests] == [
        ("GET", "/v1/ssh"),
        ("GET", "/v1/status"),
        ("GET", "/v1/sandboxes?limit=1000"),
    ]
    before = files(home)
    assert json.loads(run("ssh-setup").stdout)["changed"] is False
    assert files(home) == before
    assert json.loads(run("ssh-setup", "--remove").stdout) == {"host": "sandbox-*", "removed": True, "keys_removed": 0}
    assert not (home / ".ssh").exists()
    assert run("ssh-setup", "--remove", "--format", "pretty").stdout == "sandbox-* was not set up\n"


def test_one_name(gateway: Daemon, home: Path) -> None:
    """As the reference command is called; the sandbox need not be started, and gets no key."""
    key = home / "me.pub"
    key.write_text(make_key())
    result = run("ssh-setup", "web", "--identity", str(key))
    assert (result.exit_code, json.loads(result.stdout)["host"]) == (0, "sandbox-web")
    assert "--identity is not needed" in result.stderr
    assert not any("ssh-setup" in request[1] for request in gateway.requests)
    assert "\n# for: web\n" in (home / INCLUDED).read_text()
    assert json.loads(run("ssh-setup", "web", "--remove").stdout)["removed"]
    assert not (home / ".ssh").exists()


def test_a_name_that_is_none(gateway: Daemon, home: Path) -> None:
    result = run("ssh-setup", "wed")
    assert result.exit_code == api.EXIT_CODES["not_found"]
    assert "did you mean 'web'?" in result.stderr
    assert not (home / ".ssh").exists()


def test_a_name_out_of_all(gateway: Daemon, home: Path) -> None:
    run("ssh-setup")
    result = run("ssh-setup", "web", "--remove")
    assert "ssh still reaches sandbox-web as one of all sandboxes" in result.stderr
    assert listed(home) == ["db"]


def test_without_a_list(gateway: Daemon, home: Path) -> None:
    gateway.error("GET", "/sandboxes", 503, "unavailable", "the service is away")
    result = run("ssh-setup")
    assert (result.exit_code, listed(home)) == (0, [])
    assert "sandbox: the sandboxes are not listed for ssh: the service is away\n" in result.stderr


@pytest.mark.parametrize("key", [None, "", "ssh-ed25519 AAAA", f"{GATEWAY_KEY}\nsandbox-x {HOST_KEY}", ["x"]])
def test_a_host_key_that_is_none(gateway: Daemon, home: Path, key: Any) -> None:
    gateway.answer("GET", "/ssh", {"host_key": key})
    result = run("ssh-setup")
    assert result.exit_code == api.EXIT_CODES["internal"]
    assert "cannot use the host key that the daemon names" in result.stderr
    assert not (home / ".ssh").exists()


def test_from_direct_to_all_and_back(gateway: Daemon, home: Path) -> None:
    def add(body: Any) -> tuple[int, Any]:
        return 200, {"user": "root", "host_keys": [HOST_KEY], "added": body["public_keys"]}

    gateway.answers["POST", "/sandboxes/web/ssh-setup"] = add
    gateway.answer("DELETE", "/sandboxes/web/ssh-setup", None, 204)
    (home / "me.pub").write_text(make_key())
    direct = ("ssh-setup", "web", "--direct", "--identity", str(home / "me.pub"))
    run("ssh-setup")
    run(*direct)
    assert json.loads(run("status", "web").stdout)["ssh"] == "sshd"
    assert listed(home) == ["web", "db"]  # its own Host line, and the block for all leaves it out
    assert "\nHost sandbox-* !sandbox-web\n" in (home / INCLUDED).read_text()
    assert json.loads(run("ssh-setup").stdout)["changed"] is False
    result = json.loads(run("ssh-setup", "web").stdout)
    assert (result["changed"], result["keys_removed"]) == (True, 1)
    assert gateway.requests[-1][0] == "DELETE"
    assert json.loads(run("status", "web").stdout)["ssh"] is None
    run(*direct)
    assert json.loads(run("ssh-setup", "--remove").stdout) == {"host": "sandbox-*", "removed": True, "keys_removed": 1}
    assert not (home / ".ssh").exists()


def test_print_and_dry_run_write_nothing(gateway: Daemon, home: Path) -> None:
    (home / ".ssh").mkdir(mode=0o700)
    (home / ".ssh/config").write_text("Host x\n  # \x1b[31m")
    before = files(home)
    shown = run("ssh-setup", "--print").stdout
    assert "\nHost sandbox-web\n" in shown
    assert f"\nsandbox-* {GATEWAY_KEY}\n" in shown
    assert shown.endswith(f"# {home}/.ssh/config, at its top\nInclude {home}/.ssh/gatewayd/config\n")
    diff = run("ssh-setup", "--dry-run").stdout
    assert f"--- /dev/null\n+++ {home}/.ssh/gatewayd/config\n@@ " in diff
    assert "\n+Host sandbox-web\n" in diff
    assert diff.endswith(
        f"--- {home}/.ssh/config\n+++ {home}/.ssh/config\n@@ -1,2 +1,3 @@\n"
        f"+Include {home}/.ssh/gatewayd/config\n Host x\n   #  [31m\n"
    )
    assert files(home) == before
    run("ssh-setup")
    assert run("ssh-setup", "--dry-run").stdout == ""
    after = files(home)
    assert f"\n-Include {home}/.ssh/gatewayd/config\n" in run("ssh-setup", "--remove", "--dry-run").stdout
    assert "\n+# begin gatewayd\n" in run("ssh-setup", "--inline", "--dry-run").stdout
    assert files(home) == after


@pytest.mark.skipif(shutil.which("ssh") is None, reason="OpenSSH is not installed")
@pytest.mark.parametrize("options", [[], ["--inline"]], ids=["include", "inline"])
def test_ssh_runs_the_helper(gateway: Daemon, home: Path, options: list[str]) -> None:
    """The whole way from the configuration to the daemon's socket, with the real ssh and helper."""
    versions: list[bytes] = []

    def serve(request: dict[str, Any], sock: Any) -> None:
        sock.sendall(b'{"notice":"starting sandbox \\"some\\""}\n{"ok":{}}\nSSH-2.0-test\r\n')
        versions.append(sock.recv(12))

    gateway.script = serve
    run("ssh-setup", *options)
    ssh = ["ssh", "-F", str(home / ".ssh/config"), "sandbox-some"]
    done = subprocess.run(ssh, stdin=subprocess.DEVNULL, capture_output=True, timeout=20, check=False)
    assert done.returncode == 255  # the peer says no more than its version
    assert b'sandbox: starting sandbox "some"\n' in done.stderr
    assert versions == [b"SSH-2.0-Open"]
    assert gateway.lines == [{"op": "ssh", "sandbox": "some", "profile": "local"}]


@pytest.mark.parametrize(
    "args",
    [
        ["--direct"],
        ["web", "--direct", "--dry-run"],
        ["--print", "--dry-run"],
        ["--remove", "--inline"],
        ["--remove", "--direct"],
        ["--remove", "--print"],
    ],
    ids=" ".join,
)
def test_options_that_do_not_go_together(home: Path, args: list[str]) -> None:
    result = run("ssh-setup", *args)
    assert result.exit_code == 2
    assert not (home / ".ssh").exists()


# --- other commands --------------------------------------------------------------------------------------


def test_sandboxes_come_and_go(gateway: Daemon, home: Path) -> None:
    run("ssh-setup")
    assert run("create", "new").exit_code == 0
    assert listed(home) == ["db", "new", "web"]
    assert run("delete", "web", "--yes").exit_code == 0
    assert listed(home) == ["db", "new"]
    gateway.answer("PATCH", "/sandboxes/db", {"name": "base", "status": "ready"})
    assert run("update", "db", "--name", "base").exit_code == 0
    assert listed(home) == ["base", "new"]


def test_nothing_is_done_where_ssh_is_not_set_up(gateway: Daemon, home: Path) -> None:
    assert run("create", "new").stderr == ""
    assert run("delete", "web", "--yes").stderr == ""
    assert [request[:2] for request in gateway.requests] == [("POST", "/v1/sandboxes"), ("DELETE", "/v1/sandboxes/web")]
    assert not (home / ".ssh").exists()


def test_a_damaged_file_fails_no_other_command(gateway: Daemon, home: Path) -> None:
    run("ssh-setup")
    (home / INCLUDED).write_text((home / INCLUDED).read_text().replace("# end sandbox-*\n", ""))
    before = files(home)
    result = run("create", "new")
    assert (result.exit_code, json.loads(result.stdout)["name"]) == (0, "new")
    assert "ssh's list of hosts stays as it was: cannot use" in result.stderr
    assert run("delete", "web", "--yes").exit_code == 0
    assert json.loads(run("status", "web").stdout)["status"] == "ready"
    assert files(home) == before
    os.truncate(home / INCLUDED, 0)
    assert run("create", "new").stderr == ""


def test_status_tells_how_a_sandbox_is_reached(gateway: Daemon) -> None:
    link = {"sandbox": "web", "profile": "local", "state": "up", "streams": 1, "rtt_ms": 1.5, "bytes_in": 1, "bytes_out": 1}
    link |= {"connected_at": 1.0, "last_error": ""}
    gateway.answer("GET", "/sandboxes/web/status", {"status": "ready", "status_message": None, "ssh": "guest", "link": link})
    assert json.loads(run("status", "web").stdout)["link"] == link
    shown = run("status", "web", "--format", "pretty").stdout
    assert shown == "name        web\nstatus      ready\nssh         guest\nlink        up\nround trip  1.5 ms\n"

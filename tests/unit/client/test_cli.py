"""The command line: what each command asks the daemon for, what it shows, and how it fails."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from client.cli import COMMANDS, SECTIONS, cli
from gatewayd import api

from .conftest import DEADLINE, PROJECT, Daemon, Spawn

DEMO = {
    "id": "7f0c5c0a-0000-4000-8000-000000000000",
    "name": "demo",
    "status": "ready",
    "status_message": "memory is not limited here\x1b[31m",
    "vcpus": 2,
    "mem_bytes": 1 << 30,
    "fs_capacity_bytes": 8 << 30,
    "idle_ttl_seconds": 600,
    "delete_after_stop_seconds": 0,
    "labels": {"team": "infra"},
    "created_at": "2024-05-01T12:00:00Z",
    "dataplane_url": "http://127.0.0.1:1/dataplane/7f0c",
}
STATUS = {
    "version": api.VERSION,
    "pid": 4711,
    "started_at": 0.0,
    "uptime_seconds": 3700.0,
    "profile": "local",
    "endpoint": "http://127.0.0.1:1",
    "runtime_dir": "/run/user/1000/gatewayd",
    "log_file": "/home/me/daemon.log",
    "links": [
        {
            "sandbox": "demo",
            "profile": "local",
            "state": "up",
            "streams": 1,
            "rtt_ms": 0.42,
            "bytes_in": 2048,
            "bytes_out": 1,
            "connected_at": 0.0,
            "last_error": "",
        }
    ],
    "forwards": [{"id": 1, "sandbox": "demo", "address": "127.0.0.1", "port": 5432, "remote_port": 5432, "connections": 0}],
    "local": {"endpoint": "http://127.0.0.1:1", "pid": 4712, "state": "running"},
}


def run(*args: str, **options: Any) -> Result:
    result = CliRunner().invoke(cli, list(args), **options)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


# --- what is asked, what is shown ------------------------------------------------------------------------


def test_create(daemon: Daemon) -> None:
    daemon.answer("POST", "/sandboxes", DEMO, 201)
    result = run("create", "demo", "--snapshot", "python:3.12", "--vcpus", "2", "--memory", "1gb", "--rootfs-capacity", "8gb",
                 "--idle-ttl", "10m", "--env", "A=1", "--env", "B=", "--label", "team=infra", "--proxy-config", '{"rules": []}',
                 "--no-wait", "--timeout", "30")  # fmt: skip
    assert (result.exit_code, result.stderr) == (0, "sandbox: demo: memory is not limited here\n")  # a limit that is none is told
    assert json.loads(result.stdout) == DEMO
    assert daemon.requests[0][2] == {
        "name": "demo",
        "snapshot": "python:3.12",
        "vcpus": 2,
        "mem_bytes": 1 << 30,
        "fs_capacity_bytes": 8 << 30,
        "idle_ttl_seconds": 600,
        "env_vars": {"A": "1", "B": ""},
        "labels": {"team": "infra"},
        "proxy_config": {"rules": []},
        "wait": False,
        "timeout": 30.0,
    }


def test_create_asks_for_no_more_than_was_said(daemon: Daemon) -> None:
    daemon.answer("POST", "/sandboxes", DEMO, 201)
    assert run("create", "--format", "id").stdout == "demo\n"
    assert run("create", "--snapshot", str(DEMO["id"])).exit_code == 0
    assert daemon.requests[0][2] == {"wait": True, "timeout": 120.0}
    assert daemon.requests[1][2] == {"wait": True, "timeout": 120.0, "snapshot_id": DEMO["id"]}


def test_list(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    daemon.answer("GET", "/sandboxes", {"sandboxes": [DEMO, {"name": "x\x1b]0;t\x07", "status": "stopped"}]})
    args = ["--name-contains", "a b", "--status", "ready", "--label", "team=infra", "--sort-by", "name", "--limit", "5"]
    assert json.loads(run("list", *args).stdout)["sandboxes"][0] == DEMO
    assert daemon.requests[0][1] == "/v1/sandboxes?name_contains=a%20b&status=ready&label=team%3Dinfra&sort_by=name&limit=5"
    assert run("list", "--format", "id").stdout == "demo\nx\n"
    monkeypatch.setenv("COLUMNS", "80")
    shown = run("list", "--format", "pretty").stdout
    assert re.fullmatch(
        r"NAME  STATUS   VCPUS  MEMORY  DISK  AGE +LABELS\n"
        r"demo  ready    2      1GB     8GB   \d+d( \d+h)? +team=infra\n"
        r"x     stopped  -      -       -     - +-\n",
        shown,
    )


def test_an_empty_list(daemon: Daemon) -> None:
    daemon.answer("GET", "/sandboxes", {"sandboxes": []})
    assert json.loads(run("list").stdout) == {"sandboxes": []}
    assert run("list", "--format", "id").stdout == ""
    assert run("list", "--format", "pretty").stdout == "there are no sandboxes; `sandbox create` makes one\n"


def test_get(daemon: Daemon) -> None:
    daemon.answer("GET", "/sandboxes/demo", DEMO)
    assert json.loads(run("get", "demo").stdout) == DEMO
    shown = run("get", "demo", "--format", "pretty").stdout
    assert "status        ready\nmessage       memory is not limited here\n" in shown
    assert "idle ttl      10m\ndelete after  never\n" in shown


def test_update(daemon: Daemon) -> None:
    daemon.answer("PATCH", "/sandboxes/demo", {**DEMO, "name": "demo-2"})
    assert run("update", "demo", "--name", "demo-2", "--memory", "2gb", "--format", "id").stdout == "demo-2\n"
    assert daemon.requests[0][2] == {"name": "demo-2", "mem_bytes": 2 << 30}
    result = run("update", "demo")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "nothing to change" in result.stderr


@pytest.mark.parametrize(
    ("args", "path", "body"),
    [
        (["start", "demo"], "/sandboxes/demo/start", {"wait": True, "timeout": 120.0}),
        (["stop", "demo", "--no-wait"], "/sandboxes/demo/stop", {"wait": False, "timeout": 120.0}),
        (["wait", "demo"], "/sandboxes/demo/wait", {"for": "ready", "timeout": 120.0}),
        (["wait", "demo", "--for", "stopped", "--timeout", "2m"], "/sandboxes/demo/wait", {"for": "stopped", "timeout": 120.0}),
    ],
)
def test_start_stop_wait(daemon: Daemon, args: list[str], path: str, body: dict[str, Any]) -> None:
    daemon.answer("POST", path, DEMO)
    assert json.loads(run(*args).stdout) == DEMO
    assert daemon.requests[0][2] == body


def test_status_of_a_sandbox(daemon: Daemon) -> None:
    daemon.answer("GET", "/sandboxes/demo/status", {"status": "ready", "status_message": None})
    assert json.loads(run("status", "demo").stdout) == {"status": "ready", "status_message": None}
    assert run("status", "demo", "--format", "pretty").stdout == "name    demo\nstatus  ready\n"


def test_status_of_the_daemon(daemon: Daemon) -> None:
    daemon.answer("GET", "/status", STATUS)
    for command in ("status", "up"):
        assert json.loads(run(command).stdout) == {"running": True, **STATUS}
    shown = run("status", "--format", "pretty").stdout
    assert "daemon         up\n" in shown
    assert "up for         1h 1m\n" in shown
    assert (
        "LINK  PROFILE  STATE  STREAMS  RTT     IN   OUT  LAST ERROR\ndemo  local    up     1        0.4 ms  2KB  1B   -\n"
        in shown
    )
    assert "127.0.0.1:5432  demo:5432  0\n" in shown


def test_status_does_not_start_the_daemon(home: Path) -> None:
    result = run("status")
    assert result.exit_code == 69
    assert json.loads(result.stdout) == {
        "running": False,
        "runtime_dir": f"{home}/run",
        "log_file": f"{home}/state/daemon.log",
    }
    assert result.stderr == "sandbox: the daemon is not running\nhint: `sandbox up` starts it\n"
    assert not (home / "run").exists()


def test_down(daemon: Daemon) -> None:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    assert process.stdin is not None
    stdin = process.stdin
    daemon.answer("GET", "/status", {**STATUS, "pid": process.pid})

    def shutdown(body: Any) -> tuple[int, Any]:
        threading.Timer(0.05, stdin.close).start()
        return 202, None

    daemon.answers["POST", "/shutdown"] = shutdown
    result = run("down", "--keep-local")
    assert json.loads(result.stdout) == {"running": False, "stopped_pid": process.pid}
    assert daemon.requests[-1][2] == {"keep_local": True}
    assert process.wait(DEADLINE) == 1  # it had ended when the command returned; nobody else waits for it


def test_down_without_a_daemon(home: Path) -> None:
    result = run("down", "--format", "pretty")
    assert (result.exit_code, result.stdout) == (0, "the daemon was not running\n")


def test_delete(daemon: Daemon) -> None:
    daemon.answer("DELETE", "/sandboxes/a", None, 204)
    daemon.answer("DELETE", "/sandboxes/b", None, 204)
    daemon.answer("GET", "/sandboxes", {"sandboxes": [{"name": "demo"}]})
    result = run("delete", "a", "b", "a")
    assert json.loads(result.stdout) == {"deleted": ["a", "b"]}
    assert [request[0] for request in daemon.requests] == ["DELETE", "DELETE"]


def test_delete_goes_on_after_a_failure(daemon: Daemon) -> None:
    daemon.answer("DELETE", "/sandboxes/b", None, 204)
    daemon.answer("GET", "/sandboxes", {"sandboxes": [{"name": "demo"}]})
    result = run("delete", "dmeo", "b", "--yes")
    assert result.exit_code == 68
    assert json.loads(result.stdout) == {"deleted": ["b"]}
    assert result.stderr == "sandbox: there is no sandbox 'dmeo'\nhint: did you mean 'demo'?\n"


@pytest.mark.parametrize(
    ("typed", "code", "deleted"),
    [(b"y\n", 0, True), (b"n\n", 1, False), (b"\n", 1, False), (b"\x04", 1, False), (b"\x03", 130, False)],
)
def test_delete_asks_on_a_terminal(daemon: Daemon, spawn: Spawn, typed: bytes, code: int, deleted: bool) -> None:
    daemon.answer("DELETE", "/sandboxes/a", None, 204)
    leader, follower = pty.openpty()
    process = spawn("delete", "a", stdin=follower, stdout=follower, stderr=follower, preexec_fn=_own_terminal)
    os.close(follower)
    shown = b""
    while b"[y/N]" not in shown:
        shown += os.read(leader, 1000)
    assert b"Delete a with all files? [y/N]" in shown
    os.write(leader, typed)
    assert process.wait(DEADLINE) == code
    os.close(leader)
    assert bool(daemon.requests) is deleted


def _own_terminal() -> None:
    """Make standard input the controlling terminal, so that a typed ^C is a signal."""
    import fcntl
    import termios

    os.setsid()
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


# --- failures --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", sorted(api.EXIT_CODES))
def test_exit_codes(daemon: Daemon, kind: str) -> None:
    daemon.error("GET", "/sandboxes", api.HTTP_STATUS[kind], kind, "cannot list: \x1b[31mwhy", "do this")
    result = run("list")
    assert (result.exit_code, result.stdout) == (api.EXIT_CODES[kind], "")
    assert result.stderr == "sandbox: cannot list: why\nhint: do this\n"


@pytest.mark.parametrize(
    ("args", "shown"),
    [
        (
            ["create", "--memory", "512"],
            "sandbox create: --memory: a size needs a unit (mb, gb or tb), for example 512mb\n"
            "  --memory 512\n"
            "           ^^^\n"
            "hint: `sandbox create --help` tells more\n",
        ),
        (
            ["create", "--env", "TOKEN=s3cret", "--memory=512"],
            "sandbox create: --memory: a size needs a unit (mb, gb or tb), for example 512mb\n"
            "  --memory=512\n"
            "           ^^^\n"
            "hint: `sandbox create --help` tells more\n",
        ),
        (
            ["exec", "demo", "ls", "-la"],
            "sandbox exec: No such option '-l'.\n"
            "hint: options of the sandbox's command go after --: sandbox exec NAME -- COMMAND…\n",
        ),
        (
            ["get", "Demo"],
            "sandbox get: NAME: a sandbox name has 1 to 63 of a-z, 0-9 and -, and neither begins nor ends with -\n"
            "  Demo\n"
            "  ^^^^\n"
            "hint: `sandbox get --help` tells more\n",
        ),
        (
            ["lsit"],
            "sandbox: there is no command 'lsit'\n  lsit\n  ^^^^\nhint: did you mean `sandbox list`?\n",
        ),
        (
            ["xyzzy\x1b[31m"],
            "sandbox: there is no command 'xyzzy'\nhint: `sandbox --help` shows the commands\n",
        ),
    ],
)  # fmt: skip
def test_usage_errors_point_at_the_word(home: Path, args: list[str], shown: str) -> None:
    result = run(*args)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == shown


@pytest.mark.parametrize(
    "args",
    [
        ["get"],
        ["exec", "demo"],
        ["exec", "demo", "--"],
        ["tunnel", "demo"],
        ["tunnel", "demo", "--remote-port", "0"],
        ["tunnel", "demo", "--remote-port", "70000"],
        ["create", "--idle-ttl", "90"],
        ["list", "--format", "xml"],
        ["--nonsense"],
        ["delete"],
        ["wait", "demo", "--for", "ever"],
        ["ssh-setup", "demo", "--remove", "--print"],
    ],
)
def test_usage_errors(home: Path, args: list[str]) -> None:
    result = run(*args)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("sandbox")
    assert not (home / "run").exists()  # nothing was started for it


def test_a_defect_is_one_line(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        raise ZeroDivisionError("why")

    monkeypatch.setattr("client.control.Control.request", broken)
    result = run("list")
    assert result.exit_code == 70
    assert re.fullmatch(r"sandbox: internal error: ZeroDivisionError: why \([\w.]*test_cli:\d+\)\n", result.stderr)


def test_a_broken_pipe_is_quiet(daemon: Daemon) -> None:
    daemon.answer("GET", "/sandboxes", {"sandboxes": [DEMO] * 1000})
    read, write = os.pipe()
    os.close(read)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "client", "list"],
            stdout=write,
            stderr=subprocess.PIPE,
            cwd=PROJECT,
            timeout=DEADLINE,
            check=False,
        )
    finally:
        os.close(write)
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_a_full_disk(daemon: Daemon, spawn: Spawn) -> None:
    daemon.answer("GET", "/sandboxes", {"sandboxes": [DEMO]})
    with Path("/dev/full").open("wb") as full:
        process = spawn("list", stdout=full)
        _, err = process.communicate(timeout=DEADLINE)
    assert (process.returncode, err) == (1, b"sandbox: cannot write the output: No space left on device\n")


def test_an_interrupt_while_waiting(daemon: Daemon, spawn: Spawn) -> None:
    asked, released = threading.Event(), threading.Event()

    def answer(body: Any) -> tuple[int, Any]:
        asked.set()
        released.wait(DEADLINE)
        return 200, DEMO

    daemon.answers["POST", "/sandboxes/demo/wait"] = answer
    process = spawn("wait", "demo")
    assert asked.wait(DEADLINE)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=DEADLINE)
    released.set()
    assert (process.returncode, out, err) == (130, b"", b"")


# --- options, help, documents ----------------------------------------------------------------------------


def test_global_options_stand_before_or_after(daemon: Daemon) -> None:
    daemon.answer("GET", "/sandboxes", {"sandboxes": [DEMO]})
    for args in (["--format", "id", "--profile", "work", "list"], ["list", "--format=id", "--profile=work"]):
        assert run(*args).stdout == "demo\n"
        assert daemon.requests[-1][3]["x-gatewayd-profile"] == "work"
    assert run("--format", "json", "list", "--format", "id").stdout == "demo\n"


def test_the_short_help() -> None:
    for args in ([], ["--help"], ["-h"]):
        result = run(*args)
        assert result.exit_code == 0
        for title, commands in SECTIONS.items():
            assert f"\n{title}:\n" in result.stdout
            assert all(re.search(rf"^  {name} ", result.stdout, re.MULTILINE) for name in commands)
        assert "\nExamples:\n  sandbox create demo" in result.stdout


def test_the_version() -> None:
    assert run("--version").stdout == f"sandbox {api.VERSION}\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_and_an_example(name: str) -> None:
    result = run(name, "--help")
    assert result.exit_code == 0
    assert result.stdout.startswith(f"Usage: sandbox {name} ")
    assert f"\nExamples:\n  sandbox {name}" in result.stdout
    assert "--format [json|pretty|id]" in result.stdout


def test_help_imports_no_command() -> None:
    """Nor what commands must never need: each of these would be a large part of a start."""
    code = "import sys; from client.cli import cli; cli.main([], standalone_mode=False); print(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PROJECT)
    loaded = set(done.stderr.split())
    assert not {name for name in loaded if name.startswith("client.commands.")}
    heavy = {
        "asyncio",
        "http.client",
        "httpx2",
        "asyncssh",
        "websockets",
        "ssl",
        "subprocess",
        "pathlib",
        "socket",
        "logging",
        "email",
    }
    assert not loaded & heavy


@pytest.mark.parametrize("command", ["list", "status", "get demo"])
def test_a_round_trip_imports_little(daemon: Daemon, command: str) -> None:
    daemon.answer("GET", "/sandboxes", {"sandboxes": []})
    daemon.answer("GET", "/sandboxes/demo", DEMO)
    daemon.answer("GET", "/status", STATUS)
    words = command.split()
    code = (
        f"import sys; from client.cli import cli\ncli.main({words}, standalone_mode=False)\nprint(*sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PROJECT)
    heavy = {
        "asyncio",
        "http.client",
        "httpx2",
        "ssl",
        "subprocess",
        "pathlib",
        "socket",
        "logging",
        "email",
        "difflib",
        "tempfile",
    }
    assert not set(done.stderr.split()) & heavy


def test_the_proxy_helper_is_dispatched_before_click(home: Path) -> None:
    code = (
        "import sys; sys.argv = ['sandbox', 'proxy']\nfrom client.__main__ import main\ntry: main()\nfinally: print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=PROJECT)
    assert done.returncode == 2
    assert "click" not in done.stdout.split()


def test_the_exit_codes_are_documented() -> None:
    text = (PROJECT / "docs" / "exit-codes.md").read_text()
    documented = {kind: int(code) for code, kind in re.findall(r"^\| (\d+) \| `(\w+)` \|", text, re.MULTILINE)}
    assert documented == api.EXIT_CODES


def test_the_commands_are_documented() -> None:
    text = (PROJECT / "docs" / "commands.md").read_text()
    assert set(re.findall(r"^## (\S+)$", text, re.MULTILINE)) == set(COMMANDS)
    for name in COMMANDS:
        section = text.partition(f"\n## {name}\n")[2].partition("\n## ")[0]
        options = set(re.findall(r"--[a-z-]+", run(name, "--help").stdout.partition("Options:")[2].partition("Examples:")[0]))
        assert options - {"--format", "--profile", "--help"} <= set(re.findall(r"--[a-z-]+", section)), name

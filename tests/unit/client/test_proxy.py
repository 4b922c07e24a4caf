"""The ProxyCommand helper: its rules are the contract's, its imports are few, its descriptor arrives, its copying half-closes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from client import proxy
from client.proxy import Failure
from gatewayd import api
from gatewayd.fdpass import recv_fds

from .conftest import DEADLINE, PROJECT, Daemon

HELPER = [sys.executable, "-I", "-S", str(PROJECT / "client" / "proxy.py")]

ENVIRONMENTS: list[dict[str, str]] = [
    {},
    {"GATEWAYD_RUNTIME_DIR": "/tmp/run"},
    {"GATEWAYD_RUNTIME_DIR": "relative/run"},
    {"XDG_RUNTIME_DIR": "/tmp"},
    {"XDG_RUNTIME_DIR": "/nonexistent"},
    {"XDG_RUNTIME_DIR": "relative"},
    {"XDG_RUNTIME_DIR": "HOME"},
    {"GATEWAYD_STATE_DIR": "/tmp/state"},
    {"GATEWAYD_STATE_DIR": "state"},
    {"XDG_STATE_HOME": "/tmp/xdg-state"},
    {"XDG_STATE_HOME": "relative"},
    {"HOME": ""},
    {"GATEWAYD_PROFILE": "work"},
    {"GATEWAYD_PROFILE": "env", "LANGSMITH_API_KEY": "k"},
    {"LANGSMITH_API_KEY": " k ", "LANGSMITH_ENDPOINT": "https://e", "LANGSMITH_WORKSPACE_ID": "w"},
    {"LANGSMITH_ENDPOINT": "https://e"},
    {"GATEWAYD_PROFILE": "local", "LANGSMITH_API_KEY": "k"},
]


@pytest.mark.parametrize("environment", ENVIRONMENTS, ids=str)
def test_the_rules_are_the_contract_s(environment: dict[str, str], home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GATEWAYD_RUNTIME_DIR")
    monkeypatch.delenv("GATEWAYD_STATE_DIR")
    for name, value in environment.items():
        monkeypatch.setenv(name, str(home) if value == "HOME" else value)
    assert proxy.state_dir() == api.state_dir()
    assert proxy.runtime_dir() == api.runtime_dir()
    for profile in ("", "env", "work"):
        assert proxy.caller_fields(profile) == api.caller_fields(profile)


def test_the_limits_are_the_contract_s() -> None:
    assert proxy.LINE_MAX == api.LINE_MAX
    assert api.EXIT_CODES[api.ErrorKind.CONFLICT] == proxy.ALREADY_RUNS
    assert proxy.PREFIX == api.SSH_PREFIX


def test_imports_are_few() -> None:
    """On the way that every ssh takes, the helper loads os and one C module."""
    code = (
        "import os, sys; before = set(sys.modules); sys.path.insert(0, sys.argv[1]); import proxy\n"
        "print(*sorted(set(sys.modules) - before - {'proxy'}))"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code, str(PROJECT / "client")], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["_socket"]


@given(st.dictionaries(st.text(), st.text() | st.booleans()))
def test_the_request_line_is_json(fields: dict[str, str | bool]) -> None:
    line = proxy.request_line(fields)
    assert line.endswith(b"\n")
    assert line.count(b"\n") == 1
    assert json.loads(line) == fields


@given(st.text(max_size=70))
def test_is_name(text: str) -> None:
    import re

    assert proxy.is_name(text) == bool(re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", text))


@given(st.from_regex(r"[a-z0-9-]{1,64}", fullmatch=True))
def test_is_name_of_likely_ones(text: str) -> None:
    assert proxy.is_name(text) == (len(text) <= 63 and text[0] != "-" and text[-1] != "-")


def echo_upper(request: dict[str, Any], sock: socket.socket) -> None:
    """Answers ok, a banner, and after the peer's EOF everything it has sent, in upper case."""
    sock.sendall(b'{"notice":"waking up"}\n{"ok":{}}\nBANNER\n')
    data = b""
    while chunk := sock.recv(65536):
        data += chunk
    sock.sendall(data.upper())


def test_the_descriptor_arrives(daemon: Daemon) -> None:
    daemon.script = echo_upper
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.settimeout(DEADLINE)
        end = theirs.fileno()
        helper = subprocess.Popen([*HELPER, "--profile", "work", "demo"], stdin=end, stdout=end, stderr=subprocess.PIPE)
        theirs.close()
        data, fds = recv_fds(ours)
        _, errors = helper.communicate(timeout=DEADLINE)
    assert (helper.returncode, errors) == (0, b"sandbox: waking up\n")
    assert data == b"\0"
    with socket.socket(fileno=fds[0]) as stream:
        stream.settimeout(DEADLINE)
        stream.sendall(b"hello")
        stream.shutdown(socket.SHUT_WR)
        received = b""
        while chunk := stream.recv(65536):
            received += chunk
    assert received == b"BANNER\nHELLO"
    assert daemon.lines == [{"op": "ssh", "sandbox": "demo", "profile": "work"}]


@pytest.mark.parametrize(
    ("args", "fields"),
    [
        (["demo"], {"sandbox": "demo"}),
        (["sandbox-demo"], {"sandbox": "demo"}),
        (["sandbox-sandbox-demo"], {"sandbox": "sandbox-demo"}),
        (["--no-start", "sandbox-demo"], {"sandbox": "demo", "wake": False}),
        (["--direct", "--profile", "work", "sandbox-demo"], {"sandbox": "demo", "profile": "work", "direct": True}),
        (["--no-start", "--direct", "x"], {"sandbox": "x", "direct": True, "wake": False}),
    ],
    ids=" ".join,
)
def test_what_is_asked_for(daemon: Daemon, args: list[str], fields: dict[str, Any]) -> None:
    daemon.script = lambda request, sock: sock.sendall(b'{"ok":{}}\n')
    done = subprocess.run([*HELPER, *args], stdin=subprocess.DEVNULL, capture_output=True, timeout=DEADLINE, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    assert daemon.lines == [{"op": "ssh", **fields}]


@pytest.mark.skipif(shutil.which("ssh") is None, reason="OpenSSH is not installed")
@pytest.mark.parametrize("fdpass", ["yes", "no"])
def test_openssh_takes_the_connection(daemon: Daemon, fdpass: str) -> None:
    versions: list[bytes] = []

    def serve(request: dict[str, Any], sock: socket.socket) -> None:
        sock.sendall(b'{"ok":{}}\nSSH-2.0-test\r\n')
        versions.append(sock.recv(12))

    daemon.script = serve
    command = " ".join(HELPER)
    done = subprocess.run(
        ["ssh", "-F", "none", "-o", f"ProxyCommand={command} demo", "-o", f"ProxyUseFdpass={fdpass}", "demo"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=DEADLINE,
        check=False,
    )
    assert done.returncode == 255  # the peer says no more than its version
    assert versions == [b"SSH-2.0-Open"]


def test_copying_instead(daemon: Daemon) -> None:
    """Standard output is a pipe: bytes are copied, and an EOF ends one direction only."""
    daemon.script = echo_upper
    done = subprocess.run([*HELPER, "demo"], input=b"x" * 1_000_000, capture_output=True, timeout=DEADLINE, check=False)
    assert (done.returncode, done.stderr) == (0, b"sandbox: waking up\n")
    assert done.stdout == b"BANNER\n" + b"X" * 1_000_000


def test_the_other_direction_goes_on_after_the_sandbox_s_eof(daemon: Daemon) -> None:
    received = bytearray()
    finished = threading.Event()

    def serve(request: dict[str, Any], sock: socket.socket) -> None:
        sock.sendall(b'{"ok":{}}\nbye')
        sock.shutdown(socket.SHUT_WR)
        while chunk := sock.recv(65536):
            received.extend(chunk)
        finished.set()

    daemon.script = serve
    helper = subprocess.Popen([*HELPER, "demo"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert helper.stdin is not None
    assert helper.stdout is not None
    assert helper.stdout.read() == b"bye"  # to its end, while input is still open
    helper.stdin.write(b"still here")
    helper.stdin.close()
    assert finished.wait(DEADLINE)
    assert helper.wait(DEADLINE) == 0
    helper.stdout.close()
    assert bytes(received) == b"still here"


def test_copying_ends_when_the_daemon_closes(daemon: Daemon) -> None:
    """Even though nothing ends standard input."""

    def serve(request: dict[str, Any], sock: socket.socket) -> None:
        sock.sendall(b'{"ok":{}}\nbye')

    daemon.script = serve
    helper = subprocess.Popen([*HELPER, "demo"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert helper.stdin is not None
    assert helper.stdout is not None
    assert helper.stdout.read() == b"bye"
    assert helper.wait(DEADLINE) == 0
    helper.stdin.close()
    helper.stdout.close()


def test_errors_are_told_without_control_characters(daemon: Daemon) -> None:
    def serve(request: dict[str, Any], sock: socket.socket) -> None:
        sock.sendall(b'{"error":{"kind":"not_found","message":"no \\u001b[31m sandbox","hint":"look"}}\n')

    daemon.script = serve
    done = subprocess.run([*HELPER, "demo"], stdin=subprocess.DEVNULL, capture_output=True, timeout=DEADLINE, check=False)
    assert (done.returncode, done.stdout) == (1, b"")
    assert done.stderr == b"sandbox: no  [31m sandbox\nhint: look\n"


@pytest.mark.parametrize(
    "args", [[], ["a", "b"], ["--help"], ["-x"], ["-x", "a"], ["--profile", "a"], ["--direct"], ["a", "--no-start"]]
)
def test_usage(args: list[str], home: Path) -> None:
    done = subprocess.run([*HELPER, *args], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (2, f"{proxy.USAGE}\n")


def test_a_name_that_is_none(home: Path) -> None:
    done = subprocess.run([*HELPER, "../x"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "sandbox: '../x' is not a sandbox name\n")


# --- starting the daemon ---------------------------------------------------------------------------------


def pretend(home: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> None:
    """Put a program in the place of the interpreter that runs the daemon."""
    program = home / "interpreter"
    program.write_text(f"#!{sys.executable} -IS\n{body}")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))


LISTEN = """
import os, sys, time
from _socket import AF_UNIX, SOCK_STREAM, socket
run = os.environ["GATEWAYD_RUNTIME_DIR"]
with open(os.path.join(run, "started"), "a") as file:
    file.write(f"{os.getpid()} {os.getsid(0)} {' '.join(sys.argv[1:])}\\n")
sock = socket(AF_UNIX, SOCK_STREAM)
sock.bind(os.path.join(run, "control.sock"))
sock.listen(8)
time.sleep(30)
"""


def started(home: Path) -> list[list[str]]:
    return [line.split() for line in (home / "run" / "started").read_text().splitlines()]


def end(home: Path) -> None:
    for pid, *_ in started(home):
        os.kill(int(pid), signal.SIGKILL)
        os.waitpid(int(pid), 0)


def test_starting_the_daemon(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(home, monkeypatch, LISTEN)
    read, write = os.pipe()
    os.set_inheritable(write, True)  # as a shell leaves a redirection open for its commands
    try:
        proxy.dial("control.sock").close()
        proxy.dial("control.sock").close()
    finally:
        os.close(write)
    [(pid, session, *argv)] = started(home)
    assert os.read(read, 1) == b""  # the daemon has not kept it
    os.close(read)
    assert pid == session
    assert argv == ["-P", "-m", "gatewayd"]
    assert (home / "run").stat().st_mode & 0o777 == 0o700
    assert (home / "state" / "daemon.log").stat().st_mode & 0o777 == 0o600
    end(home)


def test_many_at_once_start_one_daemon(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(home, monkeypatch, LISTEN)
    failures: list[BaseException] = []

    def dial() -> None:
        try:
            proxy.dial("control.sock").close()
        except BaseException as exc:  # noqa: BLE001 - told to the test below
            failures.append(exc)

    threads = [threading.Thread(target=dial) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE)
    assert failures == []
    assert len(started(home)) == 1
    end(home)


def test_a_stale_socket_is_no_daemon(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (home / "run").mkdir(mode=0o700)
    stale = socket.socket(socket.AF_UNIX)
    stale.bind(str(home / "run" / "control.sock"))
    stale.close()
    pretend(home, monkeypatch, LISTEN.replace("sock.bind", "os.unlink(os.path.join(run, 'control.sock')); sock.bind"))
    proxy.dial("control.sock").close()
    end(home)


def test_a_daemon_that_does_not_start_shows_its_log(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (home / "state").mkdir()
    (home / "state" / "daemon.log").write_text("of an earlier run\n")
    pretend(home, monkeypatch, "import os\nos.write(2, b'cannot load: \\x1b[31mbroken\\n')\nos._exit(3)")
    with pytest.raises(Failure) as caught:
        proxy.dial("control.sock")
    assert caught.value.message == "cannot start the daemon: it ended with status 3\n  cannot load:  [31mbroken"
    assert caught.value.hint == f"its log is {home}/state/daemon.log"


def test_a_daemon_that_gives_way_is_started_again(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The old one is just ending: it holds its lock, but no longer its sockets."""
    first = "import os\nmark = os.environ['GATEWAYD_RUNTIME_DIR'] + '/first'\n"
    first += "if not os.path.exists(mark):\n    open(mark, 'w').close()\n    os._exit(73)\n"
    pretend(home, monkeypatch, first + LISTEN)
    proxy.dial("control.sock").close()
    assert len(started(home)) == 1
    end(home)


def test_a_daemon_that_never_answers(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proxy, "START_DEADLINE", 0.3)
    pretend(home, monkeypatch, LISTEN.replace("control.sock", "another.sock"))
    with pytest.raises(Failure, match="no answer at"):
        proxy.dial("control.sock")
    end(home)


def test_a_directory_that_others_can_write(home: Path) -> None:
    (home / "run").mkdir()
    (home / "run").chmod(0o777)
    with pytest.raises(Failure, match="must belong to you alone") as caught:
        proxy.dial("control.sock")
    assert caught.value.kind == "config"


def test_a_socket_path_that_is_too_long(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GATEWAYD_RUNTIME_DIR", str(home / ("x" * 120)))
    with pytest.raises(Failure, match="too long") as caught:
        proxy.dial("control.sock")
    assert caught.value.kind == "config"

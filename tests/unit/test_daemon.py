"""The daemon as a process: lock, sockets, signals, what it says and what it leaves."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gatewayd import sdnotify
from gatewayd.__main__ import main
from gatewayd.daemon import LineFormatter


def wait_until(true: Callable[[], Any], what: str, deadline: float = 15.0) -> Any:
    end = time.monotonic() + deadline
    while not (value := true()):
        assert time.monotonic() < end, f"not within {deadline:.0f} s: {what}"
        time.sleep(0.01)
    return value


class World:
    """Private directories, and the daemons started on them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.run, self.state, self.log = root / "run", root / "state", root / "log"
        self.env = {
            "PATH": os.environ["PATH"],
            "HOME": str(root),
            "GATEWAYD_RUNTIME_DIR": str(self.run),
            "GATEWAYD_STATE_DIR": str(self.state),
        }
        self.started: list[subprocess.Popen[bytes]] = []

    def start(self, *args: str, ready: bool = True, **popen: Any) -> subprocess.Popen[bytes]:
        env = self.env | popen.pop("env", {})
        with self.log.open("ab") as log:
            daemon = subprocess.Popen(
                [sys.executable, "-P", "-m", "gatewayd", *args], env=env, stderr=log, cwd=self.root, **popen
            )
        self.started.append(daemon)
        if ready:
            wait_until(lambda: self.answers() or daemon.poll() is not None, "the daemon answers")
            assert daemon.poll() is None, self.log.read_text()
        return daemon

    def answers(self) -> bool:
        with contextlib.suppress(OSError):
            return "version" in self.get("/v1/status")
        return False

    def get(self, path: str, verb: str = "GET", body: str = "{}") -> dict[str, Any]:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.settimeout(10)
            sock.connect(str(self.run / "control.sock"))
            head = f"{verb} {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n{body}"
            sock.sendall(head.encode())
            answer = b""
            while data := sock.recv(65536):
                answer += data
        found = json.loads(answer.partition(b"\r\n\r\n")[2])
        assert isinstance(found, dict)
        return found


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    world = World(tmp_path)
    yield world
    for daemon in world.started:
        if daemon.poll() is None:
            daemon.kill()
        daemon.wait()


def test_a_life(world: World) -> None:
    daemon = world.start()
    for path, mode in (
        (world.run, 0o700),
        (world.state, 0o700),
        (world.run / "control.sock", 0o600),
        (world.run / "connect.sock", 0o600),
    ):
        assert stat.S_IMODE(path.stat().st_mode) == mode
    assert world.get("/v1/status")["pid"] == daemon.pid
    assert (world.run / "daemon.lock").read_text() == f"{daemon.pid}\n"
    daemon.send_signal(signal.SIGTERM)
    assert daemon.wait(10) == 0
    assert sorted(path.name for path in world.run.iterdir()) == ["daemon.lock"]
    lines = world.log.read_text().splitlines()
    assert [line.partition(": ")[2] for line in lines] == [
        f"gatewayd 0.1.0 is ready (pid {daemon.pid})",
        "stopping on SIGTERM",
        "gatewayd has stopped",
    ]


def test_one_instance(world: World) -> None:
    first = world.start()
    second = world.start(ready=False)
    assert second.wait(10) == 73
    last = world.log.read_text().splitlines()[-2:]
    assert last[0] == f"gatewayd: gatewayd runs already (pid {first.pid}), its sockets are in {world.run}"
    assert last[1].startswith("hint: ")
    assert first.poll() is None


def test_after_kill_the_sockets_are_taken_over(world: World) -> None:
    first = world.start()
    first.kill()
    first.wait()
    assert (world.run / "control.sock").exists()
    second = world.start()
    assert world.get("/v1/status")["pid"] == second.pid


def test_a_start_waits_for_a_stop_in_progress(world: World) -> None:
    world.run.mkdir(mode=0o700)
    with (world.run / "daemon.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        daemon = world.start(ready=False)
        time.sleep(0.5)
        assert daemon.poll() is None
    wait_until(world.answers, "the daemon answers")


def test_shutdown_on_request(world: World) -> None:
    daemon = world.start()
    assert world.get("/v1/shutdown", "POST") == {}
    assert daemon.wait(10) == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_other_signals_stop_as_well(world: World, number: int) -> None:
    daemon = world.start()
    daemon.send_signal(number)
    assert daemon.wait(10) == 0


def test_clients_do_not_hold_the_stop_up(world: World) -> None:
    daemon = world.start()
    with socket.socket(socket.AF_UNIX) as control, socket.socket(socket.AF_UNIX) as connect:
        control.connect(str(world.run / "control.sock"))
        control.sendall(b"GET /v1/status HTTP/1.1\r\n")
        connect.connect(str(world.run / "connect.sock"))
        connect.sendall(b'{"op": ')
        world.get("/v1/status")
        daemon.send_signal(signal.SIGTERM)
        assert daemon.wait(10) == 0
        connect.settimeout(5)
        assert b"the daemon is stopping" in connect.recv(1000)
        assert connect.recv(1000) == b""


def test_requests_in_progress_are_told_of_the_stop(world: World) -> None:
    """Both kinds, while they wait for a service that does not answer."""
    with (
        socket.create_server(("127.0.0.1", 0)) as silent,
        socket.socket(socket.AF_UNIX) as control,
        socket.socket(socket.AF_UNIX) as connect,
    ):
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        daemon = world.start(env={"LANGSMITH_API_KEY": "k", "LANGSMITH_ENDPOINT": endpoint})
        control.connect(str(world.run / "control.sock"))
        control.sendall(b"GET /v1/sandboxes/x HTTP/1.1\r\nHost: x\r\n\r\n")
        connect.connect(str(world.run / "connect.sock"))
        connect.sendall(b'{"op": "ssh", "sandbox": "x"}\n')
        asked = [silent.accept()[0] for _ in range(2)]
        daemon.send_signal(signal.SIGTERM)
        assert daemon.wait(10) == 0
        for sock in (control, connect):
            sock.settimeout(5)
            assert b"the daemon is stopping" in sock.recv(65536)
        for sock in asked:
            sock.close()
    assert "Traceback" not in world.log.read_text()


def test_nothing_of_the_environment_shows(world: World) -> None:
    world.start(env={"LANGSMITH_API_KEY": "very-secret-key", "LANGSMITH_ENDPOINT": "http://127.0.0.1:1"})
    status = world.get("/v1/status")
    assert (status["profile"], status["endpoint"]) == ("env", "http://127.0.0.1:1")
    assert world.get("/v1/sandboxes/x")["error"]["kind"] == "unavailable"
    assert "very-secret-key" not in world.log.read_text() + json.dumps(status)


def test_what_is_wrong_with_the_configuration(world: World) -> None:
    path = world.root / ".config/gatewayd/config.toml"
    path.parent.mkdir(parents=True)
    path.write_text("default_profile = ")
    assert world.start(ready=False).wait(10) == 78
    log = world.log.read_text()
    assert f"gatewayd: {path} is not valid TOML" in log
    assert "Traceback" not in log


def test_a_path_that_is_too_long(world: World) -> None:
    daemon = world.start(ready=False, env={"GATEWAYD_RUNTIME_DIR": str(world.root / ("x" * 100))})
    assert daemon.wait(10) == 78
    assert "the path is longer than 107 bytes" in world.log.read_text()


def test_a_directory_that_cannot_be_made(world: World) -> None:
    (world.root / "file").touch()
    assert world.start(ready=False, env={"GATEWAYD_STATE_DIR": str(world.root / "file/state")}).wait(10) == 78
    assert "cannot make" in world.log.read_text()


def test_ready_and_stopping_are_told_to_the_service_manager(world: World) -> None:
    path = world.root / "notify.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(path))
        manager.settimeout(10)
        daemon = world.start(env={"NOTIFY_SOCKET": str(path)})
        assert manager.recv(100) == b"READY=1"
        daemon.send_signal(signal.SIGTERM)
        assert manager.recv(100) == b"STOPPING=1"
        assert daemon.wait(10) == 0


def test_sockets_of_the_service_manager_are_used_and_left_alone(world: World) -> None:
    world.run.mkdir(mode=0o700)
    listeners = []
    for name in ("connect.sock", "control.sock"):
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.bind(str(world.run / name))
        sock.listen()
        listeners.append(sock)

    def become() -> None:
        for number, sock in enumerate(listeners):
            os.dup2(sock.fileno(), 100 + number)
        for number in range(2):
            os.dup2(100 + number, 3 + number)
        os.environ["LISTEN_PID"] = str(os.getpid())

    wrapper = ["/bin/sh", "-c", 'LISTEN_PID=$$ exec "$0" -P -m gatewayd', sys.executable]
    with world.log.open("ab") as log:
        daemon = subprocess.Popen(
            wrapper,
            env=world.env | {"LISTEN_FDS": "2"},
            stderr=log,
            preexec_fn=become,
            pass_fds=(3, 4),
        )
    world.started.append(daemon)
    wait_until(world.answers, "the daemon answers")
    assert world.get("/v1/status")["pid"] == daemon.pid
    daemon.send_signal(signal.SIGTERM)
    assert daemon.wait(10) == 0
    assert (world.run / "control.sock").exists()
    for sock in listeners:
        sock.close()


def test_listen_sockets_for_another_process() -> None:
    environ = {"LISTEN_PID": "1", "LISTEN_FDS": "1", "LISTEN_FDNAMES": "x", "OTHER": "y"}
    assert sdnotify.listen_sockets(environ) == []
    assert environ == {"OTHER": "y"}


def test_notify_never_fails(tmp_path: Path) -> None:
    for environ in ({}, {"NOTIFY_SOCKET": "relative"}, {"NOTIFY_SOCKET": str(tmp_path / "gone")}, {"NOTIFY_SOCKET": "@gone"}):
        assert sdnotify.notify("READY=1", environ) is False
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        name = f"gatewayd-test-{os.getpid()}"
        manager.bind(f"\0{name}")
        assert sdnotify.notify("READY=1", {"NOTIFY_SOCKET": f"@{name}"}) is True
        assert manager.recv(100) == b"READY=1"


def test_the_command_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == "gatewayd 0.1.0\n"
    assert main(["--help"]) == 0
    assert "gatewayd local --port" in capsys.readouterr().out
    assert main(["--nonsense"]) == 2
    assert "unknown argument '--nonsense'" in capsys.readouterr().err
    assert main(["--log-level", "loud"]) == 2
    assert "unknown log level 'loud'" in capsys.readouterr().err

    def broken(_level: str) -> int:
        raise ValueError("two\nlines")

    monkeypatch.setattr("gatewayd.daemon.main", broken)
    assert main([]) == 70
    err = capsys.readouterr().err
    assert err.startswith("gatewayd: internal error: ValueError: two lines (")
    assert err.count("\n") == 1


def test_a_log_line_is_one_line() -> None:
    try:
        raise ValueError("first\nsecond\x1b[31m")
    except ValueError:
        info = sys.exc_info()
    record = logging.LogRecord("n", logging.ERROR, __file__, 1, "it %s\n", ("failed",), info)
    line = LineFormatter(debug=False).format(record)
    assert line.isprintable()
    assert line.endswith("ERROR n: it failed : ValueError: first second [31m")
    assert "Traceback" in LineFormatter(debug=True).format(record)

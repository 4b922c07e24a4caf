"""The product as a user has it: a private home, the daemon, the embedded service, real programs."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

BIN = Path(sys.executable).parent
NEEDED = ("bwrap", "ssh", "ssh-keygen", "psql", "socat")
missing = [name for name in NEEDED if shutil.which(name) is None]

Done = subprocess.CompletedProcess[str]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests that take minutes run when they are asked for."""
    for item in items:
        slow = item.path.parent == Path(__file__).parent and item.get_closest_marker("slow") is not None
        if slow and "slow" not in config.getoption("markexpr"):
            item.add_marker(pytest.mark.skip(reason="takes minutes: run it with -m slow"))


def wait_until(true: Callable[[], Any], what: str, deadline: float = 20.0) -> Any:
    """Poll something that sends no event; fails when it is not true in time."""
    end = time.monotonic() + deadline
    while not (value := true()):
        assert time.monotonic() < end, f"not within {deadline:.0f} s: {what}"
        time.sleep(0.02)
    return value


class Gateway:
    """One user's world: environment, the two programs, and what they keep."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.home = root / "home"
        self.state = root / "state"
        self.runtime = root / "run"
        self.home.mkdir(mode=0o700)
        (root / "config.toml").touch(mode=0o600)
        keep = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("LANGSMITH", "LANGCHAIN", "XDG_", "GATEWAYD"))
        }
        self.env = {
            **keep,
            "HOME": str(self.home),
            "GATEWAYD_STATE_DIR": str(self.state),
            "GATEWAYD_RUNTIME_DIR": str(self.runtime),
            "GATEWAYD_CONFIG": str(root / "config.toml"),
            "PATH": f"{BIN}:{os.environ['PATH']}:/usr/sbin",
            "PYTHONASYNCIODEBUG": "1",
        }

    def sandbox(
        self, *args: str, code: int = 0, stdin: str | bytes | None = "", env: dict[str, str] | None = None, timeout: float = 60
    ) -> Done:
        """Run `sandbox ARGS`; the exit code must be `code`."""
        text = not isinstance(stdin, bytes)
        done = subprocess.run(
            [BIN / "sandbox", *args],
            env={**self.env, **(env or {})},
            input=stdin,
            capture_output=True,
            text=text,
            timeout=timeout,
            check=False,
        )
        assert done.returncode == code, f"sandbox {' '.join(args)}: exit {done.returncode}\n{done.stdout!r}\n{done.stderr!r}"
        assert "Traceback" not in (done.stderr if text else done.stderr.decode("utf-8", "replace"))
        return done

    def json(self, *args: str, **options: Any) -> Any:
        """What `sandbox ARGS` printed, decoded."""
        return json.loads(self.sandbox(*args, **options).stdout)

    def sh(self, name: str, script: str, **options: Any) -> str:
        """Output of a shell script inside a sandbox."""
        return str(self.sandbox("exec", name, "--", "sh", "-ec", script, **options).stdout)

    def run(self, *argv: str | Path, code: int = 0, timeout: float = 60, **options: Any) -> Any:
        """Run another program in this user's world."""
        done = subprocess.run(argv, env=self.env, capture_output=True, timeout=timeout, check=False, **options)
        assert done.returncode == code, f"{argv}: exit {done.returncode}\n{done.stdout!r}\n{done.stderr!r}"
        return done

    def ssh(self, program: str, *args: str | Path, code: int = 0, timeout: float = 60, **options: Any) -> Any:
        """Run ssh, scp, sftp with this user's configuration (they look the home up in passwd, not in $HOME)."""
        return self.run(program, "-F", self.home / ".ssh" / "config", *args, code=code, timeout=timeout, **options)

    @contextlib.contextmanager
    def tunnel(self, name: str, remote: int, *args: str) -> Iterator[Tunnel]:
        """`sandbox tunnel` in the foreground, on a port of its choice unless `args` say otherwise."""
        local = () if "--local-port" in args else ("--local-port", "0")
        process = subprocess.Popen(
            [BIN / "sandbox", "tunnel", name, "--remote-port", str(remote), *local, *args],
            env=self.env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            yield Tunnel(process)
        finally:
            process.send_signal(signal.SIGINT)
            process.communicate(timeout=20)

    @property
    def daemon_pid(self) -> int:
        return int(self.json("status")["pid"])

    @property
    def service(self) -> dict[str, Any]:
        """The embedded service's endpoint.json."""
        return dict(json.loads((self.state / "local" / "endpoint.json").read_text()))

    @property
    def api_key(self) -> str:
        return (self.state / "local" / "api-key").read_text().strip()


class Tunnel:
    """A running `sandbox tunnel`."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        assert process.stdout is not None
        assert process.stderr is not None
        line = process.stdout.readline()
        assert line, f"the tunnel did not open: {process.stderr.read()}"
        self.address: str = json.loads(line)["address"]
        self.port: int = json.loads(line)["port"]
        self.complaints: list[str] = []  # lines on stderr so far
        self._reader = threading.Thread(target=self._read, args=(process.stderr,), daemon=True)
        self._reader.start()

    def _read(self, stream: Any) -> None:
        with contextlib.suppress(ValueError):  # closed under us at the end
            for line in stream:
                self.complaints.append(line)

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=30)


def live_descendants(root: Path) -> list[str]:
    """Processes whose environment or command line names this test's root folder."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if str(root) in " ".join(process.cmdline()):
                found.append(f"{process.pid} {' '.join(process.cmdline())[:120]}")
    return found


def new_gateway() -> Iterator[Gateway]:
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")
    root = Path(tempfile.mkdtemp(prefix="gw-", dir="/tmp"))  # short: a Unix socket's path holds 107 bytes
    gateway = Gateway(root)
    try:
        yield gateway
        names = (
            [box["name"] for box in gateway.json("list", timeout=60)["sandboxes"]] if (gateway.state / "local").exists() else []
        )
        if names:
            gateway.sandbox("delete", "--yes", *names)
    finally:
        gateway.sandbox("down")
        wait_until(lambda: not live_descendants(root), f"nothing left running: {live_descendants(root)}")
        mounts = [line for line in Path("/proc/self/mounts").read_text().splitlines() if str(root) in line]
        assert mounts == []
        subprocess.run(["rm", "-rf", str(root)], check=True)


@contextlib.contextmanager
def service_on(archive: Path) -> Iterator[Gateway]:
    """A gateway whose sandboxes are made on the root file system in `archive`, by a service of their own."""
    for gateway in new_gateway():
        state = gateway.root / "based"
        argv = [sys.executable, "-m", "gatewayd", "local", "--state-dir", str(state), "--base", str(archive)]
        with (gateway.root / "based.log").open("wb") as log:
            service = subprocess.Popen(argv, env=gateway.env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log)
        try:
            assert service.stdout is not None
            endpoint = json.loads(service.stdout.readline())["endpoint"]
            profile = f'[profiles.based]\nendpoint = "{endpoint}"\napi_key_file = "{state}/api-key"\n'
            (gateway.root / "config.toml").write_text(f'default_profile = "based"\n\n{profile}')
            yield gateway
            for box in gateway.json("list")["sandboxes"]:
                gateway.sandbox("delete", "--yes", box["name"])
            gateway.sandbox("down")
        finally:
            service.terminate()
            service.wait(20)
            if service.stdout is not None:
                service.stdout.close()


@pytest.fixture(scope="module")
def gateway() -> Iterator[Gateway]:
    """One gateway for a file's tests."""
    yield from new_gateway()


@pytest.fixture
def own_gateway() -> Iterator[Gateway]:
    """A gateway for one test that breaks things."""
    yield from new_gateway()


def make(gateway: Gateway, name: str) -> str:
    gateway.sandbox("create", name, "--wait")
    return name


@pytest.fixture(scope="module")
def box(gateway: Gateway) -> str:
    """One sandbox for a file's tests."""
    return make(gateway, "box")


WAIT_FOR_PORT = """
i=0
until grep -q ' 0[0-9A-F]*:{port:04X} 0*:0000 0A' /proc/net/tcp /proc/net/tcp6; do
    i=$((i + 1))
    [ $i -lt 500 ]
    sleep 0.02
done
"""


def listening(gateway: Gateway, name: str, port: int) -> None:
    """Wait until something listens on a port inside."""
    gateway.sh(name, WAIT_FOR_PORT.format(port=port))


def serve(gateway: Gateway, name: str, port: int, argv: Sequence[str]) -> None:
    """Start a server inside that outlives the command, and wait until it listens."""
    command = " ".join(f"'{word}'" for word in argv)
    gateway.sh(name, f"setsid {command} </dev/null >/dev/null 2>&1 &")
    listening(gateway, name, port)

"""A Docker daemon for tests: this machine's own if there is one, else a private one with nothing outside its folder."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from gatewayd.local.runtime.gvisor import ARGUMENTS, RUNSC

RUNNING = Path("/var/run/docker.sock")
_START_DEADLINE = 20.0  # seconds for a daemon to answer
_STOP_DEADLINE = 20.0


def _find_runsc() -> Path | None:
    """gVisor's runsc: where $GATEWAYD_RUNSC says, else as `make runsc` builds it, else on $PATH."""
    built = Path(__file__).parents[2] / ".runsc" / RUNSC
    named = os.environ.get("GATEWAYD_RUNSC") or (built if built.exists() else shutil.which(RUNSC))
    return Path(named).absolute() if named else None


RUNSC_PATH = _find_runsc()
Runtimes = Mapping[str, Sequence[str]]  # names that a daemon gives to runsc, and the arguments it passes to it
GVISOR: Runtimes = {RUNSC: ARGUMENTS} if RUNSC_PATH is not None else {}


class Unavailable(Exception):
    """There can be no daemon here; the message says why."""


def answers(path: Path) -> bool:
    """Whether a daemon answers there."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(5)
        sock.connect(str(path))
        sock.sendall(b"GET /_ping HTTP/1.1\r\nHost: docker\r\nConnection: close\r\n\r\n")
        return b" 200 " in sock.recv(64)
    return False


@contextlib.contextmanager
def daemon() -> Iterator[Path]:
    """The socket of a daemon. Raises Unavailable."""
    if answers(RUNNING):
        yield RUNNING
    else:
        with private(GVISOR) as path:
            yield path


@contextlib.contextmanager
def private(runtimes: Runtimes) -> Iterator[Path]:
    """The socket of a daemon of our own, with no runtimes but these and its default. Raises Unavailable."""
    if os.geteuid() != 0:
        raise Unavailable("no Docker daemon that this user may use, and only root can start one")
    if shutil.which("dockerd") is None:
        raise Unavailable("Docker is not installed (apt-get install --no-install-recommends docker.io)")
    folder = Path(tempfile.mkdtemp(prefix="gatewayd-docker-"))
    try:
        with contextlib.ExitStack() as stack:
            try:
                path = stack.enter_context(_start(folder, "overlay2", runtimes))
            except Unavailable:  # no overlay on this file system, as in a container
                path = stack.enter_context(_start(folder, "vfs", runtimes))
            yield path
    finally:
        _unmount(folder)
        shutil.rmtree(folder)


@contextlib.contextmanager
def _start(folder: Path, driver: str, runtimes: Runtimes) -> Iterator[Path]:
    path = folder / "docker.sock"
    listed = {name: {"path": str(RUNSC_PATH), "runtimeArgs": list(arguments)} for name, arguments in runtimes.items()}
    (folder / "daemon.json").write_text(json.dumps({"runtimes": listed}))  # not this machine's own configuration
    group = folder.name
    command = [
        *("setpriv", "--pdeathsig", "TERM", "--", "dockerd"),
        *("--config-file", str(folder / "daemon.json"), "--host", f"unix://{path}", "--pidfile", str(folder / "pid")),
        *("--data-root", str(folder / "data"), "--exec-root", str(folder / "exec"), "--cgroup-parent", group),
        *("--iptables=false", "--ip6tables=false", "--ip-forward=false", "--ip-masq=false", "--bridge=none"),
        *("--storage-driver", driver),
    ]
    log = folder / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True)
    try:
        deadline = time.monotonic() + _START_DEADLINE
        while not answers(path):
            if process.poll() is not None or time.monotonic() > deadline:
                said = log.read_text(errors="replace").strip().splitlines()[-1:]
                raise Unavailable(f"a private Docker daemon does not start: {' '.join(said)[:300]}")
            time.sleep(0.05)
        yield path
    finally:
        process.terminate()
        try:
            process.wait(_STOP_DEADLINE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        for parent in Path("/sys/fs/cgroup").glob(f"*/{group}"):
            with contextlib.suppress(OSError):
                parent.rmdir()


def _unmount(folder: Path) -> None:
    """What a daemon leaves mounted, such as its own network namespace."""
    points = [line.split(" ")[1] for line in Path("/proc/self/mounts").read_text().splitlines()]
    for point in reversed(points):
        if Path(point).is_relative_to(folder):
            subprocess.run(["umount", "--lazy", point], check=False)

"""The embedded service as a real process, and the unmodified LangSmith SDK as its client."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx2
import psutil
import pytest
from langsmith.sandbox import AsyncSandboxClient, SandboxClient

from tests.chaos.remains import groups

START_DEADLINE = 30.0  # seconds; it takes half of one
STOP_DEADLINE = 10.0  # seconds the service itself promises


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything here needs bubblewrap and is about another implementation's client."""
    here = str(Path(__file__).parent)
    for item in items:
        if str(item.path).startswith(here):
            item.add_marker(pytest.mark.interop)
            if shutil.which("bwrap") is None:
                item.add_marker(pytest.mark.skip(reason="bubblewrap is not installed"))


class Service:
    """``gatewayd local`` in a process of its own."""

    options: tuple[str, ...] = ("-X", "dev")  # of its Python
    python = sys.executable  # what runs it
    variables: Mapping[str, str] = {}  # in its environment beside, or instead of, the test run's
    user: tuple[str, ...] = ()  # the words that make it another user's

    def __init__(self, state_dir: Path, *args: str, wrapper: Sequence[str] = ()) -> None:
        self.state_dir = state_dir
        self.log = state_dir.parent / f"{state_dir.name}.log"
        env = {name: value for name, value in os.environ.items() if not name.startswith(("LANGSMITH", "LANGCHAIN", "PYTHONWARN"))}
        env |= self.variables
        command = [
            *wrapper,
            *self.user,
            self.python,
            *self.options,
            "-m",
            "gatewayd",
            "local",
            "--state-dir",
            str(state_dir),
            *(args or ("--port", "0")),
        ]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log, env=env)
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.process.wait(STOP_DEADLINE)
            self.process.stdout.close()
            raise AssertionError(f"the service did not start:\n{self.text()}")
        said = json.loads(line)
        self.endpoint: str = said["endpoint"]
        assert said["pid"] == self.process.pid
        key_file = said["api_key_file"]  # with a wrapper it may be in a mount namespace of the service's own
        self.key = Path(f"/proc/{self.process.pid}/root{key_file}" if wrapper else key_file).read_text().strip()

    def text(self) -> str:
        """Its log so far."""
        return self.log.read_text(errors="replace")

    def client(self, **options: Any) -> Any:
        """The SDK's client for it."""
        return SandboxClient(**{"api_endpoint": f"{self.endpoint}/v2/sandboxes", "api_key": self.key, **options})

    def async_client(self) -> Any:
        """The SDK's asynchronous client for it."""
        return AsyncSandboxClient(api_endpoint=f"{self.endpoint}/api/v2/sandboxes", api_key=self.key)

    def http(self, **headers: str) -> httpx2.Client:
        """A plain client, for what the SDK does not show."""
        return httpx2.Client(base_url=self.endpoint, headers={"X-Api-Key": self.key, **headers}, timeout=30)

    def stop(self, number: int = signal.SIGTERM) -> None:
        """End it in order: exit code 0, in time, nothing left on standard output, nothing alarming in the log."""
        assert self.process.stdout is not None
        if self.process.poll() is None:
            self.process.send_signal(number)
        code = self.process.wait(STOP_DEADLINE)
        rest = self.process.stdout.read()
        self.process.stdout.close()
        assert code == 0, self.text()
        assert rest == b""
        log = self.text()
        for word in ("Traceback", "ERROR", "Warning", "never retrieved", "was destroyed"):
            assert word not in log, log
        assert self.key not in log
        assert not (self.state_dir / "endpoint.json").exists()
        assert groups(self.state_dir) == set()

    def kill(self) -> None:
        """SIGKILL."""
        assert self.process.stdout is not None
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()


def wait_until(true: Callable[[], Any], what: str, deadline: float = 15.0) -> Any:
    """Poll something that sends no event."""
    end = time.monotonic() + deadline
    while not (value := true()):
        assert time.monotonic() < end, f"not within {deadline:g} s: {what}"
        time.sleep(0.02)
    return value


def descendants(pid: int) -> list[psutil.Process]:
    """Every process below one."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).children(recursive=True)
    return []


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """One service for all tests that leave it as they found it. At the end it stops in order and leaves no process."""
    running = Service(tmp_path_factory.mktemp("service") / "state")
    try:
        yield running
        left = [process.pid for process in descendants(running.process.pid)]
        running.stop()
        assert not [pid for pid in left if psutil.pid_exists(pid)]
    finally:
        if running.process.poll() is None:
            running.kill()


@pytest.fixture(scope="session")
def client(service: Service) -> Iterator[Any]:
    """The SDK's client."""
    with service.client() as made:
        yield made


_numbers = itertools.count(1)


@pytest.fixture
def name() -> str:
    """A name no other sandbox has."""
    return f"test-{os.getpid()}-{next(_numbers)}"


@pytest.fixture(scope="module")
def sandbox(client: Any) -> Iterator[Any]:
    """One sandbox for the tests of a module that do not change what it is."""
    with client.sandbox(name=f"shared-{os.getpid()}-{next(_numbers)}") as made:
        yield made


@pytest.fixture
def own_service(tmp_path: Path) -> Iterator[Callable[..., Service]]:
    """Start services on the same state directory, for tests that end them. What still runs is ended in order."""
    started: list[Service] = []

    def start(*args: str, wrapper: Sequence[str] = ()) -> Service:
        started.append(Service(tmp_path / "state", *args, wrapper=wrapper))
        return started[-1]

    yield start
    for one in started:
        if one.process.poll() is None:
            one.stop()

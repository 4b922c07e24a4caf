"""LangSmith's JavaScript SDK on the machine's own Node, against the embedded service."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.images.maker import Image, Layer
from tests.sdk.conftest import Service

HERE = Path(__file__).parent
INSTALL_DEADLINE = 90  # seconds
SCENARIO_DEADLINE = 60  # seconds
OLDEST_NODE = 20  # what the SDK asks for

Run = Callable[..., dict[str, Any]]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything here is about another implementation's client."""
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker(pytest.mark.interop)


def _need(program: str) -> str:
    found = shutil.which(program)
    if found is None:
        pytest.skip(f"{program} is not installed")
    return found


@pytest.fixture(scope="session")
def workshop(request: pytest.FixtureRequest) -> Path:
    """A folder with the scenarios and, by `npm ci`, what they import; in pytest's cache for as long as the lock file stays."""
    node, npm = _need("node"), _need("npm")
    version = subprocess.run([node, "--version"], capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    if int(version.removeprefix("v").partition(".")[0]) < OLDEST_NODE:
        pytest.skip(f"node is {version}, and the SDK needs {OLDEST_NODE}")
    assert request.config.cache is not None
    digest = hashlib.sha256((HERE / "package-lock.json").read_bytes()).hexdigest()[:16]
    folder = Path(request.config.cache.mkdir(f"node-{digest}"))
    done = folder / "installed"
    for source in (*HERE.glob("*.mjs"), *HERE.glob("package*.json")):
        shutil.copy(source, folder / source.name)
    if not done.exists():
        command = [npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund"]
        try:
            result = subprocess.run(
                command,
                cwd=folder,
                capture_output=True,
                text=True,
                check=False,
                timeout=INSTALL_DEADLINE,
                stdin=subprocess.DEVNULL,
            )
        except subprocess.TimeoutExpired:
            pytest.skip(f"npm ci did not end within {INSTALL_DEADLINE} s: is the registry reachable?")
        if result.returncode != 0:
            if any(
                word in result.stderr
                for word in ("ENOTFOUND", "EAI_AGAIN", "ECONNREFUSED", "ETIMEDOUT", "ENETUNREACH", "ECONNRESET")
            ):
                pytest.skip("npm ci cannot reach the registry")
            pytest.fail(f"npm ci: {result.stderr}")
        done.touch()
    return folder


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """One service for all scenarios; at the end it stops in order."""
    if shutil.which("bwrap") is None:
        pytest.skip("bubblewrap is not installed")
    running = Service(tmp_path_factory.mktemp("node") / "state")
    try:
        yield running
        running.stop()
    finally:
        if running.process.poll() is None:
            running.kill()


@pytest.fixture(scope="session")
def image(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An image of one file, as a client asks for it."""
    layer = Layer().add("note", b"hello").content()
    return f"oci-archive:{Image([layer]).archive(tmp_path_factory.mktemp('image') / 'image.tar')}"


@pytest.fixture
def scenario(workshop: Path, service: Service, image: str) -> Run:
    """Run a scenario's script; what it printed, read as JSON."""

    def run(name: str) -> dict[str, Any]:
        env = {key: value for key, value in os.environ.items() if not key.startswith(("LANGSMITH", "LANGCHAIN", "NODE_"))}
        env |= {"ENDPOINT": service.endpoint, "KEY": service.key, "NAME": f"node-{name}", "IMAGE": image}
        result = subprocess.run(
            ["node", f"{name}.mjs"],
            cwd=workshop,
            env=env,
            capture_output=True,
            text=True,
            check=False,
            timeout=SCENARIO_DEADLINE,
            stdin=subprocess.DEVNULL,
        )
        assert result.returncode == 0, result.stderr
        assert result.stderr == ""
        answer: dict[str, Any] = json.loads(result.stdout)
        return answer

    return run

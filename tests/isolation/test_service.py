"""The embedded service itself, tried from inside one of its sandboxes."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap is not installed")


class Service:
    """A running `gatewayd local`."""

    def __init__(self, state: Path) -> None:
        self.state = state
        self.process = subprocess.Popen(
            [sys.executable, "-m", "gatewayd", "local", "--port", "0", "--state-dir", str(state)],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert self.process.stdout is not None
        self.endpoint: str = json.loads(self.process.stdout.readline())["endpoint"]
        self.key = (state / "api-key").read_text().strip()

    def ask(self, method: str, url: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """One request with the key; an absolute URL or a path of the control plane."""
        request = urllib.request.Request(
            url if url.startswith("http") else f"{self.endpoint}/v2/sandboxes{url}",
            method=method,
            data=json.dumps(body).encode() if body is not None else None,
            headers={"X-Api-Key": self.key, "Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            text = answer.read()
        return dict(json.loads(text)) if text else {}


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    service = Service(tmp_path / "local")
    yield service
    service.process.send_signal(signal.SIGTERM)
    service.process.wait(20)
    assert service.process.stdout is not None
    service.process.stdout.close()


ATTEMPTS = """
import json, os, socket
port, state = PORT, STATE
found = {}
def attempt(name, function, *arguments):
    try:
        function(*arguments)
        found[name] = "done"
    except OSError as exc:
        found[name] = type(exc).__name__
for address in ("127.0.0.1", "127.0.0.2", "::1", "0.0.0.0"):
    attempt(address, lambda: socket.create_connection((address, port), timeout=2).close())
for name in ("", "/api-key", "/state.db", "/endpoint.json", "/lock"):
    attempt("file " + name, os.stat, state + name)
found["environment"] = any("api" in name.lower() and "key" in name.lower() for name in os.environ)
print(json.dumps(found))
"""


def test_its_own_api_is_out_of_reach(service: Service) -> None:
    box = service.ask("POST", "/boxes", {"name": "inside", "wait_for_ready": True})
    port = int(service.endpoint.rpartition(":")[2])
    script = ATTEMPTS.replace("PORT", str(port)).replace("STATE", repr(str(service.state)))
    done = service.ask(
        "POST", f"{box['dataplane_url']}/execute", {"command": f"python3 - <<'EOF'\n{script}\nEOF", "shell": "/bin/sh"}
    )
    assert done["exit_code"] == 0, done
    found = json.loads(done["stdout"])
    assert found.pop("environment") is False
    assert set(found.values()) <= {"ConnectionRefusedError", "FileNotFoundError"}, found
    shown = service.ask("POST", f"{box['dataplane_url']}/execute", {"command": "env; cat /proc/*/cmdline /proc/*/environ"})
    assert service.key not in json.dumps(shown)


def test_a_neighbours_data_plane_needs_the_key(service: Service) -> None:
    box = service.ask("POST", "/boxes", {"name": "inside", "wait_for_ready": True})
    good, service.key = service.key, "x" * 43
    with pytest.raises(urllib.error.HTTPError) as caught:
        service.ask("POST", f"{box['dataplane_url']}/execute", {"command": "id"})
    assert caught.value.code == 401
    caught.value.close()
    service.key = good
    service.ask("DELETE", "/boxes/inside")

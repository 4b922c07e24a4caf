"""A gateway and a service of its own, and between them a relay that breaks connections."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

from tests.chaos.cutter import Cutter
from tests.e2e.conftest import Gateway, new_gateway
from tests.e2e.sshworld import SshWorld

KEEPALIVE = 'keepalive_interval = {interval}\nkeepalive_timeout = {timeout}\ndefault_profile = "cut"\n\n'
PROFILE = '[profiles.cut]\nendpoint = "http://127.0.0.1:{port}"\napi_key_file = "{state}/api-key"\n'
STOP_DEADLINE = 30.0  # seconds for the service to stop


class World:
    """All there is to a test of broken links."""

    def __init__(self, gateway: Gateway, cutter: Cutter) -> None:
        self.gateway = gateway
        self.cutter = cutter
        self.ssh = SshWorld(gateway)


@contextlib.contextmanager
def world(*, interval: float = 15.0, timeout: float = 10.0) -> Iterator[World]:
    """Start it all; `interval` and `timeout` of the daemon's keepalives, in seconds."""
    with contextlib.contextmanager(new_gateway)() as gateway:
        del gateway.env["PYTHONASYNCIODEBUG"]  # a third of the speed
        state = gateway.root / "service"
        argv = [sys.executable, "-m", "gatewayd", "local", "--state-dir", str(state)]
        with (gateway.root / "service.log").open("wb") as log:
            service = subprocess.Popen(argv, env=gateway.env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log)
        try:
            assert service.stdout is not None
            port = urlsplit(json.loads(service.stdout.readline())["endpoint"]).port
            assert port is not None
            with Cutter(port) as cutter:
                text = KEEPALIVE.format(interval=interval, timeout=timeout) + PROFILE.format(port=cutter.port, state=state)
                (gateway.root / "config.toml").write_text(text)
                gateway.sandbox("list")  # starts the daemon
                yield World(gateway, cutter)
                for box in gateway.json("list")["sandboxes"]:
                    gateway.sandbox("delete", "--yes", box["name"])
                gateway.sandbox("down")
                assert complaints(gateway.state / "daemon.log") == []
                assert complaints(gateway.root / "service.log") == []
        finally:
            service.terminate()
            service.wait(STOP_DEADLINE)
            if service.stdout is not None:
                service.stdout.close()


def complaints(log: Path) -> list[str]:
    """Lines about what must not happen, whatever the links do."""
    return [line for line in log.read_text(errors="replace").splitlines() if " ERROR " in line or "Traceback" in line]

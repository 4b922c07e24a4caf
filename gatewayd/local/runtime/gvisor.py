"""gVisor, by Docker: a daemon that lists `runsc` among its runtimes runs the same containers on gVisor's own kernel.

Ports are reached through the relay inside, since the network stack is gVisor's too.
"""

from __future__ import annotations

from pathlib import Path

from gatewayd.local.runtime.docker import DEFAULT_SOCKET, DockerRuntime

RUNSC = "runsc"  # what gVisor's installation calls itself in Docker's daemon.json


class GvisorRuntime(DockerRuntime):
    """Boxes by gVisor. `start` raises RuntimeFailure where the daemon does not have it."""

    name = RUNSC

    def __init__(self, state_dir: Path, socket_path: Path = DEFAULT_SOCKET) -> None:
        super().__init__(state_dir, socket_path, oci_runtime=RUNSC)

"""gVisor, by Docker: a daemon that lists `runsc` among its runtimes runs the same containers on gVisor's own kernel.

What differs from the `docker` runtime:

- ports are reached through the relay inside, since the network stack is gVisor's too;
- a sandbox that uses more memory than its limit ends as a whole: the kernel that would pick one process is inside the limit;
- there are no raw sockets, as runsc drops CAP_NET_RAW of itself;
- a terminal has no name inside: `tty` says "not a tty", although it is one, and /dev/tty works.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from gatewayd.local.runtime import docker_checks
from gatewayd.local.runtime.base import Finding, RuntimeFailure
from gatewayd.local.runtime.docker import DEFAULT_SOCKET, DockerRuntime

RUNSC = "runsc"  # what gVisor's installation calls itself in Docker's daemon.json
# Without the first, gVisor keeps what is written to a sandbox's disk in a layer of its own, and drops it with the last process.
# Without the second, its loopback interface is a copy of Docker's, which has no ::1.
ARGUMENTS = ("--overlay2=none", "--network=none")
_EMPTY = "ro,noexec,nosuid,nodev,mode=555"
_INSTALL = f"as root, `runsc install -- {' '.join(ARGUMENTS)}`, then restart Docker"


class GvisorRuntime(DockerRuntime):
    """Boxes by gVisor. `start` raises RuntimeFailure where the daemon does not have it, or has it lose files."""

    name = RUNSC
    # gVisor does not mask paths (`docker._MASKED`), so its /sys, and the control groups that Docker mounts there, are covered
    tmpfs: ClassVar[dict[str, str]] = {**DockerRuntime.tmpfs, "/sys": _EMPTY, "/sys/fs/cgroup": _EMPTY}

    def __init__(self, state_dir: Path, socket_path: Path = DEFAULT_SOCKET) -> None:
        super().__init__(state_dir, socket_path, oci_runtime=RUNSC)

    async def check(self) -> list[Finding]:
        """What this machine offers and what it lacks, for people to read. Changes nothing, never raises."""
        try:
            info = await self._info()
        except RuntimeFailure as exc:
            return docker_checks.unreachable(str(exc))
        return [*docker_checks.findings(info, RUNSC), *_findings(info)]

    def _check_runtime(self, info: dict[str, Any]) -> None:
        super()._check_runtime(info)
        if ARGUMENTS[0] in _missing(info):
            raise RuntimeFailure(
                f"cannot start the sandbox: Docker runs {RUNSC} without {ARGUMENTS[0]}, so its files would not survive a stop"
                f" ({_INSTALL})"
            )


def _arguments(info: dict[str, Any]) -> set[str] | None:
    """What the daemon that describes itself by `info` passes to runsc, each as ``--flag=value``; None: it does not list runsc."""
    runtimes = info.get("Runtimes")
    entry = runtimes.get(RUNSC) if isinstance(runtimes, dict) else None
    if not isinstance(entry, dict):
        return None
    given = entry.get("runtimeArgs")
    words = [f"--{word.lstrip('-')}" for word in given if isinstance(word, str)] if isinstance(given, list) else []
    return set(words)


def _missing(info: dict[str, Any]) -> list[str]:
    """Which of ARGUMENTS the daemon does not pass."""
    given = _arguments(info) or set()
    return [word for word in ARGUMENTS if word not in given]


def _findings(info: dict[str, Any]) -> list[Finding]:
    if _arguments(info) is None:
        detail = "not listed by the daemon: sandboxes do not start"
        return [Finding(RUNSC, False, detail, f"install gVisor; {_INSTALL}")]
    missing = _missing(info)
    found = [Finding(RUNSC, True, "listed by the daemon")]
    for word, what, good, bad in (
        (ARGUMENTS[0], "files", "survive a stop", "would not survive a stop: sandboxes do not start"),
        (ARGUMENTS[1], "::1", "every sandbox has it", "no sandbox has it"),
    ):
        lacking = word in missing
        found.append(Finding(what, not lacking, f"without {word}: {bad}" if lacking else good, _INSTALL if lacking else ""))
    return found

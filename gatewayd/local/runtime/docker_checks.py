"""What a Docker daemon can and cannot do for sandboxes, in words."""

from __future__ import annotations

import os
from typing import Any

from gatewayd.local.runtime.base import BoxSpec, Finding
from gatewayd.local.runtime.docker_api import printable

_LIMITS = (("MemoryLimit", "memory limits"), ("CpuCfsQuota", "CPU limits"), ("PidsLimit", "process limits"))
_REMEDY_LIMITS = "give Docker the control groups it lacks: see `docker info`"


def unenforced(spec: BoxSpec, info: dict[str, Any]) -> str:
    """What of the spec's limits the daemon that describes itself by `info` does not enforce; "" when all is."""
    missing = []
    if spec.mem_bytes is not None and not info.get("MemoryLimit"):
        missing.append("mem_bytes")
    if spec.vcpus is not None and not info.get("CpuCfsQuota"):
        missing.append("vcpus")
    if spec.fs_capacity_bytes is not None:
        missing.append("fs_capacity_bytes")
    if not info.get("PidsLimit"):
        missing.append("the number of processes")
    return f"not enforced by Docker on this machine: {', '.join(missing)}" if missing else ""


def findings(info: dict[str, Any], oci_runtime: str | None) -> list[Finding]:
    """What `info` means for sandboxes. `oci_runtime`: as `DockerRuntime` takes it."""
    version = printable(str(info.get("ServerVersion", "of unknown version")))
    found = [Finding("docker", True, f"daemon {version}, storage {printable(str(info.get('Driver')))}")]
    for field, what in _LIMITS:
        ok = bool(info.get(field))
        found.append(Finding(what, ok, "enforced" if ok else "not enforced", "" if ok else _REMEDY_LIMITS))
    found.append(Finding("disk limits", False, "not enforced by this runtime", "use the native runtime as root"))
    entered = oci_runtime is None and os.geteuid() == 0
    found.append(Finding("ports", True, "reached directly" if entered else "reached through python3 inside the sandbox"))
    return found


def unreachable(reason: str) -> list[Finding]:
    """There is no daemon to ask."""
    return [Finding("docker", False, reason, "install and start it (apt-get install docker.io), or join the group of its socket")]

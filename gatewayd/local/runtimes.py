"""Which runtime to use, and what it finds on this machine. Runtimes are imported when they are chosen."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from gatewayd.local.envelope import printable
from gatewayd.local.runtime.base import Finding, Runtime

NAMES = ("native", "docker", "runsc")  # the first is the default


def make_runtime(name: str, state_dir: Path, base: Path | None = None) -> Runtime:
    """The runtime of that name, one of NAMES; `base` is for the first alone."""
    if name == "docker":
        from gatewayd.local.runtime.docker import DockerRuntime

        return DockerRuntime(state_dir)
    if name == "runsc":
        from gatewayd.local.runtime.gvisor import GvisorRuntime

        return GvisorRuntime(state_dir)
    from gatewayd.local.runtime.native import NativeRuntime

    return NativeRuntime(state_dir, base)


def table(findings: Iterable[Finding]) -> str:
    """Findings for people: one line each, and the remedy below."""
    rows = list(findings)
    width = max((len(finding.what) for finding in rows), default=0)
    lines = []
    for finding in rows:
        mark = "ok     " if finding.ok else "MISSING"
        lines.append(f"{mark}  {printable(finding.what):<{width}}  {printable(finding.detail)}")
        if not finding.ok and finding.remedy:
            lines.append(f"{'':7}  {'':<{width}}  → {printable(finding.remedy)}")
    return "\n".join(lines) + "\n"

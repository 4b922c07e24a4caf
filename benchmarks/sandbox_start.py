"""How long a sandbox of the native runtime takes: create → first output, a command in a running one, stop.

    python benchmarks/sandbox_start.py [--runs N] [--as USER]

Prints a table on stderr and one JSON object on stdout: milliseconds, median and spread. As root, `--as USER` measures that user's
rootless sandboxes as well; the user needs a range in /etc/subuid and a Python that it may run (`--python`).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import pwd
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from gatewayd.local.runtime.base import Box, BoxSpec, SpawnSpec
from gatewayd.local.runtime.native import NativeRuntime

Figures = dict[str, dict[str, float]]


async def first_output(box: Box) -> None:
    """A command, until its first output has arrived."""
    process = await box.spawn(SpawnSpec(["/bin/echo", "x"]))
    loop = asyncio.get_running_loop()
    readable = asyncio.Event()
    loop.add_reader(process.stdout, readable.set)
    await readable.wait()
    loop.remove_reader(process.stdout)
    assert os.read(process.stdout, 16) == b"x\n"
    for fd in (process.stdin, process.stdout, process.stderr):
        if fd is not None:
            os.close(fd)


async def measure(runs: int) -> dict[str, list[float]]:
    """Milliseconds of every run."""
    found: dict[str, list[float]] = {"create": [], "create, limits": [], "exec": [], "stop": []}
    with tempfile.TemporaryDirectory(prefix="sandbox-start-") as state:
        runtime = NativeRuntime(Path(state))
        await runtime.recover()
        plain = BoxSpec("warm", "bench")
        limited = BoxSpec("warm", "bench", vcpus=1, mem_bytes=1 << 30, fs_capacity_bytes=8 << 30)
        for number in range(-1, runs):  # the first makes the base layer
            for name, spec in (("create", plain), ("create, limits", limited)):
                started = time.perf_counter()
                box = await runtime.start(spec)
                await first_output(box)
                created = time.perf_counter()
                for _ in range(5):
                    before = time.perf_counter()
                    await first_output(box)
                    if number >= 0:
                        found["exec"].append((time.perf_counter() - before) * 1000)
                before = time.perf_counter()
                await box.stop(0.1)
                if number >= 0:
                    found[name].append((created - started) * 1000)
                    found["stop"].append((time.perf_counter() - before) * 1000)
                await runtime.remove("warm")
        await runtime.aclose()
    return found


def summary(values: list[float]) -> dict[str, float]:
    """Median and spread."""
    ordered = sorted(values)
    tenth = max(0, len(ordered) // 10)
    return {
        "median": round(statistics.median(ordered), 1),
        "p10": round(ordered[tenth], 1),
        "p90": round(ordered[-1 - tenth], 1),
        "max": round(ordered[-1], 1),
        "runs": len(ordered),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description="Time sandboxes of the native runtime.")
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--as", dest="user", help="measure this user's sandboxes too (as root)")
    parser.add_argument("--python", default="/usr/bin/python3", help="the other user's interpreter")
    parser.add_argument("--quiet", action="store_true", help="no table")
    options = parser.parse_args()
    if shutil.which("bwrap") is None:
        print("bubblewrap is not installed", file=sys.stderr)
        return 69
    kind = "root" if os.getuid() == 0 else "rootless"
    report: dict[str, Figures] = {kind: {name: summary(times) for name, times in asyncio.run(measure(options.runs)).items()}}
    if options.user:
        account = pwd.getpwnam(options.user)
        become = ["setpriv", f"--reuid={account.pw_uid}", f"--regid={account.pw_gid}", "--clear-groups", "--inh-caps=-all"]
        command = [*become, options.python, "-I", __file__, "--runs", str(options.runs), "--quiet"]
        report |= json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True, cwd="/").stdout)
    if not options.quiet:
        print(f"{'ms':24}{'median':>9}{'p10':>9}{'p90':>9}{'max':>9}", file=sys.stderr)
        for who, figures in report.items():
            for name, row in figures.items():
                columns = "".join(f"{row[column]:9.1f}" for column in ("median", "p10", "p90", "max"))
                print(f"{who + ' ' + name:24}{columns}", file=sys.stderr)
    print(json.dumps(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""A command's output over Server-Sent Events: how fast it comes, alone and while the same sandbox does much else.

    python benchmarks/service_output.py [--rate MB/S] [--seconds N] [--most MB/S]

A program in the sandbox writes by its own clock: at `--rate`, which the service should keep up with, and at `--most`, which it
cannot. "Beside" it run, again and again, 100 commands, 1,000 streams of a tunnel and another command's output over a WebSocket.
Prints a table on stderr and one JSON object on stdout.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import shutil
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.chaos.crowd import bulk_by_websocket, many_commands, many_streams, prepare
from tests.chaos.paced import PRODUCER, PROGRAM, STOP, Reader, Report
from tests.sdk.conftest import Service


class Plain(Service):
    """The service as users start it."""

    options = ()


@contextlib.asynccontextmanager
async def beside(service: Service, box: str) -> AsyncIterator[list[float]]:
    """Much else on the same sandbox; how many seconds each round of it took."""
    rounds: list[float] = []

    async def run() -> None:
        while True:
            started = time.monotonic()
            await asyncio.gather(
                many_commands(service, box, 100), many_streams(service, box, 1000), bulk_by_websocket(service, box, 700_000)
            )
            rounds.append(time.monotonic() - started)

    running = asyncio.ensure_future(run())
    try:
        yield rounds
    finally:
        running.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await running


async def output(service: Service, rate: float, seconds: float, *, crowded: bool) -> tuple[Report, list[float]]:
    """One command's output."""
    with service.client() as client, client.sandbox() as made:
        prepare(made)
        made.write(PROGRAM, PRODUCER)
        made.write(STOP, b"")
        async with Reader(service.endpoint, service.key, made.id, rate=rate, seconds=seconds) as reader:
            if not crowded:
                return await reader.report(), []
            async with beside(service, made.id) as rounds:
                return await reader.report(), rounds


async def measure(service: Service, options: argparse.Namespace) -> dict[str, Any]:
    """All four figures."""
    found: dict[str, Any] = {}
    for rate in (options.rate, options.most):
        for crowded in (False, True):
            report, rounds = await output(service, rate * 1e6, options.seconds, crowded=crowded)
            name = f"{rate:g} MB/s wanted, {'beside' if crowded else 'alone'}"
            print(f"{name:28} {report}; {len(rounds)} rounds", file=sys.stderr)
            found[name] = {**vars(report), "rate": round(report.rate, 1), "rounds": [round(one, 2) for one in rounds]}
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description="Time the output of commands.")
    parser.add_argument("--rate", type=float, default=20.0)
    parser.add_argument("--most", type=float, default=1000.0)
    parser.add_argument("--seconds", type=float, default=6.0, help="of output at the rate wanted")
    options = parser.parse_args()
    if shutil.which("bwrap") is None:
        print("bubblewrap is not installed", file=sys.stderr)
        return 69
    with tempfile.TemporaryDirectory(prefix="service-output-") as folder:
        service = Plain(Path(folder) / "state")
        try:
            print(json.dumps(asyncio.run(measure(service, options))))
        finally:
            service.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())

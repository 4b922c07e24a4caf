"""How much memory the embedded service holds while it has nothing to do: fresh, and after work that it has finished.

    python benchmarks/service_idle.py [--boxes N] [--megabytes N] [--settle SECONDS]

Prints a table on stderr and one JSON object on stdout: megabytes (10^6) of resident memory, its share of what it has in common
with others (PSS), what is its alone (USS), and the peak so far. Every step is measured when its sandboxes are deleted and the
service has been left alone for a while.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx2

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

BOXES = "/v2/sandboxes/boxes"
DEADLINE = 120.0  # seconds for one step
ABREAST = 5  # sandboxes at the same time
KINDS = {"rss": "Rss", "pss": "Pss", "uss": "Private_Clean Private_Dirty"}  # figure → lines of smaps_rollup

Row = dict[str, float]


def memory(pid: int) -> Row:
    """Megabytes that a process holds now."""
    lines = (line.partition(":") for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:])
    kib = {name: int(rest.split()[0]) for name, _, rest in lines}
    row = {kind: sum(kib[name] for name in names.split()) * 1024 / 1e6 for kind, names in KINDS.items()}
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    row["peak"] = int(status["VmHWM"].split()[0]) * 1024 / 1e6
    return {kind: round(value, 1) for kind, value in row.items()}


class Measurement:
    """The service, its client, and the figures so far."""

    def __init__(self, pid: int, http: httpx2.AsyncClient, settle: float) -> None:
        self._pid = pid
        self._http = http
        self._settle = settle  # seconds that the service is left alone before it is measured
        self.rows: dict[str, Row] = {}  # step → figures

    async def note(self, step: str) -> None:
        """Measure."""
        await asyncio.sleep(self._settle)
        self.rows[step] = memory(self._pid)

    async def _ask(self, method: str, path: str, **options: Any) -> httpx2.Response:
        answer = await self._http.request(method, path, **options)
        assert answer.is_success, f"{method} {path}: {answer.status_code} {answer.text}"
        return answer

    async def _create(self) -> str:
        return str((await self._ask("POST", BOXES, json={"wait_for_ready": True})).json()["id"])

    async def one_life(self) -> None:
        """A sandbox from its creation to its end."""
        box = await self._create()
        answer = await self._ask("POST", f"/dataplane/{box}/execute", json={"command": "echo x"})
        assert answer.json()["stdout"] == "x\n"
        await self._ask("DELETE", f"{BOXES}/{box}")

    async def lives(self, count: int) -> None:
        """That many lives, ABREAST at a time."""
        limit = asyncio.Semaphore(ABREAST)

        async def one() -> None:
            async with limit:
                await self.one_life()

        await asyncio.gather(*(one() for _ in range(count)))

    async def transfer(self, megabytes: int) -> None:
        """A file in and out again, and as much of a command's output."""
        box = await self._create()
        content, size = bytes(10**6) * megabytes, megabytes * 10**6
        await self._ask("POST", f"/dataplane/{box}/upload", params={"path": "/root/file"}, files={"file": ("f", content)})
        got = 0
        async with self._http.stream("GET", f"/dataplane/{box}/download", params={"path": "/root/file"}) as answer:
            async for chunk in answer.aiter_raw():
                got += len(chunk)
        assert got == size
        await self._output(box, size)
        await self._ask("DELETE", f"{BOXES}/{box}")

    async def _output(self, box: str, size: int) -> None:
        body: dict[str, Any]
        path, body = "start", {"command": "cat /root/file", "command_id": "cat"}
        event, offset = "", 0
        while event != "exit":
            async with self._http.stream("POST", f"/dataplane/{box}/execute/stream/{path}", json=body) as answer:
                async for line in answer.aiter_lines():
                    if line.startswith("event: "):
                        event = line.removeprefix("event: ")
                    elif line.startswith("data: ") and event in ("stream_end", "ack_required"):
                        data = json.loads(line.removeprefix("data: "))
                        offset = max(offset, data.get("stdout_offset", 0), data.get("offset", 0))
            path, body = "resume", {"command_id": "cat", "stdout_offset": offset, "stderr_offset": 0}
        assert offset == size


async def measure(state: Path, options: argparse.Namespace) -> dict[str, Row]:
    """Every step on one service, started as users start it."""
    command = [sys.executable, "-m", "gatewayd", "local", "--state-dir", str(state), "--port", "0"]
    service = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL, cwd=Path(__file__).parent.parent
    )
    try:
        assert service.stdout is not None
        said = json.loads(await service.stdout.readline())
        headers = {"X-Api-Key": Path(said["api_key_file"]).read_text().strip()}
        async with httpx2.AsyncClient(base_url=said["endpoint"], headers=headers, timeout=DEADLINE) as http:
            measurement = Measurement(service.pid, http, options.settle)
            await measurement.note("fresh")
            await measurement.one_life()
            await measurement.note("after 1 sandbox")
            await measurement.lives(options.boxes)
            await measurement.note(f"after {options.boxes} sandboxes")
            await measurement.transfer(options.megabytes)
            await measurement.note(f"after 3 x {options.megabytes} MB")
            await measurement.lives(options.boxes)
            await measurement.note(f"after {options.boxes} more")
        return measurement.rows
    finally:
        service.terminate()
        assert await service.wait() == 0


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure the idle memory of the embedded service.")
    parser.add_argument("--boxes", type=int, default=50, help="sandboxes created and deleted in one step")
    parser.add_argument("--megabytes", type=int, default=100, help="size of a transfer")
    parser.add_argument("--settle", type=float, default=2.0, help="seconds before each measurement")
    options = parser.parse_args()
    if shutil.which("bwrap") is None:
        print("bubblewrap is not installed", file=sys.stderr)
        return 69
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="service-idle-") as folder:
        rows = asyncio.run(measure(Path(folder) / "state", options))
    print(f"{'MB':24}" + "".join(f"{kind:>8}" for kind in (*KINDS, "peak")), file=sys.stderr)
    for step, row in rows.items():
        print(f"{step:24}" + "".join(f"{value:8.1f}" for value in row.values()), file=sys.stderr)
    print(f"{time.monotonic() - started:.0f} s", file=sys.stderr)
    print(json.dumps(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())

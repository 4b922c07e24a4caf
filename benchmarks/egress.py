"""What a sandbox's way out costs: the same client on this machine, in a sandbox, and in a sandbox with interception.

    python benchmarks/egress.py [--requests N] [--megabytes N]

An HTTPS server in a process of its own, on an address of this machine. Per way: a new connection with one request, one request on
a connection that is kept (medians), and a download. Prints a table on stderr and one JSON object on stdout.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import ssl
import subprocess
import sys
import tempfile
from ipaddress import ip_address
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import uvloop

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from gatewayd.local.boxes import Boxes
from gatewayd.local.clock import Clock
from gatewayd.local.egress.addresses import Address, Reach
from gatewayd.local.egress.service import Egress
from gatewayd.local.execution import spawn
from gatewayd.local.models import CommandBody, CreateBody
from gatewayd.local.runtime.native import NativeRuntime
from gatewayd.local.store import Store
from tests.egress.servers import certificates, own_address, serving

CLIENT = """
import http.client, json, ssl, statistics, sys, time
host, port, requests, megabytes = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
context = ssl._create_unverified_context()
def once(connection, path="/x"):
    started = time.perf_counter()
    connection.request("GET", path)
    size = 0
    answer = connection.getresponse()
    while data := answer.read(1 << 18):
        size += len(data)
    return time.perf_counter() - started, size
def new():
    return http.client.HTTPSConnection(host, port, context=context)
fresh = [once(new())[0] for _ in range(requests // 5)]
kept = new()
again = [once(kept)[0] for _ in range(requests)]
seconds = size = 0
while size < megabytes << 20:
    took, got = once(kept, "/big")
    seconds, size = seconds + took, size + got
new_ms, kept_ms = statistics.median(fresh) * 1e3, statistics.median(again) * 1e3
print(json.dumps({"new_ms": new_ms, "kept_ms": kept_ms, "mb_s": size / seconds / 1e6}))
"""
RULE = {"name": "r", "match_hosts": ["api.test"], "headers": [{"name": "X", "type": "plaintext", "value": "v"}]}


def serve(pipe: Connection, address: str, certificate: Path) -> None:
    """The server's process."""
    with serving(address, certificate) as server:
        pipe.send(server.port)
        pipe.recv()


async def inside(boxes: Boxes, config: dict[str, Any] | None, arguments: list[str]) -> dict[str, float]:
    """The client in a new sandbox."""
    sandbox = await boxes.create(CreateBody.model_validate({"wait_for_ready": True, "proxy_config": config}))
    if sandbox.run is None or sandbox.run.gate is None:
        raise SystemExit(f"egress: no network: {sandbox.record.status_message}")
    command = CommandBody(command=f"exec python3 -c '{CLIENT}' {' '.join(arguments)}")
    process = await spawn(sandbox.run.box, sandbox.record, command)
    os.close(process.stdin)
    code = await process.exited
    said = os.read(process.stdout, 65536)
    if code != 0 or process.stderr is None:
        raise SystemExit(f"egress: the client failed: {os.read(process.stderr or process.stdout, 4096).decode()}")
    os.close(process.stdout)
    os.close(process.stderr)
    await boxes.delete(sandbox)
    return dict(json.loads(said))


async def measure(folder: Path, address: str, ca: Path, port: int, amounts: list[str]) -> dict[str, dict[str, float]]:
    """Every way in turn."""

    async def lookup(_name: str) -> list[Address]:
        return [ip_address(address)]

    def trust() -> ssl.SSLContext:
        return ssl.create_default_context(cafile=str(ca))

    store, clock = Store(folder / "state.db"), Clock()
    boxes = Boxes(store, NativeRuntime(folder), clock, {}, Egress(store, clock, Reach([address]), lookup, trust))
    await boxes.recover()
    arguments = [str(port), *amounts]
    try:
        command = [sys.executable, "-c", CLIENT, address, *arguments]
        direct = await asyncio.to_thread(subprocess.run, command, capture_output=True, check=True)
        return {
            "direct": json.loads(direct.stdout),
            "passed through": await inside(boxes, None, ["api.test", *arguments]),
            "intercepted": await inside(boxes, {"rules": [RULE]}, ["api.test", *arguments]),
        }
    finally:
        await boxes.aclose()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--megabytes", type=int, default=64)
    args = parser.parse_args()
    address = own_address()
    if not address:
        raise SystemExit("egress: this machine has no address but its loopback")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o700)
        ca, certificate = certificates(folder)
        ours, theirs = multiprocessing.Pipe()
        server = multiprocessing.Process(target=serve, args=(theirs, address, certificate))
        server.start()
        try:
            amounts = [str(args.requests), str(args.megabytes)]
            result = uvloop.run(measure(folder, address, ca, ours.recv(), amounts))
        finally:
            ours.send(None)
            server.join()
    sys.stderr.write(f"{'':<16}{'new connection':>16}{'request':>12}{'download':>14}\n")
    for way, row in result.items():
        sys.stderr.write(f"{way:<16}{row['new_ms']:>13.1f} ms{row['kept_ms']:>9.2f} ms{row['mb_s']:>9.0f} MB/s\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()

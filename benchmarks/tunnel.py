"""A port of a sandbox, reached through `sandbox tunnel` and through LangSmith's Python SDK, on the embedded service, in one run.

usage: python benchmarks/tunnel.py [ROUNDS]

Prints medians and ratios: bulk down and up (MB/s), echo of 64 bytes (ms, p50 and p99), connect to first byte (ms).
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from langsmith.sandbox import SandboxClient

BIN = Path(sys.executable).parent
BULK = 128 << 20  # bytes of one bulk transfer
ECHOES = 500  # round trips of one echo run
CONNECTS = 100

SERVER = """
import socket, threading
BULK = 128 << 20
def serve(port, handle):
    server = socket.create_server(("127.0.0.1", port), backlog=128)
    def loop():
        while True:
            sock, _ = server.accept()
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            threading.Thread(target=handle, args=(sock,), daemon=True).start()
    threading.Thread(target=loop).start()
def source(sock):
    block = bytes(1 << 20)
    for _ in range(BULK >> 20):
        sock.sendall(block)
    sock.close()
def sink(sock):
    left, view = BULK, memoryview(bytearray(1 << 20))
    while left:
        left -= sock.recv_into(view)
    sock.sendall(b"k")
    sock.close()
def echo(sock):
    while data := sock.recv(65536):
        sock.sendall(data)
    sock.close()
for port, handle in ((9001, source), (9002, sink), (9003, echo)):
    serve(port, handle)
print("ready", flush=True)
"""


def down(port: int) -> float:
    """MB/s from the sandbox."""
    view = memoryview(bytearray(1 << 20))
    with socket.create_connection(("127.0.0.1", port)) as sock:
        start, left = time.perf_counter(), BULK
        while left:
            left -= sock.recv_into(view)
        return BULK / 1e6 / (time.perf_counter() - start)


def up(port: int) -> float:
    """MB/s into the sandbox, counted when the last byte has arrived there."""
    block = bytes(1 << 20)
    with socket.create_connection(("127.0.0.1", port)) as sock:
        start = time.perf_counter()
        for _ in range(BULK >> 20):
            sock.sendall(block)
        assert sock.recv(1) == b"k"
        return BULK / 1e6 / (time.perf_counter() - start)


def echoes(port: int) -> list[float]:
    """Round trips of 64 bytes, in ms."""
    found = []
    with socket.create_connection(("127.0.0.1", port)) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for _ in range(ECHOES):
            start = time.perf_counter()
            sock.sendall(b"x" * 64)
            left = 64
            while left:
                left -= len(sock.recv(left))
            found.append((time.perf_counter() - start) * 1000)
    return sorted(found)


def connects(port: int) -> float:
    """Connect to first byte back, median in ms."""
    found = []
    for _ in range(CONNECTS):
        start = time.perf_counter()
        with socket.create_connection(("127.0.0.1", port)) as sock:
            sock.sendall(b"x")
            sock.recv(1)
        found.append((time.perf_counter() - start) * 1000)
    return statistics.median(found)


MEASURES: list[tuple[str, str, Callable[[dict[int, int]], float]]] = [
    ("bulk down", "MB/s", lambda ports: down(ports[9001])),
    ("bulk up", "MB/s", lambda ports: up(ports[9002])),
    ("echo p50", "ms", lambda ports: echoes(ports[9003])[ECHOES // 2]),
    ("echo p99", "ms", lambda ports: echoes(ports[9003])[ECHOES * 99 // 100]),
    ("connect", "ms", lambda ports: connects(ports[9003])),
]


@contextlib.contextmanager
def ours(env: dict[str, str]) -> Iterator[dict[int, int]]:
    """Local ports of `sandbox tunnel`, by remote port."""
    with contextlib.ExitStack() as stack:
        ports = {}
        for remote in (9001, 9002, 9003):
            command: list[str | Path] = [BIN / "sandbox", "tunnel", "bench", "--remote-port", str(remote), "--local-port", "0"]
            process = stack.enter_context(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True))
            stack.callback(process.terminate)
            assert process.stdout is not None
            ports[remote] = json.loads(process.stdout.readline())["port"]
        yield ports


@contextlib.contextmanager
def sdk(state: Path) -> Iterator[dict[int, int]]:
    """Local ports of the SDK's tunnel, by remote port."""
    service = json.loads((state / "local" / "endpoint.json").read_text())
    key = (state / "local" / "api-key").read_text().strip()
    box = SandboxClient(api_endpoint=f"{service['endpoint']}/v2/sandboxes", api_key=key).get_sandbox("bench")
    with contextlib.ExitStack() as stack:
        yield {
            remote: stack.enter_context(box.tunnel(remote, local_port=port)).local_port
            for remote, port in zip((9001, 9002, 9003), _free_ports(3), strict=True)
        }


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        return [stack.enter_context(socket.create_server(("127.0.0.1", 0))).getsockname()[1] for _ in range(count)]


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    with tempfile.TemporaryDirectory(prefix="gw-bench-") as folder:
        state = Path(folder, "state")
        env = {
            **os.environ,
            "GATEWAYD_STATE_DIR": str(state),
            "GATEWAYD_RUNTIME_DIR": f"{folder}/run",
            "GATEWAYD_PROFILE": "local",
        }

        def sandbox(*args: str, text: str = "") -> None:
            subprocess.run([BIN / "sandbox", *args], env=env, input=text, text=True, check=True, stdout=subprocess.DEVNULL)

        try:
            sandbox("create", "bench", "--wait")
            sandbox("exec", "bench", "--", "sh", "-c", "cat > server.py", text=SERVER)
            start = "setsid python3 server.py >log 2>&1 </dev/null & until grep -q ready log; do sleep 0.02; done"
            sandbox("exec", "bench", "--", "sh", "-c", start)
            with ours(env) as our_ports, sdk(state) as sdk_ports:
                found: dict[str, dict[str, list[float]]] = {name: {"ours": [], "sdk": []} for name, *_ in MEASURES}
                for _ in range(rounds):
                    for name, _, measure in MEASURES:
                        for who, ports in (("ours", our_ports), ("sdk", sdk_ports)):
                            found[name][who].append(measure(ports))
        finally:
            sandbox("delete", "bench", "--yes")
            sandbox("down")
    print(f"{'':12} {'ours':>10} {'(min–max)':>18} {'SDK':>10} {'(min–max)':>18} {'ratio':>7}")
    for name, unit, _ in MEASURES:
        mine, theirs = found[name]["ours"], found[name]["sdk"]
        a, b = statistics.median(mine), statistics.median(theirs)
        print(
            f"{name:12} {a:10.2f} {f'({min(mine):.2f}–{max(mine):.2f})':>18}"
            f" {b:10.2f} {f'({min(theirs):.2f}–{max(theirs):.2f})':>18} {a / b:7.2f}  {unit}"
        )


if __name__ == "__main__":
    main()

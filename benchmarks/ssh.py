"""ssh into a sandbox three ways, in one run: through the gateway, to an sshd on this machine's loopback, and the reference way.

usage: python benchmarks/ssh.py [ROUNDS]

The reference opens a WebSocket and a yamux session for each ssh, and speaks to the image's own sshd; here that is LangSmith's
Python SDK as ProxyCommand (its start-up is part of the figure, and is printed by itself). Prints medians: the first ssh after
everything was stopped and a warm one (ms), echo of a keystroke idle and beside a bulk transfer (ms, p50 and p99), sftp and scp
(MB/s).
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

BIN = Path(sys.executable).parent
BULK = 128 << 20  # bytes of one transfer
WARM = 10  # runs of `ssh true`
KEYS = 200  # keystrokes
DEADLINE = 120.0  # seconds for one command

REFERENCE = """
import json, os, socket, sys, threading
from langsmith.sandbox import SandboxClient
endpoint, key_file = sys.argv[1:]
box = SandboxClient(api_endpoint=endpoint + "/v2/sandboxes", api_key=open(key_file).read().strip()).get_sandbox("bench")
with socket.create_server(("127.0.0.1", 0)) as probe:
    port = probe.getsockname()[1]
with box.tunnel(22, local_port=port) as tunnel, socket.create_connection(("127.0.0.1", tunnel.local_port)) as sock:
    def up():
        while data := os.read(0, 65536):
            sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)
    threading.Thread(target=up, daemon=True).start()
    while data := sock.recv(65536):
        view = memoryview(data)
        while view:
            view = view[os.write(1, view):]
os._exit(0)
"""


class Way:
    """One way to a shell."""

    def __init__(self, name: str, folder: Path, options: dict[str, str], restart: Callable[[], None] | None = None) -> None:
        self.name = name
        self.restart = restart  # makes the next ssh a cold one; None: there is no such thing
        self.config = folder / f"{name.replace(' ', '-')}.config"
        fixed = {
            "UserKnownHostsFile": "/dev/null",
            "StrictHostKeyChecking": "no",
            "LogLevel": "ERROR",
            "ControlPath": "none",
            "IdentityAgent": "none",
        }
        self.config.write_text("Host *\n" + "".join(f"  {key} {value}\n" for key, value in {**fixed, **options}.items()))

    def argv(self, program: str, *words: str) -> list[str]:
        return [program, "-F", str(self.config), *words]

    def run(self, program: str, *words: str, text: str = "") -> float:
        """Seconds it took."""
        start = time.perf_counter()
        subprocess.run(self.argv(program, *words), input=text, text=True, check=True, stdout=subprocess.DEVNULL, timeout=DEADLINE)
        return time.perf_counter() - start


def warm(way: Way) -> float:
    return statistics.median(way.run("ssh", "sandbox-bench", "true") for _ in range(WARM)) * 1000


def cold(way: Way) -> float:
    if way.restart is None:
        return float("nan")
    way.restart()
    return way.run("ssh", "sandbox-bench", "true") * 1000


@contextlib.contextmanager
def bulk(way: Way) -> Iterator[None]:
    """Another session that downloads without end."""
    words = way.argv("ssh", "sandbox-bench", "cat /dev/zero")
    with subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as process:
        time.sleep(1)  # until it is in full flow
        yield
        process.kill()


def keystrokes(way: Way) -> list[float]:
    """Round trips of one byte through a terminal, in ms, sorted."""
    command = way.argv("ssh", "-tt", "sandbox-bench", "stty raw -echo; echo go; exec cat")
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        seen = b""
        while b"go" not in seen:
            seen += process.stdout.read(64) or b""
        time.sleep(0.2)
        found = []
        for _ in range(KEYS):
            start = time.perf_counter()
            process.stdin.write(b"k")
            while process.stdout.read(1) != b"k":
                pass
            found.append((time.perf_counter() - start) * 1000)
        process.kill()
    return sorted(found)


def loaded(way: Way) -> list[float]:
    with bulk(way):
        return keystrokes(way)


def rate(program: str, direction: str) -> Callable[[Way], list[float]]:
    def measure(way: Way) -> list[float]:
        local, remote = way.config.with_suffix(".data"), "/tmp/bench-data"
        if not local.exists():
            local.write_bytes(os.urandom(1 << 20) * (BULK >> 20))
        if program == "scp":
            words = [str(local), f"sandbox-bench:{remote}"] if direction == "put" else [f"sandbox-bench:{remote}", str(local)]
            seconds = way.run("scp", "-q", *words)
        else:
            line = f"put {local} {remote}" if direction == "put" else f"get {remote} {local}"
            seconds = way.run("sftp", "-q", "-b", "-", "sandbox-bench", text=line + "\n")
        return [BULK / 1e6 / seconds]

    return measure


MEASURES: list[tuple[str, str, Callable[[Way], float | list[float]]]] = [
    ("ssh true, cold", "ms", cold),
    ("ssh true, warm", "ms", warm),
    ("keystroke", "ms", keystrokes),
    ("keystroke + bulk", "ms", loaded),
    ("sftp put", "MB/s", rate("sftp", "put")),
    ("sftp get", "MB/s", rate("sftp", "get")),
    ("scp put", "MB/s", rate("scp", "put")),
    ("scp get", "MB/s", rate("scp", "get")),
]


@contextlib.contextmanager
def loopback_sshd(folder: Path) -> Iterator[dict[str, str]]:
    """An sshd of our own on this machine, and the options that lead to it."""
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
    (folder / "authorized").write_bytes((folder / "user.pub").read_bytes())
    Path("/run/sshd").mkdir(exist_ok=True)
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    lines = [
        f"Port {port}",
        "ListenAddress 127.0.0.1",
        f"HostKey {folder}/host",
        f"AuthorizedKeysFile {folder}/authorized",
        "StrictModes no",
        "UsePAM no",
        f"PidFile {folder}/sshd.pid",
        "Subsystem sftp internal-sftp",
        "PermitRootLogin prohibit-password",
    ]
    (folder / "sshd_config").write_text("\n".join(lines) + "\n")
    with subprocess.Popen(["/usr/sbin/sshd", "-D", "-q", "-f", folder / "sshd_config"]) as process:
        try:
            for _ in range(500):
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                    break
                time.sleep(0.01)
            yield {"HostName": "127.0.0.1", "Port": str(port), "IdentityFile": f"{folder}/user", "IdentitiesOnly": "yes"}
        finally:
            process.terminate()


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    with tempfile.TemporaryDirectory(prefix="gw-bench-") as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        env = {
            **os.environ,
            "HOME": name,
            "GATEWAYD_STATE_DIR": f"{name}/state",
            "GATEWAYD_RUNTIME_DIR": f"{name}/run",
            "GATEWAYD_PROFILE": "local",
        }
        os.environ.update({key: env[key] for key in ("GATEWAYD_STATE_DIR", "GATEWAYD_RUNTIME_DIR")})

        def sandbox(*args: str) -> None:
            subprocess.run([BIN / "sandbox", *args], env=env, check=True, stdout=subprocess.DEVNULL)

        stack.callback(sandbox, "down")
        sandbox("create", "bench", "--wait", "--idle-ttl", "0")
        stack.callback(sandbox, "delete", "bench", "--yes")
        loopback = stack.enter_context(loopback_sshd(folder))
        (folder / ".ssh").mkdir(mode=0o700)
        sandbox("ssh-setup", "bench", "--direct", "--identity", f"{name}/user.pub")
        service = json.loads((folder / "state/local/endpoint.json").read_text())["endpoint"]
        (folder / "reference.py").write_text(REFERENCE)
        helper = Path(__file__).resolve().parents[1] / "client" / "proxy.py"

        def restart() -> None:
            sandbox("stop", "bench", "--wait")
            sandbox("down")
            sandbox("start", "bench", "--wait")  # the service and the sandbox: not what is measured
            sandbox("down", "--keep-local")

        ways = [
            Way(
                "gateway",
                folder,
                {"User": "sandbox", "ProxyCommand": f"{sys.executable} -I -S {helper} %n", "ProxyUseFdpass": "yes"},
                restart,
            ),
            Way("sshd, loopback", folder, loopback),
            Way(
                "reference",
                folder,
                {
                    "User": "root",
                    "IdentityFile": f"{name}/user",
                    "IdentitiesOnly": "yes",
                    "ProxyCommand": f"{sys.executable} {name}/reference.py {service} {name}/state/local/api-key",
                },
            ),
        ]
        for way in ways:
            way.run("ssh", "sandbox-bench", "true")
        found: dict[tuple[str, str], list[float]] = {}
        for _ in range(rounds):
            for title, _, measure in MEASURES:
                for way in ways:
                    result = measure(way)
                    values = result if isinstance(result, list) else [result]
                    if len(values) > 1:
                        found.setdefault((f"{title} p50", way.name), []).append(values[len(values) // 2])
                        found.setdefault((f"{title} p99", way.name), []).append(values[len(values) * 99 // 100])
                    else:
                        found.setdefault((title, way.name), []).extend(values)
                if title == "ssh true, cold":  # the service's port is another one now
                    service = json.loads((folder / "state/local/endpoint.json").read_text())["endpoint"]
                    text = ways[2].config.read_text()
                    lines = [
                        f"  ProxyCommand {sys.executable} {name}/reference.py {service} {name}/state/local/api-key"
                        if line.startswith("  ProxyCommand")
                        else line
                        for line in text.splitlines()
                    ]
                    ways[2].config.write_text("\n".join(lines) + "\n")
                    sandbox("ssh-setup", "bench", "--direct", "--identity", f"{name}/user.pub")
        started = time.perf_counter()
        subprocess.run([sys.executable, "-c", "import langsmith.sandbox"], check=True)
        start_up = (time.perf_counter() - started) * 1000
    names = [way.name for way in ways]
    units = {title: unit for title, unit, _ in MEASURES}
    print(f"{'':22}" + "".join(f"{name:>18}" for name in names))
    for title in dict.fromkeys(title for title, _ in found):
        unit = units.get(title) or units[title.removesuffix(" p50").removesuffix(" p99")]
        cells = [statistics.median(found[title, name]) for name in names]
        print(f"{title:22}" + "".join(f"{'-' if value != value else f'{value:.2f}':>18}" for value in cells) + f"  {unit}")
    print(f"the reference's start-up (importing the SDK) is {start_up:.0f} ms of its figure")


if __name__ == "__main__":
    main()

"""An ssh configuration of a test's own: the real ssh, the real helper, the gateway's host key; never the user's files."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gatewayd.frontends.ssh.hostkey import public_host_key

from .conftest import Gateway

PROXY = Path(__file__).resolve().parents[2] / "client" / "proxy.py"

Done = subprocess.CompletedProcess[bytes]


class SshWorld:
    """ssh, scp and sftp with one configuration."""

    def __init__(self, gateway: Gateway) -> None:
        self.gateway = gateway
        self.root = gateway.root / "ssh"
        self.root.mkdir(exist_ok=True)
        self.config = self.root / "config"
        gateway.json("status")  # the state directory is there
        (self.root / "known_hosts").write_text(f"gatewayd {public_host_key(gateway.state)}\n")
        self.config.write_text(
            "Host *\n"
            "  User sandbox\n"
            f"  ProxyCommand {sys.executable} -I -S {PROXY} %n\n"
            "  ProxyUseFdpass yes\n"
            "  HostKeyAlias gatewayd\n"
            f"  UserKnownHostsFile {self.root}/known_hosts\n"
            "  GlobalKnownHostsFile none\n"
            "  StrictHostKeyChecking yes\n"
            "  CheckHostIP no\n"
            "  IdentityAgent none\n"
            "  ControlPath none\n"
        )

    def argv(self, *args: str | Path, program: str = "ssh") -> list[str]:
        """A command line of `program`."""
        return [program, "-F", str(self.config), *map(str, args)]

    def run(
        self,
        *args: str | Path,
        program: str = "ssh",
        code: int = 0,
        timeout: float = 60,
        env: dict[str, str] | None = None,
        **options: Any,
    ) -> Done:
        """Run it; the exit code must be `code`."""
        options = {"stdin": subprocess.DEVNULL, **options} if "input" not in options else options
        done = subprocess.run(
            self.argv(*args, program=program),
            env={**self.gateway.env, **(env or {})},
            capture_output=True,
            timeout=timeout,
            check=False,
            **options,
        )
        assert done.returncode == code, f"{args}: exit {done.returncode}\n{done.stdout[-2000:]!r}\n{done.stderr[-2000:]!r}"
        assert b"Traceback" not in done.stderr
        return done

    def popen(self, *args: str | Path, env: dict[str, str] | None = None, **options: Any) -> subprocess.Popen[bytes]:
        """Start ssh."""
        return subprocess.Popen(self.argv(*args), env={**self.gateway.env, **(env or {})}, **options)

    @contextmanager
    def background(self, *args: str | Path) -> Iterator[subprocess.Popen[bytes]]:
        """`ssh ARGS` that says when its forwards stand; ended by closing its standard input."""
        process = self.popen(
            *("-o", "ExitOnForwardFailure=yes"),
            *args,
            *("echo ready; cat",),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        assert process.stdout is not None
        assert process.stderr is not None
        try:
            line = process.stdout.readline()
            assert line == b"ready\n", process.stderr.read()
            yield process
        finally:
            process.communicate(timeout=20)

    def sh(self, command: str, argv: Sequence[str] = ("sh", "-c"), code: int = 0, timeout: float = 60) -> Done:
        """A local shell command in which $SSH stands for ssh with this configuration."""
        env = {**self.gateway.env, "SSH": f"ssh -F {self.config}"}
        done = subprocess.run(
            [*argv, command], env=env, stdin=subprocess.DEVNULL, capture_output=True, timeout=timeout, check=False
        )
        assert done.returncode == code, f"{command}: exit {done.returncode}\n{done.stdout[-2000:]!r}\n{done.stderr[-2000:]!r}"
        return done


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

"""ssh over TCP, as the configuration file sets it up: no helper, public keys."""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from gatewayd.frontends.ssh.hostkey import public_host_key

from .conftest import Gateway, make, new_gateway

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def world() -> Iterator[tuple[Gateway, list[str]]]:
    """A gateway that listens, and the options with which ssh gets in."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
    for gateway in new_gateway():
        key = gateway.root / "key"
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
        (gateway.root / "config.toml").write_text(f'[ssh]\nlisten = "127.0.0.1:{port}"\nauthorized_keys = "key.pub"\n')
        make(gateway, "box")
        known = gateway.root / "known_hosts"
        known.write_text(f"[127.0.0.1]:{port} {public_host_key(gateway.state)}\n")
        options = ("StrictHostKeyChecking=yes", f"UserKnownHostsFile={known}", "IdentityAgent=none", f"Port={port}")
        yield gateway, ["-F", "none", *(word for option in options for word in ("-o", option))]


def test_commands_files_and_users(world: tuple[Gateway, list[str]], tmp_path: Path) -> None:
    gateway, options = world
    run = [*options, "-i", str(gateway.root / "key")]
    assert gateway.run("ssh", *run, "box@127.0.0.1", "uname -n; cat", input=b"in").stdout == b"box\nin"
    assert gateway.run("ssh", *run, "root%box@127.0.0.1", "id -un; echo $SSH_CONNECTION").stdout.startswith(b"root\n127.0.0.1 ")
    source = tmp_path / "source"
    source.write_bytes(bytes(range(256)) * 10_000)
    gateway.run("scp", "-q", *run, source, "box@127.0.0.1:/tmp/there")
    gateway.run("scp", "-q", *run, "box@127.0.0.1:/tmp/there", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == source.read_bytes()


def test_who_has_no_key_stays_out(world: tuple[Gateway, list[str]], tmp_path: Path) -> None:
    gateway, options = world
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / "other"], check=True)
    argv: tuple[str | Path, ...] = ("ssh", *options, "-i", tmp_path / "other", "-o", "BatchMode=yes", "box@127.0.0.1", "true")
    err = gateway.run(*argv, code=255).stderr
    assert b"Permission denied (publickey)" in err


def test_a_sandbox_that_is_none_is_told(world: tuple[Gateway, list[str]]) -> None:
    gateway, options = world
    err = gateway.run("ssh", *options, "-i", gateway.root / "key", "nosuchbox@127.0.0.1", "true", code=255).stderr
    assert b"nosuchbox" in err

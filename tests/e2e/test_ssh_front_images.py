"""ssh into Debian's smallest root file systems: with nothing but python3-minimal, and without any Python."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from . import images
from .conftest import make, service_on
from .sshworld import SshWorld, digest

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(bool(images.missing), reason=f"not installed: {', '.join(images.missing)}"),
]


@pytest.fixture(scope="module")
def minimal() -> Iterator[SshWorld]:
    with service_on(images.root_filesystem(images.PYTHON)) as gateway:
        make(gateway, "box")
        yield SshWorld(gateway)


@pytest.fixture(scope="module")
def plain() -> Iterator[SshWorld]:
    with service_on(images.root_filesystem(images.PLAIN)) as gateway:
        make(gateway, "box")
        yield SshWorld(gateway)


def test_minimal_python_is_enough(minimal: SshWorld, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(os.urandom(5_000_000))
    minimal.run("-q", source, "box:/root/there", program="scp")
    minimal.run("-q", "box:/root/there", tmp_path / "back", program="scp")
    assert digest(tmp_path / "back") == digest(source)
    with source.open("rb") as file:
        assert minimal.run("box", "sha256sum", stdin=file).stdout.decode().split()[0] == digest(source)
    assert minimal.run("-tt", "box", "tty; stty size; exit 3", code=3).stdout.startswith(b"/dev/pts/")
    with minimal.background("-R", "7001:127.0.0.1:1", "box"):
        listeners = minimal.run("box", "cat /proc/net/tcp").stdout
        assert b"0100007F:1B59" in listeners


def test_without_python_text_works(plain: SshWorld) -> None:
    done = plain.run("box", "echo out; echo err >&2; exit 7", code=7)
    assert done.stdout == b"out\n"
    assert done.stderr.splitlines()[0].startswith(b"sandbox: text only")
    assert done.stderr.splitlines()[-1] == b"err"
    assert plain.run("box", "cat", input="grüße\n".encode()).stdout == "grüße\n".encode()
    assert b"/dev/pts/" in plain.run("-tt", "box", "tty").stdout


@pytest.mark.parametrize("protocol", ["-s", "-O"])
def test_without_python_files_are_refused_with_a_reason(plain: SshWorld, tmp_path: Path, protocol: str) -> None:
    (tmp_path / "file").write_bytes(b"\xff")
    err = plain.run("-q", protocol, tmp_path / "file", "box:/tmp/x", program="scp", code=255 if protocol == "-s" else 1).stderr
    assert b"no Python" in err
    assert plain.run("box", "ls /tmp/x 2>/dev/null; true").stdout == b""


def test_without_python_forwards_out_are_refused(plain: SshWorld) -> None:
    err = plain.run("-o", "ExitOnForwardFailure=yes", "-R", "7001:127.0.0.1:1", "box", "true", code=255).stderr
    assert b"remote port forwarding failed" in err

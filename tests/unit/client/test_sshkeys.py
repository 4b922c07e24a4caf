"""Which public key is installed, and what is refused as one."""

from __future__ import annotations

import os
import shutil
import subprocess
from base64 import b64encode
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from client.proxy import Failure
from client.sshkeys import find_identity, parse_key, parse_user


def make_key(comment: str = "me@here", kind: str = "ssh-ed25519", fill: int = 7) -> str:
    blob = len(kind).to_bytes(4, "big") + kind.encode() + (32).to_bytes(4, "big") + bytes([fill]) * 32
    return f"{kind} {b64encode(blob).decode()} {comment}".strip()


@pytest.fixture
def ssh_dir(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """~/.ssh, without an agent."""
    directory = home / ".ssh"
    directory.mkdir()
    return directory


def agent(home: Path, monkeypatch: pytest.MonkeyPatch, output: str) -> None:
    """Put an ssh-add in front that answers with `output`."""
    programs = home / "bin"
    programs.mkdir()
    (home / "listing").write_text(output)
    (programs / "ssh-add").write_text(f'#!/bin/sh\n[ "$1" = -L ] && cat {home}/listing\n')
    (programs / "ssh-add").chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")


def test_a_key() -> None:
    assert parse_key(f"  {make_key()}\n") == make_key()
    assert parse_key(make_key("")) == make_key("")
    assert parse_key(make_key("a\x1b[31mb c")) == make_key("ab c")


@pytest.mark.parametrize(
    "line",
    [
        "",
        "ssh-ed25519",
        "ssh-ed25519 AAAA",
        "ssh-dss AAAAB3NzaC1kc3M=",
        "no-pty " + make_key(),
        'command="x" ' + make_key(),
        make_key(kind="ssh-ed25519").replace("ssh-ed25519 ", "ssh-rsa "),
        "ssh-ed25519 !!!!",
        "ssh-ed25519-cert-v01@openssh.com AAAA",
        "x" * 20000,
    ],
)
def test_what_is_no_key(line: str) -> None:
    with pytest.raises(ValueError):
        parse_key(line)


@given(st.text())
def test_no_key_brings_a_line_of_its_own(comment: str) -> None:
    assert "\n" not in parse_key(make_key(comment.partition("\n")[0]))


def test_the_first_default(ssh_dir: Path) -> None:
    (ssh_dir / "id_rsa.pub").write_text(make_key("rsa") + "\n")
    (ssh_dir / "id_ecdsa.pub").write_text(make_key("ecdsa") + "\n")
    (ssh_dir / "id_ecdsa").write_text("private")
    found = find_identity(None, ssh_dir)
    assert found.keys == (make_key("ecdsa"),)
    assert found.file == ssh_dir / "id_ecdsa"
    (ssh_dir / "id_ed25519.pub").write_text("# a comment\n\n" + make_key("ed"))
    found = find_identity(None, ssh_dir)
    assert found.keys == (make_key("ed"),)
    assert found.file == ssh_dir / "id_ed25519.pub"  # only the agent has the private half


def test_the_named_one(ssh_dir: Path, tmp_path: Path) -> None:
    public = tmp_path / "work.pub"
    public.write_text(make_key())
    (tmp_path / "work").write_text("-----BEGIN OPENSSH PRIVATE KEY-----\n")
    for named in (public, tmp_path / "work"):
        found = find_identity(named, ssh_dir)
        assert (found.keys, found.file) == ((make_key(),), tmp_path / "work")


def test_a_private_key_is_not_sent(ssh_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "work").write_text("-----BEGIN OPENSSH PRIVATE KEY-----\nc2VjcmV0\n")
    with pytest.raises(Failure, match="is a private key") as caught:
        find_identity(tmp_path / "work", ssh_dir)
    assert "c2VjcmV0" not in caught.value.message


@pytest.mark.parametrize(
    ("content", "says"),
    [(b"", "holds 0 keys"), (b"\xff", "not text"), (b"nonsense\n", "not a type"), (b"a\nb\n", "holds 2 keys")],
)
def test_files_that_hold_no_key(ssh_dir: Path, tmp_path: Path, content: bytes, says: str) -> None:
    (tmp_path / "x.pub").write_bytes(content)
    with pytest.raises(Failure, match=says) as caught:
        find_identity(tmp_path / "x.pub", ssh_dir)
    assert caught.value.kind == "config"
    with pytest.raises(Failure, match="cannot read"):
        find_identity(tmp_path / "none.pub", ssh_dir)


def test_the_agent_s(home: Path, ssh_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    agent(home, monkeypatch, f"{make_key('a', fill=1)}\n{make_key('b', fill=2)}\nssh-rsa-cert-v01@openssh.com AAAA c\n")
    found = find_identity(None, ssh_dir)
    assert found.keys == (make_key("a", fill=1), make_key("b", fill=2))
    assert found.file is None


def test_none_at_all(home: Path, ssh_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    agent(home, monkeypatch, "The agent has no identities.\n")
    with pytest.raises(Failure, match="cannot find a public key") as caught:
        find_identity(None, ssh_dir)
    assert "ssh-keygen -t ed25519" in caught.value.hint


@pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="OpenSSH is not installed")
@pytest.mark.parametrize("kind", ["ed25519", "ecdsa", "rsa"])
def test_keys_of_ssh_keygen(ssh_dir: Path, kind: str) -> None:
    path = ssh_dir / f"id_{kind}"
    subprocess.run(["ssh-keygen", "-q", "-t", kind, "-N", "", "-C", "a b", "-f", path], check=True)
    found = find_identity(None, ssh_dir)
    assert found.keys == (path.with_suffix(".pub").read_text().strip(),)
    assert found.file == path


def test_users() -> None:
    assert parse_user("root") == "root"
    for user in ("", "a b", "a\nProxyCommand x", "-x", "a" * 33, None, "%h", 7):
        with pytest.raises(ValueError):
            parse_user(user)

"""Files through the gateway's own ssh server: sftp, scp both ways, rsync, git."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from .conftest import Gateway, make
from .sshworld import SshWorld, digest

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def ssh(gateway: Gateway) -> SshWorld:
    make(gateway, "box")
    return SshWorld(gateway)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A few hundred files with awkward names."""
    tree = tmp_path / "tree"
    for number in range(300):
        folder = tree / f"d{number % 7}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"f {number} ü").write_bytes(os.urandom(number * 10))
    (tree / "link").symlink_to("d1")
    (tree / "run.sh").write_text("#!/bin/sh\n")
    (tree / "run.sh").chmod(0o750)
    (tree / os.fsdecode(b"not-utf8-\xff")).write_text("x")
    return tree


def test_sftp(ssh: SshWorld, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(os.urandom(30_000_001))
    script = f"""
        mkdir /tmp/sftp
        put {source} /tmp/sftp/file
        chmod 600 /tmp/sftp/file
        rename /tmp/sftp/file /tmp/sftp/other
        symlink other /tmp/sftp/link
        ls -l /tmp/sftp
        df /tmp
        get /tmp/sftp/link {tmp_path}/back
        rm /tmp/sftp/link
        rm /tmp/sftp/other
        rmdir /tmp/sftp
    """
    out = ssh.run("-q", "-b", "-", "box", program="sftp", input=script.encode()).stdout.decode()
    assert "30000001" in out
    assert digest(tmp_path / "back") == digest(source)
    done = ssh.run("-q", "-b", "-", "box", program="sftp", input=b"get /nonexistent\n", code=1)
    assert b"not found" in done.stderr


@pytest.mark.parametrize("protocol", ["-s", "-O"])
def test_scp(ssh: SshWorld, tmp_path: Path, tree: Path, protocol: str) -> None:
    (tree / "link").unlink()  # to a directory: scp itself refuses it
    there = f"/tmp/scp{protocol}"
    ssh.run("-q", "-r", "-p", protocol, tree, f"box:{there}", program="scp")
    ssh.run("-q", "-r", "-p", protocol, f"box:{there}", tmp_path / "back", program="scp")
    ssh.sh(f"diff -r {tree} {tmp_path}/back")
    assert (tmp_path / "back" / "run.sh").stat().st_mode & 0o777 == 0o750
    err = ssh.run("-q", protocol, "box:/nonexistent", tmp_path / "x", program="scp", code=1).stderr
    assert b"No such file" in err


def test_rsync(ssh: SshWorld, tmp_path: Path, tree: Path) -> None:
    ssh.sh(f'rsync -a -e "$SSH" {tree}/ box:/tmp/rsync/')
    ssh.sh(f'rsync -a -e "$SSH" box:/tmp/rsync/ {tmp_path}/back')
    ssh.sh(f"diff -r {tree} {tmp_path}/back")
    (tree / "d1").joinpath("new").write_text("new")
    out = ssh.sh(f'rsync -ai --delete -e "$SSH" {tree}/ box:/tmp/rsync/').stdout.decode()
    assert [line.split()[1] for line in out.splitlines() if line.startswith("<f")] == ["d1/new"]


def test_git(ssh: SshWorld, tmp_path: Path) -> None:
    ssh.run("box", "git init -q --bare /tmp/repo.git")
    commands = f"""
        set -e
        export GIT_SSH_COMMAND="$SSH" GIT_CONFIG_GLOBAL=/dev/null
        git clone -q box:/tmp/repo.git {tmp_path}/work
        cd {tmp_path}/work
        git config user.name Ada; git config user.email ada@example.com
        head -c 3000000 /dev/urandom > blob; git add blob; git commit -q -m first
        git push -q origin HEAD:main
        git clone -q -b main box:/tmp/repo.git {tmp_path}/again
        cmp blob {tmp_path}/again/blob
    """
    ssh.sh(commands)
    assert ssh.run("box", "git -C /tmp/repo.git log --format=%s main").stdout == b"first\n"

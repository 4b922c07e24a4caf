"""ssh, scp, sftp and rsync through the gateway, to the sandbox's own sshd (ssh-setup --direct)."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from .conftest import Gateway, make

pytestmark = pytest.mark.e2e

OLD_CONFIG = "# mine\nHost elsewhere\n  Port 2222\n"
HOST = "sandbox-box"


@pytest.fixture(scope="module")
def ssh_box(gateway: Gateway) -> str:
    """A sandbox that `ssh sandbox-box` reaches."""
    ssh = gateway.home / ".ssh"
    ssh.mkdir(mode=0o700)
    (ssh / "config").write_text(OLD_CONFIG)
    gateway.run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", ssh / "id_ed25519")
    name = make(gateway, "box")
    gateway.sh(name, "mkdir -p -m 700 ~/.ssh; echo 'ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIOther other' > ~/.ssh/authorized_keys")
    gateway.sandbox("ssh-setup", name, "--direct")
    return name


def test_the_configuration_is_added_not_replaced(gateway: Gateway, ssh_box: str) -> None:
    text = (gateway.home / ".ssh" / "config").read_text()
    assert text.endswith(OLD_CONFIG)
    assert text.startswith("Include ")
    assert text.count("Include") == 1
    gateway.sandbox("ssh-setup", ssh_box, "--direct")
    assert (gateway.home / ".ssh" / "config").read_text() == text
    keys = gateway.sh(ssh_box, "cat ~/.ssh/authorized_keys").splitlines()
    assert keys[0].endswith("IOther other")
    assert len(keys) == 2
    options = gateway.ssh("ssh", "-G", HOST).stdout.decode()
    assert "proxyusefdpass yes" in options
    assert "stricthostkeychecking true" in options
    assert "forwardagent no" in options
    assert "controlmaster false" in options


def test_commands_streams_and_exit_codes(gateway: Gateway, ssh_box: str) -> None:
    assert gateway.ssh("ssh", HOST, "uname", "-n").stdout == b"box\n"
    gateway.ssh("ssh", HOST, "exit 42", code=42)
    done = gateway.ssh("ssh", HOST, "cat; echo problem >&2", input=b"in")
    assert (done.stdout, done.stderr) == (b"in", b"problem\n")


def test_files_come_and_go(gateway: Gateway, ssh_box: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(os.urandom(20_000_000))
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    gateway.ssh("scp", "-q", source, f"{HOST}:/root/there")
    assert gateway.sh(ssh_box, "sha256sum < /root/there").startswith(digest)
    gateway.ssh("scp", "-q", f"{HOST}:/root/there", tmp_path / "back")
    gateway.ssh("sftp", "-q", "-b", "-", HOST, input=f"get /root/there {tmp_path}/got\n".encode())
    gateway.ssh("scp", "-q", "-O", f"{HOST}:/root/there", tmp_path / "old-protocol")
    for name in ("back", "got", "old-protocol"):
        assert hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() == digest


def test_rsync(gateway: Gateway, ssh_box: str, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    for number in range(200):
        (tree / f"d{number % 7}").mkdir(parents=True, exist_ok=True)
        (tree / f"d{number % 7}" / f"f{number}").write_text(f"{number}\n" * number)
    shell = f"ssh -F {gateway.home}/.ssh/config"
    gateway.run("rsync", "-a", "-e", shell, f"{tree}/", f"{HOST}:/root/tree/")
    gateway.run("rsync", "-a", "-e", shell, f"{HOST}:/root/tree/", tmp_path / "back")
    gateway.run("diff", "-r", tree, tmp_path / "back")


def test_ssh_wakes_a_stopped_sandbox_and_its_sshd(gateway: Gateway, ssh_box: str) -> None:
    gateway.sandbox("stop", ssh_box)
    assert gateway.ssh("ssh", HOST, "echo awake").stdout == b"awake\n"


def test_ssh_starts_the_daemon(gateway: Gateway, ssh_box: str) -> None:
    gateway.sandbox("down", "--keep-local")
    assert gateway.ssh("ssh", HOST, "echo up").stdout == b"up\n"


def test_ssh_to_a_sandbox_that_is_gone_says_so(gateway: Gateway, ssh_box: str) -> None:
    make(gateway, "fleeting")
    gateway.sandbox("ssh-setup", "fleeting", "--direct")
    gateway.sandbox("delete", "fleeting", "--yes")
    err = gateway.ssh("ssh", "sandbox-fleeting", "true", code=255).stderr.decode()
    assert "fleeting" in err
    assert "Traceback" not in err
    gateway.sandbox("ssh-setup", "fleeting", "--remove")


def test_an_impostor_is_noticed(gateway: Gateway, ssh_box: str) -> None:
    gateway.sh(ssh_box, "rm /etc/ssh/ssh_host_*; pkill -x sshd || true")
    err = gateway.ssh("ssh", HOST, "true", code=255).stderr.decode()
    assert "HOST IDENTIFICATION HAS CHANGED" in err or "Host key verification failed" in err
    gateway.sandbox("ssh-setup", ssh_box, "--direct")  # the user says: it is still mine
    gateway.ssh("ssh", HOST, "true")


def test_remove_undoes_it_exactly(gateway: Gateway, ssh_box: str) -> None:
    gateway.sandbox("ssh-setup", ssh_box, "--remove")
    assert (gateway.home / ".ssh" / "config").read_text() == OLD_CONFIG
    assert not (gateway.home / ".ssh" / "gatewayd").exists()
    assert len(gateway.sh(ssh_box, "cat ~/.ssh/authorized_keys").splitlines()) == 1

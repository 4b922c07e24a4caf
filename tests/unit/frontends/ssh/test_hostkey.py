"""The host key: made once, private, and the public half as ssh-keygen sees it."""

from __future__ import annotations

import shutil
import subprocess
import threading
from pathlib import Path

import pytest

from gatewayd.errors import GatewayError
from gatewayd.frontends.ssh.hostkey import host_key_path, private_host_key, public_host_key


def test_it_is_made_once_and_is_private(tmp_path: Path) -> None:
    first = public_host_key(tmp_path)
    assert first.startswith("ssh-ed25519 AAAA")
    assert host_key_path(tmp_path).stat().st_mode & 0o777 == 0o600
    assert public_host_key(tmp_path) == first
    assert [path.name for path in tmp_path.iterdir()] == ["ssh_host_ed25519_key"]


@pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="ssh-keygen is not installed")
def test_ssh_keygen_reads_the_same_public_key(tmp_path: Path) -> None:
    ours = public_host_key(tmp_path)
    done = subprocess.run(["ssh-keygen", "-y", "-f", host_key_path(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout.split()[:2] == ours.split()


def test_all_who_need_it_at_once_get_the_same(tmp_path: Path) -> None:
    keys: list[bytes] = []
    barrier = threading.Barrier(8)

    def need() -> None:
        barrier.wait()
        keys.append(private_host_key(tmp_path))

    threads = [threading.Thread(target=need) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(keys) == 8
    assert len(set(keys)) == 1


def test_a_key_others_can_read_is_refused(tmp_path: Path) -> None:
    public_host_key(tmp_path)
    host_key_path(tmp_path).chmod(0o640)
    with pytest.raises(GatewayError, match="0640") as caught:
        public_host_key(tmp_path)
    assert caught.value.kind == "config"
    assert "chmod 600" in caught.value.hint


CUT_SHORT = b"-----BEGIN OPENSSH PRIVATE KEY-----\nb3BlbnNzaC1r\n-----END OPENSSH PRIVATE KEY-----"


@pytest.mark.parametrize("content", [b"", b"nonsense", CUT_SHORT])
def test_what_is_no_key_is_told(tmp_path: Path, content: bytes) -> None:
    host_key_path(tmp_path).write_bytes(content)
    host_key_path(tmp_path).chmod(0o600)
    with pytest.raises(GatewayError, match="no OpenSSH ssh-ed25519 key"):
        public_host_key(tmp_path)


def test_a_folder_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(GatewayError, match="cannot use the host key"):
        public_host_key(tmp_path / "absent")

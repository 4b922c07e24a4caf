from __future__ import annotations

import base64
import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest

from gatewayd.errors import GatewayError
from gatewayd.sandbox import sshd
from gatewayd.sandbox.accounts import Account
from gatewayd.sandbox.boxes import Directory
from tests.unit.fakeservice import FakeService


def key(name: str = "me@host", fill: int = 7, kind: str = "ssh-ed25519") -> str:
    blob = len(kind).to_bytes(4, "big") + kind.encode() + (32).to_bytes(4, "big") + bytes([fill] * 32)
    return f"{kind} {base64.b64encode(blob).decode()} {name}".strip()


def run(script: str, home: Path, **env: str) -> list[str]:
    """The script under the real /bin/sh, with `home` as the sandbox's."""
    done = subprocess.run(
        ["/bin/sh", "-c", script],
        env={"HOME": str(home), "PATH": "/usr/bin:/bin", **env},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == ""
    return done.stdout.splitlines()


def test_keys_are_added_and_removed_exactly(tmp_path: Path) -> None:
    file = tmp_path / ".ssh/authorized_keys"
    mine, other = key("a $(touch x) `id` \"'\\ *", 1), key("", 2)
    assert run(sshd.ADD_KEYS, tmp_path, GATEWAYD_KEYS=f"{mine}\n{other}") == [f"ADDED {mine}", f"ADDED {other}"]
    assert file.read_text() == f"{mine}\n{other}\n"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700
    assert run(sshd.ADD_KEYS, tmp_path, GATEWAYD_KEYS=f"{mine}\n{other}") == []
    assert run(sshd.REMOVE_KEYS, tmp_path, GATEWAYD_KEYS=mine) == [f"REMOVED {mine}"]
    assert file.read_text() == f"{other}\n"
    assert run(sshd.REMOVE_KEYS, tmp_path, GATEWAYD_KEYS=mine) == []
    assert sorted(path.name for path in file.parent.iterdir()) == ["authorized_keys"]
    assert list(tmp_path.iterdir()) == [file.parent]


def test_what_is_there_is_kept(tmp_path: Path) -> None:
    file = tmp_path / ".ssh/authorized_keys"
    file.parent.mkdir()
    mine = key("mine", 3)
    kept = f'# a comment \\n\n\n  from="1.2.3.4",command="x  y" {key("old", 4)}\n{key("last without newline", 5)}'
    file.write_text(kept)
    file.chmod(0o644)
    assert run(sshd.ADD_KEYS, tmp_path, GATEWAYD_KEYS=mine) == [f"ADDED {mine}"]
    assert file.read_text() == f"{kept}\n{mine}\n"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert run(sshd.ADD_KEYS, tmp_path, GATEWAYD_KEYS=key("another comment", 4)) == []  # the key is there, with options
    assert run(sshd.REMOVE_KEYS, tmp_path, GATEWAYD_KEYS=mine) == [f"REMOVED {mine}"]
    assert file.read_text() == f"{kept}\n"


def test_nothing_to_remove_from(tmp_path: Path) -> None:
    assert run(sshd.REMOVE_KEYS, tmp_path, GATEWAYD_KEYS=key()) == []
    assert list(tmp_path.iterdir()) == []


def test_a_home_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / ".ssh").write_text("not a directory")
    done = subprocess.run(
        ["/bin/sh", "-c", sshd.ADD_KEYS],
        env={"HOME": str(tmp_path), "PATH": "/usr/bin:/bin", "GATEWAYD_KEYS": key()},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith("FAIL cannot write")


def test_the_bring_up_script_is_valid_shell() -> None:
    for script in (sshd.ENSURE_RUNNING, sshd.ADD_KEYS, sshd.REMOVE_KEYS):
        subprocess.run(["/bin/sh", "-n", "-c", script], check=True)


@pytest.mark.parametrize("kind", sorted(sshd.KEY_TYPES))
def test_public_keys(kind: str) -> None:
    line = key("me@host", kind=kind)
    assert sshd.check_public_key(f"  {line.replace(' ', '   ', 1)}\n", "it") == line


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("", "no public key line"),
        ("ssh-ed25519", "no public key line"),
        ("ssh-dss AAAA me", "no public key line"),
        ('command="x" ' + key(), "no public key line"),
        ("ssh-ed25519 AAAA$(id) me", "no public key line"),
        ("ssh-ed25519 AAA me", "cut off or damaged"),
        (key().replace("ssh-ed25519", "ssh-rsa", 1), "does not hold a key of type ssh-rsa"),
        ("ssh-ed25519 AAAAC3NzaC1lZDI1NTE5 me", "does not hold a key"),
        (key("two\nlines"), "control characters"),
        (key("esc\x1b[31m"), "control characters"),
        (key("x" * 20000), "longer than"),
        ("-----BEGIN OPENSSH PRIVATE KEY-----\nb3BlbnNzaC1rZXk", "is a private key"),
    ],
)
def test_what_is_no_public_key(line: str, text: str) -> None:
    with pytest.raises(GatewayError, match=text) as caught:
        sshd.check_public_key(line, "the public key")
    assert caught.value.kind == "usage"
    assert "b3BlbnNzaC1rZXk" not in caught.value.message
    assert caught.value.message.isprintable()


@pytest.mark.parametrize("lines", [None, [], "ssh-ed25519", [3], [key()] * 100])
def test_lists_that_are_none(lines: object) -> None:
    with pytest.raises(GatewayError) as caught:
        sshd.check_public_keys(lines)
    assert caught.value.kind == "usage"


async def test_asking_a_sandbox(service: FakeService, account: Account) -> None:
    service.add_box("x", dataplane_url=f"{service.endpoint}/dp/x")
    bodies: list[dict[str, Any]] = []

    def execute(body: dict[str, Any]) -> dict[str, Any]:
        bodies.append(body)
        lines = ["noise", "USER root", f"HOSTKEY {key('')}", "HOSTKEY ssh-dss AAAA", f"ADDED {key()}", "ADDED something else"]
        return {"stdout": "\n".join(lines), "stderr": "", "exit_code": 0}

    service.execute = execute
    directory = Directory()
    assert await sshd.ensure_running(account, directory, "x") == ("root", [key("")])
    assert await sshd.add_keys(account, directory, "x", [key(), key("b", 9)]) == [key()]
    assert bodies[0]["shell"] == "/bin/sh"
    assert "env" not in bodies[0]
    assert bodies[1]["env"] == {"GATEWAYD_KEYS": f"{key()}\n{key('b', 9)}"}
    assert key() not in bodies[1]["command"]


@pytest.mark.parametrize(
    ("answer", "kind", "text"),
    [
        ({"stdout": "FAIL no-sshd\n", "stderr": "", "exit_code": 0}, "unsupported", "sandbox 'x' has no sshd"),
        ({"stdout": "FAIL not-root\n", "stderr": "", "exit_code": 0}, "unsupported", "do not run as root"),
        ({"stdout": "FAIL sshd: bad\x07 config", "stderr": "", "exit_code": 0}, "failed", "sshd: bad  config"),
        ({"stdout": "", "stderr": "sh: not found\n", "exit_code": 127}, "failed", "sh: not found"),
        ({"stdout": None, "exit_code": 0}, "failed", "the script failed"),
    ],
)
async def test_a_sandbox_that_cannot(
    service: FakeService, account: Account, answer: dict[str, Any], kind: str, text: str
) -> None:
    service.add_box("x", dataplane_url=f"{service.endpoint}/dp/x")
    service.execute = lambda body: answer
    with pytest.raises(GatewayError, match=text) as caught:
        await sshd.ensure_running(account, Directory(), "x")
    assert caught.value.kind == kind

"""ssh-setup once for all sandboxes: ssh to any of them through the gateway's own server, with no key and no sshd inside."""

from __future__ import annotations

from pathlib import Path

import pytest

from .conftest import Gateway, make

pytestmark = pytest.mark.e2e

OLD_CONFIG = "# mine\nUser somebody\nHost elsewhere\n  Port 2222\n"


@pytest.fixture(scope="module")
def ready(gateway: Gateway) -> Gateway:
    """A user who has run `sandbox ssh-setup`, and has a sandbox."""
    ssh = gateway.home / ".ssh"
    ssh.mkdir(mode=0o700)
    (ssh / "config").write_text(OLD_CONFIG)
    gateway.sandbox("ssh-setup")
    make(gateway, "box")
    return gateway


def listed(gateway: Gateway) -> list[str]:
    lines = (gateway.home / ".ssh/gatewayd/config").read_text().splitlines()
    return [line.removeprefix("Host sandbox-") for line in lines if line.startswith("Host sandbox-") and "*" not in line]


def test_ssh_reaches_a_sandbox_made_afterwards(ready: Gateway) -> None:
    ready.ssh("ssh", "sandbox-box", "true")
    assert ready.ssh("ssh", "sandbox-box", "uname", "-n").stdout == b"box\n"
    ready.ssh("ssh", "sandbox-box", "exit 42", code=42)
    assert listed(ready) == ["box"]
    make(ready, "other")
    assert listed(ready) == ["box", "other"]
    assert ready.ssh("ssh", "sandbox-other", "uname", "-n").stdout == b"other\n"
    ready.sandbox("delete", "other", "--yes")
    assert listed(ready) == ["box"]


def test_it_needs_no_key_and_asks_for_none(ready: Gateway, tmp_path: Path) -> None:
    """Not even with keys around that have a passphrase, nor with an agent that offers some."""
    ready.run("ssh-keygen", "-q", "-t", "ed25519", "-N", "secret", "-f", tmp_path / "id")
    done = ready.ssh("ssh", "-v", "-i", tmp_path / "id", "sandbox-box", "id", "-un")
    assert b'using "none"' in done.stderr
    assert b"passphrase" not in done.stderr


def test_the_gateway_is_pinned(ready: Gateway) -> None:
    """A gateway with another key is refused, until ssh-setup is run again."""
    key = ready.state / "ssh_host_ed25519_key"
    ready.sandbox("down", "--keep-local")
    kept = key.read_bytes()
    key.unlink()
    err = ready.ssh("ssh", "sandbox-box", "true", code=255).stderr
    assert b"HOST IDENTIFICATION HAS CHANGED" in err or b"Host key verification failed" in err
    ready.sandbox("ssh-setup")
    ready.ssh("ssh", "sandbox-box", "true")
    assert key.read_bytes() != kept


def test_a_wrong_name_is_told_with_the_nearest_one(ready: Gateway) -> None:
    err = ready.ssh("ssh", "sandbox-bix", "true", code=255).stderr.decode()
    assert "no sandbox named 'bix'" in err
    assert "did you mean 'box'?" in err
    assert ready.ssh("ssh", "sandbox-Box", "uname", "-n").stdout == b"box\n"  # ssh has no capitals in host names


def test_a_profile_without_a_key_is_told(ready: Gateway) -> None:
    config = ready.home / ".ssh/gatewayd/config"
    before = config.read_text()
    config.write_text(before.replace("--profile local", "--profile env"))
    err = ready.ssh("ssh", "sandbox-box", "true", code=255).stderr.decode()
    assert "cannot use profile 'env': LANGSMITH_API_KEY is not set" in err
    config.write_text(before)


def helper(gateway: Gateway, *options: str) -> str:
    """The ProxyCommand of the configuration with `options` more."""
    command = gateway.ssh("ssh", "-G", "sandbox-box").stdout.decode().partition("\nproxycommand ")[2].partition("\n")[0]
    return str(command.replace("proxy.py", " ".join(["proxy.py", *options])))


def test_a_stopped_sandbox_is_started_unless_it_must_not(ready: Gateway) -> None:
    ready.sandbox("stop", "box")
    command = helper(ready, "--no-start")
    refused = ready.ssh("ssh", "-o", f"ProxyCommand={command}", "sandbox-box", "true", code=255).stderr.decode()
    assert "is stopped" in refused
    assert "sandbox start box" in refused
    assert ready.json("status", "box")["status"] == "stopped"
    settings = ready.root / "config.toml"
    settings.write_text("start_on_connect = false\n")
    assert "sandbox start box" in ready.ssh("ssh", "sandbox-box", "true", code=255).stderr.decode()
    assert ready.json("status", "box")["status"] == "stopped"
    settings.write_text("")
    assert ready.ssh("ssh", "sandbox-box", "echo awake").stdout == b"awake\n"


def test_the_status_tells_what_carries_ssh(ready: Gateway) -> None:
    ready.ssh("ssh", "sandbox-box", "true")
    status = ready.json("status", "box")
    assert (status["ssh"], status["link"]["state"]) == ("guest", "up")
    ready.sandbox("stop", "box")
    assert ready.json("status", "box")["status"] == "stopped"  # and stays so
    ready.sandbox("start", "box")


def test_multiplexing_stays_the_user_s_own_choice(ready: Gateway) -> None:
    path = f"ControlPath={ready.root}/mux"
    ready.ssh("ssh", "-o", "ControlMaster=auto", "-o", path, "-o", "ControlPersist=yes", "sandbox-box", "true")
    assert ready.ssh("ssh", "-o", path, "sandbox-box", "echo again").stdout == b"again\n"
    ready.ssh("ssh", "-o", path, "-O", "exit", "sandbox-box")


def test_direct_beside_it(ready: Gateway) -> None:
    ready.run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", ready.home / ".ssh" / "id_ed25519")
    ready.sandbox("ssh-setup", "box", "--direct")
    assert ready.json("status", "box")["ssh"] == "sshd"
    done = ready.ssh("ssh", "-v", "sandbox-box", "uname", "-n")
    assert done.stdout == b"box\n"
    assert b'using "publickey"' in done.stderr
    ready.sandbox("ssh-setup", "box")
    done = ready.ssh("ssh", "-v", "sandbox-box", "true")
    assert b'using "none"' in done.stderr
    assert "ssh-ed25519" not in ready.sh("box", "cat ~/.ssh/authorized_keys 2>/dev/null || true")
    (ready.home / ".ssh/id_ed25519").unlink()
    (ready.home / ".ssh/id_ed25519.pub").unlink()


def test_remove_undoes_it_exactly(ready: Gateway) -> None:
    for options in ([], ["--inline"]):
        ready.sandbox("ssh-setup", *options)
        ready.ssh("ssh", "sandbox-box", "true")
        ready.sandbox("ssh-setup", "--remove")
        assert (ready.home / ".ssh" / "config").read_text() == OLD_CONFIG
        assert [path.name for path in (ready.home / ".ssh").iterdir()] == ["config"]

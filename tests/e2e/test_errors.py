"""What a user can get wrong, or meet: each failure has its message and its exit code, and says nothing secret."""

from __future__ import annotations

import os
import re
import signal
import socket
import stat
from pathlib import Path

import psutil
import pytest

from .conftest import Gateway, serve, wait_until

pytestmark = pytest.mark.e2e

CONFIG = """
[profiles.wrong-key]
endpoint = "{endpoint}"
api_key_file = "{key}"

[profiles.nobody-there]
endpoint = "http://127.0.0.1:{closed}"
api_key_file = "{key}"
"""


def closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@pytest.fixture(scope="module")
def configured(gateway: Gateway, box: str) -> Gateway:
    """Profiles with a wrong key and with nobody listening."""
    key = gateway.root / "wrong-key"
    key.write_text("not-the-key-" + "z" * 20)
    key.chmod(0o600)
    text = CONFIG.format(endpoint=gateway.service["endpoint"], key=key, closed=closed_port())
    (gateway.root / "config.toml").write_text(text)
    gateway.sandbox("down", "--keep-local")
    return gateway


def test_wrong_key(configured: Gateway) -> None:
    err = configured.sandbox("--profile", "wrong-key", "list", code=77).stderr
    assert "key" in err
    assert "not-the-key" not in err


def test_wrong_key_from_the_environment(configured: Gateway) -> None:
    env = {"LANGSMITH_API_KEY": "also-not-the-key", "LANGSMITH_ENDPOINT": configured.service["endpoint"]}
    err = configured.sandbox("list", code=77, env=env).stderr
    assert "also-not-the-key" not in err


def test_right_key_from_the_environment(configured: Gateway, box: str) -> None:
    env = {"LANGSMITH_API_KEY": configured.api_key, "LANGSMITH_ENDPOINT": configured.service["endpoint"]}
    assert box in configured.sandbox("list", env=env).stdout
    assert configured.sandbox("exec", box, "--", "echo", "hi", env=env).stdout == "hi\n"


def test_service_down(configured: Gateway) -> None:
    err = configured.sandbox("--profile", "nobody-there", "list", code=69).stderr
    assert "127.0.0.1" in err


def test_unknown_profile(configured: Gateway) -> None:
    err = configured.sandbox("--profile", "no-such", "list", code=78).stderr
    assert "no-such" in err


@pytest.mark.parametrize(
    "args",
    [
        ["get", "bix"],
        ["stop", "bix"],
        ["exec", "bix", "--", "true"],
        ["tunnel", "bix", "--remote-port", "80", "--stdio"],
        ["delete", "bix", "--yes"],
        ["ssh-setup", "bix"],
    ],
    ids=lambda args: str(args[0]),
)
def test_unknown_sandbox(gateway: Gateway, box: str, args: list[str]) -> None:
    key = gateway.home / ".ssh" / "id_ed25519"
    if not key.exists():
        key.parent.mkdir(mode=0o700, exist_ok=True)
        gateway.run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key)
    err = gateway.sandbox(*args, code=68).stderr
    assert "bix" in err


def test_name_taken(gateway: Gateway, box: str) -> None:
    assert box in gateway.sandbox("create", box, code=73).stderr


@pytest.mark.parametrize("name", ["Box", "-box", "b_x", "x" * 64, "b/../x", "b\nx", ""])
def test_bad_name(gateway: Gateway, box: str, name: str) -> None:
    assert gateway.sandbox("create", "--", name, code=2).stdout == ""


def test_port_in_use(gateway: Gateway, box: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        err = gateway.sandbox("tunnel", box, "--remote-port", "80", "--local-port", str(port), code=73).stderr
    assert str(port) in err
    assert f"pid {os.getpid()}" in err or "in use" in err


def test_nothing_listening(gateway: Gateway, box: str) -> None:
    err = gateway.sandbox("tunnel", box, "--remote-port", "4999", "--stdio", code=76).stderr
    assert "4999" in err
    assert box in err


def test_nothing_listening_behind_a_forward(gateway: Gateway, box: str) -> None:
    with gateway.tunnel(box, 4998) as tunnel:
        with tunnel.connect() as sock, pytest.raises(ConnectionResetError):
            sock.recv(1)
        wait_until(lambda: any("4998" in line for line in tunnel.complaints), "the failure is told")
        serve(gateway, box, 4998, ["socat", "TCP-LISTEN:4998,fork,reuseaddr", "SYSTEM:echo late"])
        with tunnel.connect() as sock, sock.makefile() as file:
            assert file.read() == "late\n"  # the forward outlives a refusal


def test_exit_codes_pass_through_exec(gateway: Gateway, box: str) -> None:
    for code in (0, 1, 42, 255):
        gateway.sandbox("exec", box, "--", "sh", "-c", f"exit {code}", code=code)
    gateway.sandbox("exec", box, "--", "sh", "-c", "kill -9 $$", code=137)
    done = gateway.sandbox("exec", box, "--", "no-such-program", code=127)
    assert "no-such-program" in done.stderr


def test_exec_passes_arguments_and_streams_untouched(gateway: Gateway, box: str) -> None:
    words = ["a b", "'", '"', "$HOME", "*", "\\", "--help", "-x", "", "ü😀"]
    done = gateway.sandbox("exec", box, "--", "printf", "[%s]", *words)
    assert done.stdout == "".join(f"[{word}]" for word in words)
    done = gateway.sandbox("exec", box, "--", "sh", "-c", "cat; echo problem >&2", stdin="through\n" * 10000)
    assert done.stdout == "through\n" * 10000
    assert done.stderr == "problem\n"


def test_a_crashed_daemon_leaves_sockets_that_harm_nobody(own_gateway: Gateway) -> None:
    own_gateway.sandbox("up")
    os.kill(own_gateway.daemon_pid, signal.SIGKILL)
    own_gateway.sandbox("list")


def test_a_config_that_cannot_be_read_is_named(own_gateway: Gateway) -> None:
    config = own_gateway.root / "config.toml"
    config.write_text("[profiles.x\n")
    err = own_gateway.sandbox("list", code=78).stderr
    assert str(config) in err
    config.write_text("")
    own_gateway.sandbox("list")


def test_no_secret_shows_anywhere(own_gateway: Gateway) -> None:
    gateway = own_gateway
    gateway.sandbox("create", "box", "--wait")
    gateway.run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", gateway.home / "key")
    gateway.sandbox("ssh-setup", "box", "--direct", "--identity", str(gateway.home / "key.pub"))
    key = gateway.api_key
    env = {"LANGSMITH_API_KEY": key, "LANGSMITH_ENDPOINT": gateway.service["endpoint"]}
    with gateway.tunnel("box", 22):
        gateway.sandbox("list", env=env)
        gateway.sandbox("exec", "box", "--", "true", env=env)
        for process in Path("/proc").glob("[0-9]*"):
            try:
                assert key.encode() not in (process / "cmdline").read_bytes()
            except (FileNotFoundError, ProcessLookupError):
                continue
    texts = {
        path: path.read_bytes() for path in [*gateway.state.rglob("*.log"), *(gateway.home / ".ssh").rglob("*")] if path.is_file()
    }
    assert any(path.name == "daemon.log" for path in texts)
    assert any(path.name == "config" for path in texts)
    for path, content in texts.items():
        assert key.encode() not in content, path
    assert key not in gateway.sh("box", "env; cat /proc/*/environ 2>/dev/null | tr '\\0' '\\n'")


def test_what_holds_secrets_is_the_users_alone(gateway: Gateway, box: str) -> None:
    for path in (gateway.state, gateway.runtime, gateway.state / "local"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700, path
    for path in (gateway.state / "local" / "api-key", gateway.state / "daemon.log", *gateway.runtime.glob("*.sock")):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path


def test_nothing_listens_off_loopback(gateway: Gateway, box: str) -> None:
    with gateway.tunnel(box, 80) as tunnel:
        ours = {tunnel.port, int(re.sub(r".*:", "", gateway.service["endpoint"]))}
        for connection in psutil.net_connections("tcp"):
            address = connection.laddr
            if connection.status == psutil.CONN_LISTEN and address and address.port in ours:
                assert address.ip == "127.0.0.1"
                ours.discard(address.port)
        assert ours == set()

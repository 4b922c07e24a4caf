"""TCP through `sandbox tunnel`: bulk, half-close, several sandboxes, crashes."""

from __future__ import annotations

import hashlib
import os
import signal
import socket
import subprocess
import threading
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import pytest

from tests.sdk.cutter import Cutter

from .conftest import BIN, Gateway, Tunnel, listening, make, serve, wait_until

pytestmark = pytest.mark.e2e

SIZE = 100_000_000  # bytes of the bulk transfers


def test_100_mb_arrive_unchanged_both_ways(gateway: Gateway, box: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(os.urandom(1_000_000) * (SIZE // 1_000_000))
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    serve(gateway, box, 9000, ["socat", "-u", "TCP-LISTEN:9000,reuseaddr", "CREATE:/root/up"])
    with gateway.tunnel(box, 9000) as tunnel:
        gateway.run("socat", "-u", f"OPEN:{source}", f"TCP:127.0.0.1:{tunnel.port}", timeout=120)
        sum_inside = "until ! pgrep socat >/dev/null; do sleep 0.02; done; sha256sum /root/up | cut -d' ' -f1"
        assert gateway.sh(box, sum_inside).strip() == digest
    serve(gateway, box, 9001, ["socat", "-u", "OPEN:/root/up", "TCP-LISTEN:9001,reuseaddr"])
    with gateway.tunnel(box, 9001) as tunnel:
        down = tmp_path / "down"
        gateway.run("socat", "-u", f"TCP:127.0.0.1:{tunnel.port}", f"CREATE:{down}", timeout=120)
    assert hashlib.sha256(down.read_bytes()).hexdigest() == digest


def test_a_half_closed_connection_gets_its_reply(gateway: Gateway, box: str) -> None:
    # `rev` answers only after the end of its input
    serve(gateway, box, 9002, ["socat", "-t30", "TCP-LISTEN:9002,fork,reuseaddr", "SYSTEM:rev"])
    with gateway.tunnel(box, 9002) as tunnel:
        for word in ("stressed", "x" * 300_000):
            reply = gateway.run("socat", "-t30", "-", f"TCP:127.0.0.1:{tunnel.port}", input=word.encode() + b"\n").stdout
            assert reply == word[::-1].encode() + b"\n"


ENDS_FIRST = """
import pathlib, socket
sock, _ = socket.create_server(("127.0.0.1", 9003)).accept()
sock.shutdown(socket.SHUT_WR)
pathlib.Path("/root/after").write_bytes(sock.makefile("rb").read())
"""


def test_a_server_that_ends_first_still_gets_what_is_sent(gateway: Gateway, box: str) -> None:
    gateway.sandbox("exec", box, "--", "sh", "-c", "cat > /root/server.py", stdin=ENDS_FIRST)
    serve(gateway, box, 9003, ["python3", "/root/server.py"])
    with gateway.tunnel(box, 9003) as tunnel, tunnel.connect() as sock:
        assert sock.recv(10) == b""
        sock.sendall(b"sent after the server's end of file")
        sock.shutdown(socket.SHUT_WR)
        read = "cat /root/after 2>/dev/null || true"
        wait_until(lambda: gateway.sh(box, read).startswith("sent after"), "the late bytes arrive")


def test_two_sandboxes_listen_on_the_same_port(gateway: Gateway, box: str) -> None:
    other = make(gateway, "other")
    for name in (box, other):
        serve(gateway, name, 5432, ["socat", "TCP-LISTEN:5432,fork,reuseaddr", "SYSTEM:uname -n"])
    with gateway.tunnel(box, 5432) as first, gateway.tunnel(other, 5432) as second:
        for tunnel, name in ((first, box), (second, other), (first, box)):
            with tunnel.connect() as sock, sock.makefile() as file:
                assert file.read() == f"{name}\n"


def test_many_connections_share_one_link(gateway: Gateway, box: str) -> None:
    serve(gateway, box, 9004, ["socat", "TCP-LISTEN:9004,fork,reuseaddr,backlog=128", "EXEC:cat"])
    with gateway.tunnel(box, 9004) as tunnel:
        socks = [tunnel.connect() for _ in range(60)]
        for number, sock in enumerate(socks):
            sock.sendall(b"%d\n" % number)
        for number, sock in enumerate(socks):
            with sock, sock.makefile() as file:
                assert file.readline() == f"{number}\n"
        links = [link for link in gateway.json("status")["links"] if link["sandbox"] == box]
        assert len(links) == 1


def test_the_end_of_the_command_is_the_end_of_the_forward(gateway: Gateway, box: str) -> None:
    with gateway.tunnel(box, 9005) as tunnel:
        port = tunnel.port
        tunnel.process.kill()
        tunnel.process.wait(10)

        def refused() -> bool:
            with socket.socket() as sock:
                return sock.connect_ex(("127.0.0.1", port)) != 0

        wait_until(refused, "the port is closed")
    assert gateway.json("status")["forwards"] == []


def test_stdio_is_a_proxy_command(gateway: Gateway, box: str) -> None:
    serve(gateway, box, 9006, ["socat", "-t30", "TCP-LISTEN:9006,fork,reuseaddr", "SYSTEM:rev"])
    done = gateway.sandbox("tunnel", box, "--remote-port", "9006", "--stdio", stdin="desserts\n")
    assert done.stdout == "stressed\n"


def test_a_resumable_connection_outlives_the_link(gateway: Gateway, box: str) -> None:
    serve(gateway, box, 9008, ["socat", "TCP-LISTEN:9008,fork,reuseaddr", "EXEC:cat"])
    data = os.urandom(3_000_000)
    config = gateway.root / "config.toml"
    before = config.read_text()
    with Cutter(urlsplit(gateway.service["endpoint"]).port or 0) as cutter:
        key = gateway.state / "local" / "api-key"
        profile = f'[profiles.cut]\nendpoint = "http://127.0.0.1:{cutter.port}"\napi_key_file = "{key}"\n'
        config.write_text(f"{before}\n{profile}")
        options = ("--resumable", "--profile", "cut")
        with gateway.tunnel(box, 9008, *options) as tunnel, tunnel.connect() as sock, sock.makefile("rb") as file:
            for word in (b"before\n", b"after\n", b"and again\n"):
                sock.sendall(word)
                assert file.readline() == word
                cutter.cut()
            cutter.after = 700_000

            def send() -> None:
                sock.sendall(data)
                sock.shutdown(socket.SHUT_WR)

            sender = threading.Thread(target=send, daemon=True)
            sender.start()
            assert hashlib.sha256(file.read()).digest() == hashlib.sha256(data).digest()
            sender.join(10)
            cutter.after = 1 << 40
            assert cutter.cuts >= 6
        assert tunnel.complaints == []
    config.write_text(before)


def test_stop_and_start_keep_files_and_a_request_wakes(gateway: Gateway) -> None:
    name = make(gateway, "sleeper")
    gateway.sh(name, "echo kept > /root/file")
    gateway.sandbox("stop", name)
    assert gateway.json("get", name)["status"] == "stopped"
    gateway.sandbox("start", name)
    assert gateway.sh(name, "cat /root/file") == "kept\n"
    gateway.sandbox("stop", name)
    assert gateway.sh(name, "cat /root/file") == "kept\n"  # woken by the command itself
    assert gateway.json("get", name)["status"] == "ready"
    gateway.sandbox("stop", name)
    with gateway.tunnel(name, 9007) as tunnel:
        gateway.sandbox("stop", name)
        with tunnel.connect() as sock:
            sock.sendall(b"x")
            wait_until(lambda: gateway.json("get", name)["status"] == "ready", "a connection wakes the sandbox")


def _blast(tunnel: Tunnel, ended: threading.Event) -> threading.Thread:
    """Send without end through the tunnel until it breaks."""

    def send() -> None:
        try:
            with tunnel.connect() as sock:
                while True:
                    sock.sendall(b"x" * 65536)
        except OSError:
            ended.set()

    thread = threading.Thread(target=send, daemon=True)
    thread.start()
    return thread


def _transfer_runs(gateway: Gateway, name: str) -> None:
    wait_until(lambda: int(gateway.sh(name, "stat -c %s /root/sink 2>/dev/null || echo 0")) > 5_000_000, "bytes flow")


def test_killed_in_mid_transfer_all_comes_back(own_gateway: Gateway) -> None:
    gateway = own_gateway
    name = make(gateway, "victim")
    gateway.sh(name, "echo precious > /root/file; sync")
    sink = ["socat", "-u", "TCP-LISTEN:9000,fork,reuseaddr", "CREATE:/root/sink"]

    # the daemon
    serve(gateway, name, 9000, sink)
    ended = threading.Event()
    with gateway.tunnel(name, 9000) as tunnel:
        thread = _blast(tunnel, ended)
        _transfer_runs(gateway, name)
        os.kill(gateway.daemon_pid, signal.SIGKILL)
        assert ended.wait(20), "the connection ends with the daemon"
        thread.join(5)
        assert tunnel.process.wait(20) != 0
    assert gateway.sh(name, "cat /root/file") == "precious\n"  # the next command starts a new daemon; the sandbox never noticed
    listening(gateway, name, 9000)

    # the service, and with it every process inside
    ended.clear()
    gateway.sh(name, "rm -f /root/sink")
    with gateway.tunnel(name, 9000) as tunnel:
        thread = _blast(tunnel, ended)
        _transfer_runs(gateway, name)
        service = psutil.Process(gateway.service["pid"])
        tree = service.children(recursive=True)
        assert tree
        service.kill()
        _, alive = psutil.wait_procs([service, *tree], timeout=20)
        assert alive == []
        assert ended.wait(20), "the connection ends with the service"
        thread.join(5)
    assert gateway.json("get", name)["status"] == "stopped"
    assert gateway.sh(name, "cat /root/file") == "precious\n"

    # the sandbox
    ended.clear()
    gateway.sh(name, "rm -f /root/sink")
    serve(gateway, name, 9000, sink)
    with gateway.tunnel(name, 9000) as tunnel:
        thread = _blast(tunnel, ended)
        _transfer_runs(gateway, name)
        gateway.sandbox("stop", name)
        assert ended.wait(20), "the connection ends with the sandbox"
        thread.join(5)


def test_two_commands_at_once_start_one_daemon(own_gateway: Gateway) -> None:
    started = [
        subprocess.Popen(
            [BIN / "sandbox", "list"], env=own_gateway.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(4)
    ]
    for process in started:
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
        assert '"sandboxes"' in out
    daemons = [p for p in psutil.process_iter(["cmdline", "environ"]) if _is_daemon(p, own_gateway)]
    assert len(daemons) == 1


def _is_daemon(process: psutil.Process, gateway: Gateway) -> bool:
    words = process.info["cmdline"] or []
    environ = process.info["environ"] or {}
    return words[-2:] == ["-m", "gatewayd"] and environ.get("GATEWAYD_STATE_DIR") == str(gateway.state)

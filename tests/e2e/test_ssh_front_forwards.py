"""Forwards through the gateway's own ssh server, in both directions, and what hangs on them: agent, display, jumps."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from .conftest import Gateway, listening, make, serve, wait_until
from .sshworld import SshWorld

pytestmark = pytest.mark.e2e

PIPES: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
ECHO = "import socketserver as s\nclass H(s.StreamRequestHandler):\n def handle(self):\n  self.wfile.write(self.rfile.read())\n"


@pytest.fixture(scope="module")
def ssh(gateway: Gateway) -> SshWorld:
    """A sandbox with a server that answers, at the end of what it is told, with all of it."""
    make(gateway, "box")
    tcp = f"{ECHO}s.ThreadingTCPServer.allow_reuse_address=True\ns.ThreadingTCPServer(('127.0.0.1',7777),H).serve_forever()"
    gateway.sh("box", f"cat > /tmp/echo.py <<'X'\n{tcp}\nX\n")
    serve(gateway, "box", 7777, ["python3", "/tmp/echo.py"])
    unix = f"{ECHO}s.ThreadingUnixStreamServer('/tmp/echo.sock',H).serve_forever()"
    gateway.sh("box", f"cat > /tmp/unix.py <<'X'\n{unix}\nX\nsetsid python3 /tmp/unix.py </dev/null >/dev/null 2>&1 &")
    gateway.sh("box", "i=0; until [ -S /tmp/echo.sock ]; do i=$((i+1)); [ $i -lt 500 ]; sleep 0.02; done")
    return SshWorld(gateway)


def ask(address: tuple[str, int] | str, data: bytes) -> bytes:
    """Send, end our direction, read to the end."""
    with socket.socket(socket.AF_UNIX if isinstance(address, str) else socket.AF_INET) as sock:
        sock.settimeout(30)
        sock.connect(address)

        def send() -> None:
            sock.sendall(data)
            sock.shutdown(socket.SHUT_WR)

        sender = threading.Thread(target=send)
        sender.start()
        got = b""
        while chunk := sock.recv(65536):
            got += chunk
        sender.join()
    return got


@contextlib.contextmanager
def echo_here(address: tuple[str, int] | str) -> Iterator[int]:
    """The same server on this machine; its port."""
    family = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET
    with socket.socket(family) as listener:
        listener.bind(address)
        listener.listen(64)

        def answer(sock: socket.socket) -> None:
            with sock:
                data = b""
                while chunk := sock.recv(65536):
                    data += chunk
                sock.sendall(data)

        def accept() -> None:
            while True:
                try:
                    sock, _ = listener.accept()
                except OSError:
                    return
                threading.Thread(target=answer, args=(sock,), daemon=True).start()

        thread = threading.Thread(target=accept)
        thread.start()
        try:
            yield 0 if isinstance(address, str) else listener.getsockname()[1]
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join(10)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])


ASK_INSIDE = """python3 -c "
import socket, sys
a = sys.argv[1]
s = socket.socket(socket.AF_UNIX) if '/' in a else socket.socket()
s.connect(a if '/' in a else ('127.0.0.1', int(a)))
s.sendall(b'ping'); s.shutdown(1)
print(s.makefile().read())" """


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "box", "0.0.0.0"])
def test_local_forward(ssh: SshWorld, host: str) -> None:
    port = free_port()
    with ssh.background("-L", f"{port}:{host}:7777", "box"):
        assert ask(("127.0.0.1", port), b"hello") == b"hello"
        big = os.urandom(1 << 20) * 8
        assert ask(("127.0.0.1", port), big) == big


def test_a_forward_to_where_nothing_listens(ssh: SshWorld) -> None:
    err = ssh.run("-W", "localhost:9", "box", code=255).stderr
    assert b"open failed: connect failed" in err


def test_stdio_forward(ssh: SshWorld) -> None:
    assert ssh.run("-W", "localhost:7777", "box", input=b"through").stdout == b"through"


def test_socks(ssh: SshWorld, tmp_path: Path) -> None:
    ssh.gateway.sh("box", "mkdir -p /tmp/www; echo page > /tmp/www/index.html")
    serve(ssh.gateway, "box", 8080, ["python3", "-m", "http.server", "-d", "/tmp/www", "8080"])
    port = free_port()
    with ssh.background("-D", str(port), "box"):
        for option in ("--socks5", "--socks5-hostname"):
            assert ssh.sh(f"curl -sS {option} 127.0.0.1:{port} http://localhost:8080/").stdout == b"page\n"


def test_remote_forward(ssh: SshWorld) -> None:
    with echo_here(("127.0.0.1", 0)) as port, ssh.background("-R", f"7001:127.0.0.1:{port}", "box"):
        assert ssh.run("box", f"{ASK_INSIDE} 7001").stdout == b"ping\n"
        assert ssh.run("box", f"{ASK_INSIDE} 7001").stdout == b"ping\n"
    gone = f"{ASK_INSIDE} 7001 2>/dev/null; echo $?"
    wait_until(lambda: ssh.run("box", gone).stdout == b"1\n", "it ends with its connection")


def test_remote_forward_of_any_port_and_its_cancellation(ssh: SshWorld) -> None:
    control = ssh.root / "mux-r"
    shared = ("-o", f"ControlPath={control}")
    with echo_here(("127.0.0.1", 0)) as port:
        master = ssh.popen("-o", "ControlMaster=yes", *shared, "-N", "box")
        try:
            wait_until(control.exists, "the master is up")
            given = ssh.run(*shared, "-O", "forward", "-R", f"0:127.0.0.1:{port}", "box").stdout.decode().strip()
            assert ssh.run("box", f"{ASK_INSIDE} {given}").stdout == b"ping\n"
            ssh.run(*shared, "-O", "cancel", "-R", f"0:127.0.0.1:{port}", "box")
            gone = f"{ASK_INSIDE} {given} 2>/dev/null; echo $?"
            wait_until(lambda: ssh.run("box", gone).stdout == b"1\n", "the port is closed")
            assert ssh.run(*shared, "box", "echo alive").stdout == b"alive\n"
        finally:
            master.terminate()
            master.wait(20)


def test_a_port_that_is_taken_is_refused(ssh: SshWorld) -> None:
    done = ssh.run("-o", "ExitOnForwardFailure=yes", "-R", "7777:127.0.0.1:1", "box", "true", code=255)
    assert b"remote port forwarding failed" in done.stderr


def test_unix_sockets_both_ways(ssh: SshWorld, tmp_path: Path) -> None:
    local = str(tmp_path / "here.sock")
    with ssh.background("-L", f"{local}:/tmp/echo.sock", "box"):
        assert ask(local, b"to the socket inside") == b"to the socket inside"
    served = str(tmp_path / "served.sock")
    with echo_here(served), ssh.background("-R", f"/tmp/back.sock:{served}", "box"):
        assert ssh.run("box", f"{ASK_INSIDE} /tmp/back.sock").stdout == b"ping\n"
    assert ssh.run("box", "test -e /tmp/back.sock; echo $?").stdout == b"1\n"
    assert not Path("/tmp/back.sock").exists()  # nothing listened on this machine


def test_agent_forwarding(ssh: SshWorld, tmp_path: Path) -> None:
    agent = subprocess.Popen(["ssh-agent", "-D", "-a", tmp_path / "agent"], stdout=subprocess.DEVNULL)
    try:
        wait_until((tmp_path / "agent").exists, "the agent is up")
        env = {**os.environ, "SSH_AUTH_SOCK": str(tmp_path / "agent")}
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "travelling", "-f", tmp_path / "key"], check=True)
        subprocess.run(["ssh-add", "-q", tmp_path / "key"], env=env, check=True)
        options = ("-A", "-o", f"IdentityAgent={tmp_path}/agent")
        done = ssh.run(*options, "box", "ssh-add -l; echo $SSH_AUTH_SOCK", env=env)
        assert b"travelling" in done.stdout
        path = done.stdout.decode().splitlines()[-1]
        assert not Path(path).exists()  # it is the sandbox's
        wait_until(lambda: ssh.run("box", f"test -e {path}; echo $?").stdout == b"1\n", "the socket is gone")
    finally:
        agent.terminate()
        agent.wait(10)
    assert ssh.run("box", "echo ${SSH_AUTH_SOCK-none}").stdout == b"none\n"


def test_jumping_through(ssh: SshWorld, tmp_path: Path) -> None:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / "key"], check=True)
    public = (tmp_path / "key.pub").read_text().strip()
    script = f"""
        mkdir -p -m 700 /root/.ssh /run/sshd /tmp/sshd; echo '{public}' > /root/.ssh/authorized_keys
        [ -e /tmp/sshd/key ] || ssh-keygen -q -t ed25519 -N '' -f /tmp/sshd/key
        /usr/sbin/sshd -f /dev/null -p 2022 -h /tmp/sshd/key -o PidFile=none -o UsePAM=no -o StrictModes=no
    """
    ssh.gateway.sh("box", script)
    listening(ssh.gateway, "box", 2022)
    config = tmp_path / "config"
    config.write_text(
        "Host inner\n  HostName localhost\n  Port 2022\n  User root\n  HostKeyAlias inner\n  ProxyUseFdpass no\n"
        f"  IdentityFile {tmp_path}/key\n  StrictHostKeyChecking no\n  UserKnownHostsFile {tmp_path}/known\n"
        f"Host *\n  Include {ssh.config}\n"
    )
    done = ssh.sh(f"ssh -F {config} -J box inner 'echo inside; id -un'")
    assert done.stdout == b"inside\nroot\n"


@pytest.mark.skipif(shutil.which("xauth") is None, reason="xauth is not installed")
def test_x11_forwarding(ssh: SshWorld, tmp_path: Path) -> None:
    if ssh.run("box", "command -v xauth || echo none").stdout == b"none\n":
        pytest.skip("the sandbox has no xauth")
    number = next(n for n in range(50, 90) if not Path(f"/tmp/.X11-unix/X{n}").exists())
    Path("/tmp/.X11-unix").mkdir(mode=0o1777, exist_ok=True)
    path = f"/tmp/.X11-unix/X{number}"
    authority = {"XAUTHORITY": str(tmp_path / "xauthority"), "DISPLAY": f":{number}"}
    cookie = "00112233445566778899aabbccddeeff"
    add = ["xauth", "add", f":{number}", "MIT-MAGIC-COOKIE-1", cookie]
    subprocess.run(add, env={**os.environ, **authority}, check=True, capture_output=True)
    client = """
import os, re, socket, struct, subprocess
display = os.environ["DISPLAY"]
number = int(re.fullmatch(r"localhost:([0-9]+)[.]0", display).group(1))
line = subprocess.run(["xauth", "list", display], capture_output=True, text=True).stdout.split()
s = socket.create_connection(("127.0.0.1", 6000 + number))
s.sendall(struct.pack("<BxHHHHxx", ord("l"), 11, 0, 18, 16) + b"MIT-MAGIC-COOKIE-1" + bytes(2) + bytes.fromhex(line[2]))
print(s.makefile().readline().strip())
"""
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path)
            server.listen()
            server.settimeout(30)
            process = ssh.popen("-Y", "box", "python3", "-", env=authority, **PIPES)
            assert process.stdin is not None
            process.stdin.write(client.encode())
            process.stdin.close()
            process.stdin = None
            accepted, _ = server.accept()
            with accepted:
                accepted.settimeout(30)
                hello = accepted.recv(4096)
                accepted.sendall(b"welcome\n")
                out, err = process.communicate(timeout=30)
        assert bytes.fromhex(cookie) in hello  # the client's ssh has put the real cookie in the place of the one inside
        assert out == b"welcome\n", err
    finally:
        Path(path).unlink(missing_ok=True)
    assert re.search(rb"localhost:1[0-9]", ssh.run("box", "env").stdout) is None


def test_a_slow_reader_costs_no_memory_and_nobody_else(ssh: SshWorld) -> None:
    process = ssh.popen("box", "yes 0123456789abcdef", stdout=subprocess.PIPE)
    assert process.stdout is not None
    try:
        process.stdout.read(1 << 20)
        daemon = psutil.Process(ssh.gateway.daemon_pid)
        before = daemon.memory_info().rss
        assert ssh.run("box", "head -c 30000000 /dev/zero | wc -c").stdout == b"30000000\n"
        assert daemon.memory_info().rss - before < 64 << 20
    finally:
        process.kill()
        process.communicate()

"""What editors do over ssh: VS Code's Remote-SSH and JetBrains' Gateway, their steps with the real OpenSSH client."""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import secrets
import select
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from .conftest import Gateway, make, wait_until
from .sshworld import SshWorld, digest

pytestmark = pytest.mark.e2e

FROZEN = 3.0  # seconds that the service stands still
BACK = 3.0  # seconds after which everything has to move again
# Answers every line with itself, over any number of connections; tells its port, and that it runs, in a file.
SERVER = """
import socketserver
class Handler(socketserver.StreamRequestHandler):
    def handle(self):
        for line in self.rfile:
            self.wfile.write(line)
            self.wfile.flush()
socketserver.ThreadingTCPServer.allow_reuse_address = True
with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
    with open("log", "w") as log:
        print("listening on port", server.server_address[1], file=log)
    server.serve_forever()
"""
# As Remote-SSH's: a long text on standard input, whose output is found between lines that nobody else writes.
BOOTSTRAP = """
echo '{mark}: running'
{padding}
unameResult=$(uname -s); arch=$(uname -m)
printf '%s\\n' "$HOME" "$SHELL" >/dev/null
SERVER_DIR="$HOME/.editor-server"
mkdir -p "$SERVER_DIR" && cd "$SERVER_DIR" || exit 1
if [ ! -f server.py ]; then
    cat > server.py <<'EOF'
{server}
EOF
fi
if ! kill -0 "$(cat pid 2>/dev/null)" 2>/dev/null; then
    rm -f log
    nohup python3 server.py > output 2>&1 < /dev/null &
    echo $! > pid
fi
for i in $(seq 500); do
    grep -q listening log 2>/dev/null && break
    sleep 0.02
done
port=$(sed -n 's/listening on port //p' log)
echo '{mark}: start'
echo "exitCode==0=="
echo "listeningOn==$port=="
echo "osReleaseId==$unameResult=="
echo "arch==$arch=="
echo '{mark}: end'
"""


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])


class Editor:
    """A window of VS Code's: one ssh, through which everything goes."""

    def __init__(self, ssh: SshWorld) -> None:
        self.socks = free_port()
        self.process = ssh.popen(
            *("-T", "-D", str(self.socks), "-o", "ConnectTimeout=15", "box", "bash"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        mark = secrets.token_hex(8)
        padding = "\n".join(f"function unused{number}() {{ echo '{'x' * 80}'; return 1; }}" for number in range(500))
        self.write(BOOTSTRAP.format(mark=mark, padding=padding, server=SERVER))
        assert self.line() == f"{mark}: running"
        assert self.line() == f"{mark}: start"
        self.facts: dict[str, str] = {}
        while (line := self.line()) != f"{mark}: end":
            name, value, _ = line.split("==")
            self.facts[name] = value
        self.port = int(self.facts["listeningOn"])

    def write(self, text: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(text.encode())
        self.process.stdin.flush()

    def line(self, deadline: float = 40.0) -> str:
        """The next line that bash prints."""
        assert self.process.stdout is not None
        line = b""
        end = time.monotonic() + deadline
        while not line.endswith(b"\n"):
            ready, _, _ = select.select([self.process.stdout], [], [], max(0.0, end - time.monotonic()))
            assert ready, f"no line within {deadline:g} s, only {line!r}"
            byte = os.read(self.process.stdout.fileno(), 1)
            assert byte, f"ssh ended: {self.process.communicate(timeout=20)}"
            line += byte
        return line.decode().rstrip("\n")

    def connect(self) -> socket.socket:
        """To the server inside, through SOCKS 5 (RFC 1928), by name."""
        sock = socket.create_connection(("127.0.0.1", self.socks), timeout=30)
        host = b"localhost"
        sock.sendall(b"\5\1\0" + b"\5\1\0\3" + bytes([len(host)]) + host + self.port.to_bytes(2, "big"))
        answer = b""
        while len(answer) < 12:
            got = sock.recv(12 - len(answer))
            assert got, answer
            answer += got
        assert answer[:4] == b"\5\0\5\0", answer
        return sock

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
        self.process.communicate(timeout=20)


def ask(sock: socket.socket, text: str, deadline: float = 30.0) -> None:
    """Say something to the server; it says the same."""
    line = f"{text}\n".encode()
    sock.settimeout(deadline)
    sock.sendall(line)
    got = b""
    while len(got) < len(line):
        chunk = sock.recv(len(line) - len(got))
        assert chunk, f"the connection ended after {got!r}"
        got += chunk
    assert got == line


@contextlib.contextmanager
def editor_in(ssh: SshWorld) -> Iterator[Editor]:
    editor = Editor(ssh)
    try:
        yield editor
    finally:
        editor.close()


@pytest.fixture(scope="module")
def ssh(gateway: Gateway) -> SshWorld:
    make(gateway, "box")
    return SshWorld(gateway)


@contextlib.contextmanager
def frozen(pid: int) -> Iterator[None]:
    """A process that stands still for a while, as a laptop that sleeps, or a network that is away."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


# --- VS Code ----------------------------------------------------------------------------------------------------------


def test_a_script_through_bash_starts_a_server(ssh: SshWorld) -> None:
    with editor_in(ssh) as editor:
        assert editor.facts["exitCode"] == "0"
        assert editor.facts["osReleaseId"] == "Linux"
        with contextlib.ExitStack() as stack:
            socks = [stack.enter_context(editor.connect()) for _ in range(20)]
            for number, sock in enumerate(socks):
                ask(sock, f"connection {number}")
            ask(socks[0], "y" * 500_000)
        with editor.connect() as sock:
            ask(sock, "others may end")
        editor.write("echo $((40 + 2)); exit 3\n")
        assert editor.line() == "42"
        assert editor.process.wait(20) == 3


def test_the_server_outlives_the_session(ssh: SshWorld) -> None:
    with editor_in(ssh) as first, first.connect() as sock:
        ask(sock, "before")
        first.process.kill()  # not even a goodbye
        first.process.wait(20)
    with editor_in(ssh) as second:
        assert second.port == first.port  # it is the same one
        with second.connect() as sock:
            ask(sock, "after")


def test_the_session_survives_a_freeze(ssh: SshWorld) -> None:
    """The link stays: nobody has waited long enough to give it up."""
    with editor_in(ssh) as editor, editor.connect() as sock:
        ask(sock, "before")
        with frozen(int(ssh.gateway.service["pid"])):
            sock.sendall(b"while it stands still\n")
            editor.write("echo typed\n")
            time.sleep(FROZEN)
        sock.settimeout(BACK)
        assert sock.recv(100) == b"while it stands still\n"
        assert editor.line(BACK) == "typed"
        with editor_in(ssh) as another, another.connect() as fresh:
            ask(fresh, "another window")


def test_the_session_survives_a_link_that_was_given_up(own_gateway: Gateway) -> None:
    """The link is found dead and made anew; what runs over it goes on where it was."""
    (own_gateway.root / "config.toml").write_text("keepalive_interval = 0.5\nkeepalive_timeout = 1.0\n")
    make(own_gateway, "box")
    ssh = SshWorld(own_gateway)
    with editor_in(ssh) as editor, editor.connect() as sock:
        ask(sock, "before")
        connected = own_gateway.json("status", "box")["link"]["connected_at"]
        with frozen(int(own_gateway.service["pid"])):
            sock.sendall(b"while it stands still\n")
            editor.write("echo typed\n")
            time.sleep(FROZEN)
        sock.settimeout(BACK)
        assert sock.recv(100) == b"while it stands still\n"
        assert editor.line(BACK) == "typed"
        assert own_gateway.json("status", "box")["link"]["connected_at"] != connected
        with editor.connect() as fresh:
            ask(fresh, "after")


# --- JetBrains --------------------------------------------------------------------------------------------------------


def test_files_and_commands_on_one_connection(ssh: SshWorld, tmp_path: Path) -> None:
    """A backend is uploaded while commands look around, then started, and its port forwarded: all on one connection."""
    control = ssh.root / "jet"
    shared = ("-o", f"ControlPath={control}")
    master = ssh.popen("-o", "ControlMaster=yes", *shared, "-N", "box")
    backend = tmp_path / "backend.tar"
    backend.write_bytes(os.urandom(1 << 20) * 20)
    (tmp_path / "server.py").write_text(SERVER)

    def look(number: int) -> bytes:
        return bytes(ssh.run(*shared, "box", f"uname -sm; test -d /tmp; echo {number}").stdout)

    def upload(number: int) -> None:
        script = f"put {backend} /tmp/backend-{number}\nls -l /tmp\nget /tmp/backend-{number} {tmp_path}/back-{number}\n"
        ssh.run("-q", *shared, "-b", "-", "box", program="sftp", input=script.encode())

    try:
        wait_until(control.exists, "the master is up")
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            uploads = [pool.submit(upload, number) for number in range(3)]
            looks = [pool.submit(look, number) for number in range(30)]
            for number, found in enumerate(looks):
                assert found.result().startswith(b"Linux ")
                assert found.result().endswith(b"\n%d\n" % number)
            for number, done in enumerate(uploads):
                done.result()
                assert digest(tmp_path / f"back-{number}") == digest(backend)
        ssh.run("-q", *shared, tmp_path / "server.py", "box:/root/server.py", program="scp")
        script = "nohup python3 server.py >/dev/null 2>&1 </dev/null & until grep -s listening log; do sleep 0.02; done"
        inside = int(ssh.run(*shared, "box", script).stdout.split()[-1])
        here = free_port()
        ssh.run(*shared, "-O", "forward", "-L", f"127.0.0.1:{here}:127.0.0.1:{inside}", "box")
        with socket.create_connection(("127.0.0.1", here), timeout=30) as sock:
            ask(sock, "to the backend")
    finally:
        master.terminate()
        master.wait(20)

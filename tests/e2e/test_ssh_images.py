"""ssh into other images: with no more than python3-minimal, without any Python, and with an sshd that is asked for."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from . import images
from .conftest import Gateway, make, serve, service_on, wait_until
from .sshworld import SshWorld, digest

needs_images = pytest.mark.skipif(bool(images.missing), reason=f"not installed: {', '.join(images.missing)}")
pytestmark = pytest.mark.e2e

PAGE_PORT = 8000
# Debian's essential packages have Perl: it answers every request with a page.
SERVER = f"""
$s = IO::Socket::INET->new(LocalAddr => "127.0.0.1", LocalPort => {PAGE_PORT}, Listen => 9, ReuseAddr => 1) or die;
while ($c = $s->accept) {{
    1 while ($line = <$c>) && $line ne "\\r\\n";
    print $c "HTTP/1.0 200 OK\\r\\n\\r\\npage\\n";
    close $c;
}}
"""
TEXT_ONLY = b"text only: the image has no Python"
ASK_AGENT = """
import os, socket
s = socket.socket(socket.AF_UNIX)
s.connect(os.environ["SSH_AUTH_SOCK"])
s.sendall(bytes([0, 0, 0, 1, 11]))
print(s.recv(65536))
"""


@contextmanager
def world_on(image: str) -> Iterator[SshWorld]:
    with service_on(images.root_filesystem(image)) as gateway:
        make(gateway, "box")
        serve(gateway, "box", PAGE_PORT, ["perl", "-MIO::Socket::INET", "-e", SERVER.replace("\n", " ")])
        yield SshWorld(gateway)


@pytest.fixture(scope="module")
def python() -> Iterator[SshWorld]:
    """python3-minimal."""
    with world_on(images.PYTHON) as world:
        yield world


@pytest.fixture(scope="module")
def plain() -> Iterator[SshWorld]:
    """No Python."""
    with world_on(images.PLAIN) as world:
        yield world


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])


def page(ssh: SshWorld, *options: str) -> bytes:
    """What the server inside says to curl."""
    return bytes(ssh.gateway.run("curl", "-sS", "-m", "20", *options).stdout)


def terminal(ssh: SshWorld, script: str, code: int = 0) -> bytes:
    """Output of a script on a terminal."""
    return ssh.run("-tt", "box", script, code=code).stdout.replace(b"\r\n", b"\n")


def interrupt_and_exit(ssh: SshWorld) -> bytes:
    """Use a login shell on a terminal as a person would; what ssh says."""
    process = ssh.popen("-tt", "box", stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(b"PS1=; stty -echo; echo in-$((40 + 2)); sleep 1000\n")
    process.stdin.flush()
    seen = b""
    while b"in-42" not in seen:
        seen += os.read(process.stdout.fileno(), 4096)
    out, err = process.communicate(b"\x03echo code-$?\nexit 4\n", timeout=30)
    assert (process.returncode, b"code-130" in out) == (4, True), seen + out
    return bytes(err)


# --- python3-minimal --------------------------------------------------------------------------------------------------


@needs_images
def test_python_minimal_runs_commands(python: SshWorld) -> None:
    done = python.run("box", "cat; echo problem >&2; exit 7", input=bytes(range(256)) * 4000, code=7)
    assert (done.stdout, done.stderr) == (bytes(range(256)) * 4000, b"problem\n")
    assert python.gateway.json("status", "box")["ssh"] == "guest"
    python.run("box", "kill -TERM $$", code=255)
    assert b"not available" in python.run("-l", "nobody", "box", "id -un", code=1).stdout  # its shell is nologin
    python.run("box", "echo 'ada:x:1234:1234::/tmp:/bin/sh' >> /etc/passwd")
    assert python.run("-l", "ada", "box", "id -un; pwd").stdout == b"ada\n/tmp\n"


@needs_images
def test_python_minimal_has_terminals(python: SshWorld) -> None:
    assert terminal(python, "tty; stty size; exit 3", code=3) == b"/dev/pts/0\n24 80\n"
    interrupt_and_exit(python)


@needs_images
def test_python_minimal_takes_files(python: SshWorld, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    for number in range(30):
        (tree / f"d{number % 4}").mkdir(parents=True, exist_ok=True)
        (tree / f"d{number % 4}" / f"f {number}").write_bytes(os.urandom(number * 9973))
    (tree / "program").write_text("#!/bin/sh\n")
    (tree / "program").chmod(0o755)
    python.run("-q", "-p", "-r", tree, "box:/tmp/there", program="scp")
    python.run("-q", "-p", "-r", "box:/tmp/there", tmp_path / "back", program="scp")
    python.gateway.run("diff", "-r", tree, tmp_path / "back")
    assert os.access(tmp_path / "back" / "program", os.X_OK)
    script = f"cd /tmp/there\nrename program renamed\nln -s renamed link\nls -l\ndf\nget link {tmp_path}/got\nrm link\n"
    python.run("-q", "-b", "-", "box", program="sftp", input=script.encode())
    assert (tmp_path / "got").read_text() == "#!/bin/sh\n"
    # what the image lacks is missing as it would be with sshd
    for options, program in ((["-O"], b"scp"), ([], b"rsync")):
        if program == b"scp":
            err = python.run("-q", *options, tree / "program", "box:/tmp/x", program="scp", code=1).stderr
        else:
            shell = f"ssh -F {python.config}"
            # whether ssh's exit code or the end of its output comes first decides about rsync's
            script = f"rsync -e '{shell}' {tree}/program box:/tmp/x; case $? in 12|127) ;; *) exit 1; esac"
            err = python.gateway.run("sh", "-c", script).stderr
        assert program + b": command not found" in err


@needs_images
def test_python_minimal_has_forwards(python: SshWorld) -> None:
    port, socks = free_port(), free_port()
    with socket.create_server(("127.0.0.1", 0)) as here:
        here.settimeout(30)
        back = f"7001:127.0.0.1:{here.getsockname()[1]}"
        with python.background("-L", f"{port}:localhost:{PAGE_PORT}", "-D", str(socks), "-R", back, "box"):
            assert page(python, f"http://127.0.0.1:{port}/") == b"page\n"
            assert page(python, "--socks5-hostname", f"127.0.0.1:{socks}", f"http://localhost:{PAGE_PORT}/") == b"page\n"
            process = python.popen("box", "bash -c 'cat </dev/tcp/127.0.0.1/7001'", stdout=subprocess.PIPE)
            sock, _ = here.accept()
            with sock:
                sock.sendall(b"from here")
            assert process.communicate(timeout=30)[0] == b"from here"


@needs_images
def test_python_minimal_reaches_the_agent(python: SshWorld, tmp_path: Path) -> None:
    agent = subprocess.Popen(["ssh-agent", "-D", "-a", tmp_path / "agent"], stdout=subprocess.DEVNULL)
    try:
        wait_until((tmp_path / "agent").exists, "the agent is up")
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "travelling", "-f", tmp_path / "key"], check=True)
        env = {"SSH_AUTH_SOCK": str(tmp_path / "agent")}
        subprocess.run(["ssh-add", "-q", tmp_path / "key"], env={**os.environ, **env}, check=True)
        options = ("-A", "-o", f"IdentityAgent={tmp_path}/agent")
        assert b"travelling" in python.run(*options, "box", "python3", "-", env=env, input=ASK_AGENT.encode()).stdout
    finally:
        agent.terminate()
        agent.wait(10)


# --- no Python --------------------------------------------------------------------------------------------------------


@needs_images
def test_without_python_text_gets_through(plain: SshWorld) -> None:
    text = "grün, 緑, 🟢\n" * 20_000
    done = plain.run("box", "cat; echo problem >&2; exit 7", input=text.encode(), code=7)
    assert done.stdout == text.encode()
    said, problem = done.stderr.splitlines()
    assert TEXT_ONLY in said
    assert problem == b"problem"
    assert plain.gateway.json("status", "box")["ssh"] == "text"
    assert plain.run("-T", "box", input=b"cd /tmp\npwd\nexit 5\n", code=5).stdout == b"/tmp\n"
    assert terminal(plain, "tty; stty size; exit 3", code=3) == b"/dev/pts/0\n24 80\n"


@needs_images
def test_without_python_a_terminal_has_its_keys(plain: SshWorld) -> None:
    assert TEXT_ONLY in interrupt_and_exit(plain)


@needs_images
def test_without_python_files_are_refused(plain: SshWorld, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"\0\1\2\xff")
    shell = f"ssh -F {plain.config}"
    errors = {
        "sftp": plain.run("-b", "/dev/null", "box", program="sftp", code=255).stderr,
        "scp": plain.run(source, "box:/tmp/x", program="scp", code=255).stderr,
        "scp -O": plain.run("-O", source, "box:/tmp/x", program="scp", code=1).stderr,
        "git": plain.gateway.run("git", "-c", f"core.sshCommand={shell}", "ls-remote", "box:/tmp/x", code=128).stderr,
        # which of ssh's end and its output's rsync sees first decides about its exit code
        "rsync": plain.sh(f"rsync -e '{shell}' {source} box:/tmp/x ; case $? in 12|255) ;; *) exit 1; esac").stderr,
    }
    for program, err in errors.items():
        assert b"has no Python, so only text" in err, program
        assert b"hint: use an image with python3, or one with sshd and `sandbox ssh-setup --direct`" in err, program
    assert plain.run("box", "ls -A /tmp").stdout == b""


@needs_images
def test_without_python_binary_input_ends_the_command(plain: SshWorld) -> None:
    """Rather than reach it in part."""
    err = plain.run("box", "cat > /tmp/part", input=b"text\n" * 1000 + b"\xff" + b"text\n" * 1000, code=255).stderr
    assert b"input is not UTF-8 at byte 5000: this connection carries text only" in err
    assert b"internal error" not in err


@needs_images
def test_without_python_ports_are_reached(plain: SshWorld) -> None:
    port, socks = free_port(), free_port()
    with plain.background("-L", f"{port}:localhost:{PAGE_PORT}", "-D", str(socks), "box"):
        assert page(plain, f"http://127.0.0.1:{port}/") == b"page\n"
        assert page(plain, "--socks5-hostname", f"127.0.0.1:{socks}", f"http://localhost:{PAGE_PORT}/") == b"page\n"
    request = b"GET / HTTP/1.0\r\n\r\n"
    assert plain.run("-W", f"localhost:{PAGE_PORT}", "box", input=request).stdout.endswith(b"\r\n\r\npage\n")


@needs_images
def test_without_python_the_rest_is_refused(plain: SshWorld) -> None:
    err = plain.run("-W", "192.0.2.1:80", "box", code=255).stderr
    assert b"cannot connect to 192.0.2.1 in sandbox 'box': its image has no Python" in err
    err = plain.run("-o", "ExitOnForwardFailure=yes", "-R", "7001:localhost:9", "box", "true", code=255).stderr
    assert b"remote port forwarding failed" in err
    err = plain.run("-l", "nobody", "box", "id", code=255).stderr
    assert b"cannot run as 'nobody' in sandbox 'box': its image has no Python" in err


@needs_images
@pytest.mark.parametrize("image", ["python", "plain"])
def test_an_image_without_sshd_cannot_be_reached_directly(image: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    ssh: SshWorld = request.getfixturevalue(image)
    ssh.gateway.run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / "key")
    err = ssh.gateway.sandbox("ssh-setup", "box", "--direct", "--identity", str(tmp_path / "key.pub"), code=69).stderr
    assert "sandbox 'box' has no sshd" in err
    assert not (ssh.gateway.home / ".ssh" / "gatewayd").exists()


# --- an sshd inside, asked for ----------------------------------------------------------------------------------------


def test_direct_is_end_to_end(gateway: Gateway, tmp_path: Path) -> None:
    """The key exchange is with the sandbox's sshd, everything runs in it, and it alone knows the user's key."""
    make(gateway, "box")
    gateway.run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / "key")
    gateway.sandbox("ssh-setup", "box", "--direct", "--identity", str(tmp_path / "key.pub"))
    assert gateway.json("status", "box")["ssh"] == "sshd"
    direct = ("-i", tmp_path / "key", "sandbox-box")
    done = gateway.ssh("ssh", "-v", *direct, "cat; ps -o comm= -p $PPID", input=b"in\n")
    assert done.stdout == b"in\nsshd\n"
    assert b'using "publickey"' in done.stderr
    own = gateway.sh("box", "ssh-keygen -lf /etc/ssh/ssh_host_ed25519_key.pub").split()[1]
    assert f"Server host key: ssh-ed25519 {own}".encode() in done.stderr
    source = tmp_path / "source"
    source.write_bytes(os.urandom(3_000_000))
    gateway.ssh("scp", "-q", "-i", tmp_path / "key", source, "sandbox-box:/root/there")
    gateway.ssh("scp", "-q", "-i", tmp_path / "key", "sandbox-box:/root/there", tmp_path / "back")
    assert digest(tmp_path / "back") == digest(source)
    gateway.run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / "other")
    stranger = ("-i", tmp_path / "other", "-o", "IdentityAgent=none", "-o", "IdentitiesOnly=yes", "-o", "BatchMode=yes")
    config = tmp_path / "config"
    lines = (gateway.home / ".ssh" / "gatewayd" / "config").read_text().splitlines()
    config.write_text("\n".join(line for line in lines if "IdentityFile" not in line))
    err = gateway.run("ssh", "-F", config, *stranger, "sandbox-box", "true", code=255).stderr
    assert b"Permission denied" in err

"""Other programs than OpenSSH's against the gateway's ssh server: through the ProxyCommand helper, and over TCP with a key."""

from __future__ import annotations

import base64
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import paramiko
import pytest

from gatewayd.frontends.ssh.hostkey import public_host_key

from .conftest import Gateway, make, serve
from .sshworld import PROXY, SshWorld, digest

pytestmark = pytest.mark.e2e

HELPER = f"{sys.executable} -I -S {PROXY}"
ECHO = "import socketserver as s\nclass H(s.StreamRequestHandler):\n def handle(self):\n  self.wfile.write(self.rfile.read())\n"


class World(SshWorld):
    """ssh through the helper, and a port on which the same server asks for a key."""

    def __init__(self, gateway: Gateway) -> None:
        with socket.create_server(("127.0.0.1", 0)) as sock:
            self.port = int(sock.getsockname()[1])
        self.key = gateway.root / "key"
        gateway.run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", self.key)
        config = f'[ssh]\nlisten = "127.0.0.1:{self.port}"\nauthorized_keys = "{self.key}.pub"\n'
        (gateway.root / "config.toml").write_text(config)
        make(gateway, "box")  # starts the daemon: it listens from its start on
        super().__init__(gateway)
        self.host_key = public_host_key(gateway.state)
        self.tcp = self.root / "config-tcp"
        self.tcp.write_text(
            f"Host box\n  HostName 127.0.0.1\n  Port {self.port}\n  User box\n  IdentityFile {self.key}\n"
            "Host *\n"
            "  IdentitiesOnly yes\n"
            "  IdentityAgent none\n"
            "  HostKeyAlias gatewayd\n"
            f"  UserKnownHostsFile {self.root}/known_hosts\n"
            "  GlobalKnownHostsFile none\n"
            "  StrictHostKeyChecking yes\n"
        )

    @property
    def fingerprint(self) -> str:
        """Of the gateway's host key, as PuTTY wants it."""
        (self.root / "host.pub").write_text(f"{self.host_key}\n")
        out = self.gateway.run("ssh-keygen", "-lf", self.root / "host.pub", text=True).stdout
        return str(out.split()[1])


@pytest.fixture(scope="module")
def ssh(gateway: Gateway) -> World:
    world = World(gateway)
    program = f"{ECHO}s.ThreadingTCPServer(('127.0.0.1',7777),H).serve_forever()"
    gateway.sh("box", f"cat > /tmp/echo.py <<'X'\n{program}\nX\n")
    serve(gateway, "box", 7777, ["python3", "/tmp/echo.py"])
    return world


def grow(folder: Path) -> Path:
    """A folder with files of several kinds."""
    for number in range(60):
        path = folder / f"d{number % 5}" / f"file {number}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(os.urandom(number * 997))
    (folder / "d0" / "program").write_text("#!/bin/sh\necho ran\n")
    (folder / "d0" / "program").chmod(0o755)
    (folder / "d1" / "link").symlink_to("file 1")
    (folder / "empty").mkdir()
    return folder


# --- sshfs ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def mounted(ssh: World, tmp_path: Path) -> Iterator[Path]:
    """A folder of the sandbox, mounted here."""
    if shutil.which("sshfs") is None or not os.access("/dev/fuse", os.R_OK | os.W_OK):
        pytest.skip("not here: sshfs, or a /dev/fuse that may be used")
    ssh.run("box", "mkdir -p /srv/shared")
    point = ssh.gateway.root / "mnt"
    point.mkdir()
    argv = ["sshfs", "-F", str(ssh.config), "box:/srv/shared", str(point)]
    done = subprocess.run(argv, env=ssh.gateway.env, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if "Operation not permitted" in done.stderr:
        pytest.skip(f"nothing can be mounted here: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    try:
        yield point
    finally:
        ssh.gateway.run(shutil.which("fusermount3") or "fusermount", "-u", point)


def test_sshfs(ssh: World, mounted: Path, tmp_path: Path) -> None:
    tree = grow(tmp_path / "tree")
    ssh.gateway.run("cp", "-rP", tree, mounted / "copy")  # sshfs follows links when it sets an owner, as with sshd
    ssh.gateway.run("diff", "-r", tree, mounted / "copy")
    assert ssh.run("box", "cd '/srv/shared/copy/d1'; readlink link; ../d0/program").stdout == b"file 1\nran\n"
    with (mounted / "log").open("w") as file:
        file.write("one\n")
        file.flush()
        file.write("two\n")
    with (mounted / "log").open("a") as file:
        file.write("three\n")
    assert ssh.run("box", "cat /srv/shared/log").stdout == b"one\ntwo\nthree\n"
    os.truncate(mounted / "log", 4)
    (mounted / "log").rename(mounted / "renamed")
    (mounted / "renamed").chmod(0o640)
    os.utime(mounted / "renamed", (10**9, 10**9))
    assert ssh.run("box", "cd /srv/shared; ls; stat -c '%s %a %Y' renamed").stdout == b"copy\nrenamed\n4 640 1000000000\n"
    with pytest.raises(FileNotFoundError):
        (mounted / "log").read_text()
    with pytest.raises(OSError, match=r"not empty|Operation not permitted|failure"):
        (mounted / "copy").rmdir()
    assert os.statvfs(mounted).f_blocks > 0
    shutil.rmtree(mounted / "copy")
    assert [path.name for path in mounted.iterdir()] == ["renamed"]


# --- Paramiko ---------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["helper", "tcp"])
def client(request: pytest.FixtureRequest, ssh: World, monkeypatch: pytest.MonkeyPatch) -> Iterator[paramiko.SSHClient]:
    """A client of Paramiko's that is logged in."""
    for name, value in ssh.gateway.env.items():
        monkeypatch.setenv(name, value)  # for the helper that Paramiko starts
    kind, data = ssh.host_key.split()[:2]
    key = paramiko.PKey.from_type_string(kind, base64.b64decode(data))
    with paramiko.SSHClient() as client:
        client.get_host_keys().add("box", kind, key)
        client.get_host_keys().add(f"[127.0.0.1]:{ssh.port}", kind, key)
        if request.param == "tcp":
            client.connect("127.0.0.1", ssh.port, "box", key_filename=str(ssh.key), allow_agent=False, look_for_keys=False)
            yield client
            return
        proxy = paramiko.ProxyCommand(f"{HELPER} box")
        try:
            # Paramiko does not try without any secret; which one does not matter.
            client.connect("box", username="sandbox", password="", sock=proxy, allow_agent=False, look_for_keys=False)
            yield client
        finally:
            transport = client.get_transport()
            client.close()
            if transport is not None:
                transport.join(20)  # it signals the process once more
            proxy.process.wait(20)
            for pipe in (proxy.process.stdin, proxy.process.stdout, proxy.process.stderr):
                assert pipe is not None
                pipe.close()


def read(channel: paramiko.Channel) -> bytes:
    """All output up to its end."""
    channel.settimeout(30)
    return b"".join(iter(lambda: channel.recv(65536), b""))


def test_paramiko_commands(client: paramiko.SSHClient) -> None:
    stdin, stdout, stderr = client.exec_command("cat; echo problem >&2; exit 7", timeout=30)
    stdin.write(b"x" * 3_000_000)
    stdin.channel.shutdown_write()
    assert stdout.read() == b"x" * 3_000_000
    assert stderr.read() == b"problem\n"
    assert stdout.channel.recv_exit_status() == 7
    for number in range(5):
        assert client.exec_command(f"echo {number}", timeout=30)[1].read() == b"%d\n" % number


def test_paramiko_terminal(client: paramiko.SSHClient) -> None:
    channel = client.invoke_shell("xterm", 111, 33)
    channel.settimeout(30)
    channel.sendall(b"PS1=; stty -echo; stty size; echo $TERM; echo 1st-$((40 + 2))\n")
    seen = b""
    while b"1st-42" not in seen:
        seen += channel.recv(4096)
    assert b"33 111\r\nxterm\r\n" in seen
    channel.resize_pty(99, 22)
    channel.sendall(b"stty size; exit 3\n")
    assert b"22 99\r\n" in read(channel)
    assert channel.recv_exit_status() == 3


def test_paramiko_sftp(client: paramiko.SSHClient, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(os.urandom(1 << 20) * 8)
    with client.open_sftp() as sftp:
        sftp.mkdir("/tmp/paramiko", 0o700)
        sftp.chdir("/tmp/paramiko")
        assert sftp.normalize(".") == "/tmp/paramiko"
        assert sftp.put(str(source), "there").st_size == 8 << 20
        sftp.get("there", str(tmp_path / "back"))
        assert digest(tmp_path / "back") == digest(source)
        with sftp.open("there", "r+b") as file:
            file.seek(100)
            file.write(b"changed")
            file.truncate(200)
        assert (sftp.stat("there").st_size, sftp.open("there").read()[100:107]) == (200, b"changed")
        with sftp.open("there", "ab") as file:
            file.write(b"end")
        sftp.chmod("there", 0o640)
        sftp.utime("there", (10**9, 10**9))
        sftp.symlink("there", "link")
        assert sftp.readlink("link") == "there"
        sftp.rename("there", "moved")
        names = {item.filename: (item.st_mode or 0) & 0o777 for item in sftp.listdir_attr()}
        assert names == {"link": 0o777, "moved": 0o640}
        assert sftp.lstat("moved").st_mtime == 10**9
        sftp.posix_rename("moved", "link")
        with pytest.raises(FileNotFoundError):
            sftp.stat("moved")
        sftp.remove("link")
        sftp.rmdir("/tmp/paramiko")
        with pytest.raises(OSError, match="File exists"):
            sftp.mkdir("/tmp")


def test_paramiko_forwards(client: paramiko.SSHClient) -> None:
    transport = client.get_transport()
    assert transport is not None
    channel = transport.open_channel("direct-tcpip", ("localhost", 7777), ("127.0.0.1", 1))
    channel.sendall(b"y" * 200_000)
    channel.shutdown_write()
    assert read(channel) == b"y" * 200_000
    with pytest.raises(paramiko.ChannelException):
        transport.open_channel("direct-tcpip", ("localhost", 9), ("127.0.0.1", 1))
    port = transport.request_port_forward("127.0.0.1", 0)
    inside = f"python3 -c \"import socket; s = socket.create_connection(('127.0.0.1', {port})); print(s.makefile().read())\""
    _, stdout, _ = client.exec_command(inside, timeout=30)
    accepted = transport.accept(30)
    assert accepted is not None
    accepted.sendall(b"from here")
    accepted.close()
    assert stdout.read() == b"from here\n"
    transport.cancel_port_forward("127.0.0.1", port)


def test_paramiko_changes_keys_in_the_middle(client: paramiko.SSHClient) -> None:
    transport = client.get_transport()
    assert transport is not None
    stdin, stdout, _ = client.exec_command("cat", timeout=30)
    for _ in range(3):
        stdin.write(b"z" * 100_000)
        transport.renegotiate_keys()
    stdin.channel.shutdown_write()
    assert stdout.read() == b"z" * 300_000


# --- PuTTY ------------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["helper", "tcp"])
def putty(request: pytest.FixtureRequest, ssh: World) -> list[str]:
    """The options of PuTTY's programs that lead to the sandbox; the host is always called box."""
    if shutil.which("plink") is None:
        pytest.skip("not installed: putty-tools")
    options = ["-batch", "-hostkey", ssh.fingerprint]
    if request.param == "helper":
        return [*options, "-proxycmd", f"{HELPER} %host", "-l", "sandbox"]
    ppk = ssh.root / "key.ppk"
    if not ppk.exists():
        ssh.gateway.run("puttygen", ssh.key, "-O", "private", "-o", ppk)
    # the name of the host leads nowhere: a proxy that is none connects to the port
    return [*options, "-proxycmd", f"socat - TCP:127.0.0.1:{ssh.port}", "-l", "box", "-i", str(ppk)]


def test_plink(ssh: World, putty: list[str]) -> None:
    run = ssh.gateway.run
    assert run("plink", *putty, "box", "cat; exit 7", input=b"a" * 1_000_000, code=7).stdout == b"a" * 1_000_000
    done = run("plink", *putty, "-t", "box", "stty size; echo problem >&2", input=b"")
    assert done.stdout == b"24 80\r\nproblem\r\n"
    assert run("plink", *putty, "-nc", "localhost:7777", "box", input=b"through").stdout == b"through"
    done = run("plink", *putty, "box", "head -c 5000000 /dev/zero | tr '\\0' b", input=b"")
    assert done.stdout == b"b" * 5_000_000


def test_psftp_and_pscp(ssh: World, putty: list[str], tmp_path: Path) -> None:
    run = ssh.gateway.run
    tree = tmp_path / "tree"
    for number in range(20):
        (tree / f"d{number % 3}").mkdir(parents=True, exist_ok=True)
        (tree / f"d{number % 3}" / f"f {number}").write_bytes(os.urandom(number * 10_000))
    script = f"mkdir /tmp/putty\ncd /tmp/putty\nput -r {tree} tree\nmv tree moved\nls moved\nget -r moved {tmp_path}/back\n"
    run("psftp", *putty, "box", input=f"{script}chmod 700 moved\nquit\n".encode())
    run("diff", "-r", tree, tmp_path / "back")
    for protocol in ("sftp", "scp"):
        ssh.run("box", f"mkdir /tmp/putty/{protocol}")
        run("pscp", *putty, f"-{protocol}", "-q", "-r", "-p", tree, f"box:/tmp/putty/{protocol}", stdin=subprocess.DEVNULL)
        (tmp_path / protocol).mkdir()
        there = f"box:/tmp/putty/{protocol}/tree"
        run("pscp", *putty, f"-{protocol}", "-q", "-r", there, tmp_path / protocol, stdin=subprocess.DEVNULL)
        run("diff", "-r", tree, tmp_path / protocol / "tree")
    ssh.run("box", "rm -r /tmp/putty")


# --- Ansible ----------------------------------------------------------------------------------------------------------

PLAYBOOK = """
- hosts: all
  gather_facts: false
  tasks:
    - ping:
    - raw: "echo raw; exit 3"
      register: result
      failed_when: "result.rc != 3 or result.stdout_lines != ['raw']"
    - copy: {{src: "{folder}/sent", dest: /tmp/ansible, mode: "0600"}}
    - command: {{cmd: "sha256sum /tmp/ansible", stdin: "unused"}}
      register: result
      failed_when: "result.stdout.split()[0] != '{digest}'"
    - fetch: {{src: /tmp/ansible, dest: "{folder}/fetched", flat: true}}
"""


def test_ansible(ssh: World, tmp_path: Path) -> None:
    """With the persistent connections that it has by default."""
    if shutil.which("ansible-playbook") is None:
        pytest.skip("not installed: ansible-core")
    (tmp_path / "sent").write_bytes(os.urandom(300_000))
    (tmp_path / "play.yml").write_text(PLAYBOOK.format(folder=tmp_path, digest=digest(tmp_path / "sent")))
    home = ssh.gateway.root / "ansible"
    variables = {"ansible_ssh_common_args": f"-F {ssh.config}", "ansible_python_interpreter": "/usr/bin/python3"}
    env = {**ssh.gateway.env, "HOME": str(home), "ANSIBLE_HOME": str(home), "ANSIBLE_LOCAL_TEMP": str(home / "tmp")}
    env["ANSIBLE_SSH_CONTROL_PATH_DIR"] = str(home / "cp")
    home.mkdir()
    argv = ["ansible-playbook", "-i", "box,", "-e", json.dumps(variables), str(tmp_path / "play.yml")]
    try:
        done = subprocess.run(
            argv, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=100, check=False, cwd=tmp_path
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert "ok=5 " in done.stdout
        assert digest(tmp_path / "fetched") == digest(tmp_path / "sent")
        (control,) = (home / "cp").iterdir()
        assert ssh.run("-o", f"ControlPath={control}", "box", "echo still there").stdout == b"still there\n"
    finally:
        for control in (home / "cp").glob("*"):
            ssh.run("-o", f"ControlPath={control}", "-O", "exit", "box")


# --- over TCP, with OpenSSH's client and libssh2 ----------------------------------------------------------------------


def test_rsync_and_git_over_tcp(ssh: World, tmp_path: Path) -> None:
    shell = f"ssh -F {ssh.tcp}"
    tree = grow(tmp_path / "tree")
    ssh.gateway.run("rsync", "-a", "-e", shell, f"{tree}/", "box:/tmp/synced/")
    ssh.gateway.run("rsync", "-a", "-e", shell, "box:/tmp/synced/", tmp_path / "back")
    ssh.gateway.run("diff", "-r", tree, tmp_path / "back")
    ssh.gateway.env["GIT_SSH_COMMAND"] = shell
    git = ("git", "-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "init.defaultBranch=main")
    ssh.run("box", "git init -q --bare /tmp/repository.git")
    for words in ("init -q", "add .", "commit -q -m all", "push -q box:/tmp/repository.git HEAD:main"):
        ssh.gateway.run(*git, "-C", tree, *words.split())
    ssh.gateway.run(*git, "clone", "-q", "-b", "main", "root%box@box:/tmp/repository.git", tmp_path / "clone")
    ssh.gateway.run("rm", "-r", tree / "empty")  # git keeps no empty folders
    ssh.gateway.run("diff", "-r", "-x", ".git", tree, tmp_path / "clone")


def test_curl(ssh: World, tmp_path: Path) -> None:
    """curl speaks sftp and scp through libssh2."""
    if "sftp" not in ssh.gateway.run("curl", "--version", text=True).stdout.split():
        pytest.skip("this curl speaks no sftp")
    source = tmp_path / "source"
    source.write_bytes(os.urandom(1 << 20) * 5)
    pin = ssh.fingerprint.partition(":")[2]
    words = ("curl", "-sS", "--hostpubsha256", pin, "--key", ssh.key, "--pubkey", f"{ssh.key}.pub", "-u", "box:")
    for scheme in ("sftp", "scp"):
        url = f"{scheme}://127.0.0.1:{ssh.port}/tmp/by-{scheme}"
        ssh.gateway.run(*words, "-T", source, url)
        ssh.gateway.run(*words, "-o", tmp_path / scheme, url)
        assert digest(tmp_path / scheme) == digest(source)


# --- Unison -----------------------------------------------------------------------------------------------------------


def test_unison(ssh: World, tmp_path: Path) -> None:
    if shutil.which("unison") is None:
        pytest.skip("not installed: unison")
    tree = grow(tmp_path / "tree")
    env = {**ssh.gateway.env, "UNISON": str(tmp_path / "unison")}

    def synchronize() -> None:
        argv = ["unison", str(tree), "ssh://box//root/united", "-batch", "-auto", "-sshargs", f"-F {ssh.config}"]
        done = subprocess.run(argv, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stdout + done.stderr

    synchronize()
    assert ssh.run("box", "cd /root/united && find . | wc -l").stdout == b"%d\n" % (len(list(tree.rglob("*"))) + 1)
    ssh.run("box", "cd /root/united && echo inside > new && rm 'd2/file 2'")
    (tree / "d3" / "file 3").write_text("here")
    synchronize()
    assert (tree / "new").read_text() == "inside\n"
    assert not (tree / "d2" / "file 2").exists()
    assert ssh.run("box", "cat '/root/united/d3/file 3'").stdout == b"here"

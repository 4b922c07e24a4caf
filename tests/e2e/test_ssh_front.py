"""The gateway's own ssh server with the real OpenSSH client: sessions, streams, signals, terminals."""

from __future__ import annotations

import concurrent.futures
import fcntl
import os
import pty
import signal
import struct
import subprocess
import termios
from pathlib import Path

import pytest

from .conftest import Gateway, make, wait_until
from .sshworld import SshWorld, digest

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def ssh(gateway: Gateway) -> SshWorld:
    make(gateway, "box")
    return SshWorld(gateway)


def test_exit_codes_and_streams(ssh: SshWorld) -> None:
    assert ssh.run("box", "uname -n").stdout == b"box\n"
    ssh.run("box", "exit 42", code=42)
    done = ssh.run("box", "cat; echo problem >&2", input=b"in")
    assert (done.stdout, done.stderr) == (b"in", b"problem\n")


def test_a_command_is_given_to_the_login_shell_as_it_is(ssh: SshWorld) -> None:
    assert ssh.run("box", """printf '%s|' "a b" 'c'"'"'d' \\$x; echo "$0" | wc -l""").stdout == b"a b|c'd|$x|1\n"
    assert ssh.run("box", b"printf %s \xff\xfe | od -An -tx1".decode("utf-8", "surrogateescape")).stdout == b" ff fe\n"


def test_death_by_a_signal_is_told(ssh: SshWorld) -> None:
    ssh.run("box", "kill -TERM $$", code=255)
    assert b"SIGTERM" not in ssh.run("box", "sh -c 'kill -KILL $$'; echo $?").stderr


def test_the_environment(ssh: SshWorld) -> None:
    script = "echo $COLOR $LANG; echo $SSH_CONNECTION; echo $HOME; echo $USER; pwd"
    done = ssh.run("-o", "SetEnv=COLOR=blue LANG=C.UTF-8", "box", script)
    color, connection, home, user, cwd = done.stdout.decode().splitlines()
    assert color == "blue C.UTF-8"
    assert len(connection.split()) == 4
    assert (home, user, cwd) == ("/root", "root", "/root")
    assert ssh.run("-o", "SendEnv=GREETING", "box", "echo $GREETING", env={"GREETING": "hello there"}).stdout == b"hello there\n"


def test_half_close_keeps_the_other_direction(ssh: SshWorld, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    for number in range(50):
        (tree / f"file {number}").write_bytes(os.urandom(number * 1000))
    there = "$SSH box 'cd /tmp && tar xf - && tar cf - tree'"
    ssh.sh(f"tar -C {tmp_path} -cf - tree | {there} | tar -C {tmp_path} --one-top-level=back -xf -")
    ssh.sh(f"diff -r {tree} {tmp_path}/back/tree")


def test_a_reader_that_leaves_ends_the_writer(ssh: SshWorld) -> None:
    done = ssh.sh("$SSH box 'yes; echo status $? >&2' | head -1", timeout=20)
    assert done.stdout == b"y\n"
    done = ssh.sh("yes | $SSH box head -1", timeout=20)
    assert done.stdout == b"y\n"


def test_a_hundred_megabytes_each_way(ssh: SshWorld, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(os.urandom(1 << 20) * 100)
    with source.open("rb") as file:
        there = ssh.run("box", "tee /tmp/big | sha256sum", stdin=file).stdout.decode().split()[0]
    assert there == digest(source)
    ssh.sh(f"$SSH box cat /tmp/big > {tmp_path}/back")
    assert digest(tmp_path / "back") == digest(source)


def test_rekeying_in_the_middle(ssh: SshWorld, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(os.urandom(20 << 20))
    with source.open("rb") as file, (tmp_path / "back").open("wb") as back:
        process = ssh.popen("-v", "-o", "RekeyLimit=1M", "box", "cat", stdin=file, stdout=back, stderr=subprocess.PIPE)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 0
    assert err.count(b"SSH2_MSG_NEWKEYS received") > 10
    assert digest(tmp_path / "back") == digest(source)


@pytest.mark.parametrize("cipher", ["chacha20-poly1305@openssh.com", "aes256-ctr", "aes256-gcm@openssh.com"])
def test_other_ciphers(ssh: SshWorld, cipher: str) -> None:
    done = ssh.run("-c", cipher, "box", "head -c 3000000 /dev/zero; cat", input=b"x" * 1000)
    assert done.stdout == bytes(3000000) + b"x" * 1000


def test_the_fastest_cipher_is_chosen(ssh: SshWorld) -> None:
    assert b"cipher: aes128-gcm@openssh.com" in ssh.run("-v", "box", "true").stderr


def test_keepalives_are_answered(ssh: SshWorld) -> None:
    ssh.run("-o", "ServerAliveInterval=1", "-o", "ServerAliveCountMax=1", "box", "sleep 3.5")


def test_a_terminal(ssh: SshWorld) -> None:
    outer, inner = pty.openpty()

    def resize(rows: int, columns: int) -> None:
        fcntl.ioctl(inner, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    resize(33, 111)
    script = "stty size; echo $TERM; trap 'stty size; exit 7' WINCH; echo ready; while :; do sleep 0.1; done"
    process = ssh.popen("-tt", "box", script, stdin=inner, stdout=inner, stderr=inner, start_new_session=True)
    seen = b""
    try:
        while b"ready" not in seen:
            seen += os.read(outer, 4096)
        assert b"33 111" in seen
        resize(44, 122)
        process.send_signal(signal.SIGWINCH)
        while b"44 122" not in seen:
            seen += os.read(outer, 4096)
        assert process.wait(20) == 7
    finally:
        process.kill()
        process.wait()
        os.close(inner)
        os.close(outer)


def test_a_terminal_whose_reader_pauses_loses_nothing(ssh: SshWorld) -> None:
    lines = 300_000
    process = ssh.popen("-tt", "box", f"seq {lines}; exit 5", stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.read(3) == b"1\r\n"
    with pytest.raises(subprocess.TimeoutExpired):  # held up by us, whatever is over inside
        process.wait(1.5)
    assert process.stdout.read().split() == [b"%d" % number for number in range(2, lines + 1)]
    process.communicate(timeout=20)
    assert process.returncode == 5


def test_ctrl_c_interrupts_what_runs_on_the_terminal(ssh: SshWorld) -> None:
    script = "trap 'echo caught; exit 3' INT; echo ready; while :; do sleep 0.1; done"
    process = ssh.popen("-tt", "box", script, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\r\n"
    out, _ = process.communicate(b"\x03", timeout=20)
    assert b"caught" in out
    assert process.returncode == 3


def test_a_shell_reads_its_input(ssh: SshWorld) -> None:
    assert ssh.run("-T", "box", input=b"cd /tmp\npwd\nexit 5\n", code=5).stdout == b"/tmp\n"


def test_background_processes_outlive_the_command(ssh: SshWorld) -> None:
    pid = ssh.run("box", "setsid sleep 300 </dev/null >/dev/null 2>&1 & echo $!").stdout.decode().strip()
    ssh.run("box", f"kill -0 {pid} && kill {pid}")


def test_a_client_that_leaves_takes_its_command_along(ssh: SshWorld) -> None:
    process = ssh.popen("box", "echo $$; exec sleep 300", stdout=subprocess.PIPE)
    assert process.stdout is not None
    pid = process.stdout.readline().decode().strip()
    process.kill()
    process.communicate()
    wait_until(lambda: ssh.run("box", f"kill -0 {pid} 2>/dev/null; echo $?").stdout == b"1\n", "the command is gone")


def test_what_was_told_to_stay_outlives_a_client_that_leaves(ssh: SshWorld) -> None:
    """As servers of editors are started. A command that ignores SIGHUP shows when the gateway's SIGKILL has come."""
    scripts = (
        ("", "nohup sleep 300 >/dev/null 2>&1 & echo $!; exec sleep 300", True),
        ("", "setsid sleep 300 >/dev/null 2>&1 & echo $!; exec sleep 300", True),
        ("-tt", "nohup sleep 300 >/dev/null 2>&1 & echo $!; exec sleep 300", True),
        ("-tt", "setsid sleep 300 >/dev/null 2>&1 & echo $!; exec sleep 300", True),
        ("", "sleep 300 & echo $!; exec sleep 300", False),
        ("", "trap '' HUP; echo $$; while :; do sleep 300; done", False),  # the last one to end
    )
    clients = [ssh.popen(*filter(None, (flag, "box", script)), stdout=subprocess.PIPE) for flag, script, _ in scripts]
    pids = [client.stdout.readline().decode().strip() for client in clients if client.stdout is not None]
    assert all(pid.isdigit() for pid in pids)
    for client in clients:
        client.kill()
        client.communicate()

    def alive(pid: str) -> bool:
        return ssh.run("box", f"kill -0 {pid} 2>/dev/null; echo $?").stdout == b"0\n"

    wait_until(lambda: not alive(pids[-1]), "SIGKILL has come")
    assert [alive(pid) for pid in pids] == [stays for _, _, stays in scripts]
    ssh.run("-f", "box", "nohup sleep 300 >/dev/null 2>&1 & echo $! > /tmp/left")
    wait_until(lambda: ssh.run("box", "kill $(cat /tmp/left) 2>/dev/null; echo $?").stdout == b"0\n", "it stays")
    ssh.run("box", "kill " + " ".join(pid for pid, (_, _, stays) in zip(pids, scripts, strict=True) if stays))


def test_many_sessions_on_one_connection(ssh: SshWorld) -> None:
    control = ssh.root / "mux"
    shared = ("-o", f"ControlPath={control}")
    master = ssh.popen("-o", "ControlMaster=yes", *shared, "-N", "box")

    def session(number: int) -> subprocess.CompletedProcess[bytes]:
        return ssh.run(*shared, "box", f"cat; echo {number}; head -c 200000 /dev/zero", input=b"%d\n" % number)

    try:
        wait_until(control.exists, "the master is up")
        with concurrent.futures.ThreadPoolExecutor(20) as pool:
            outs = list(pool.map(session, range(20)))
        for number, done in enumerate(outs):
            assert done.stdout == b"%d\n%d\n" % (number, number) + bytes(200000)
    finally:
        master.terminate()
        master.wait(20)


def test_many_connections(ssh: SshWorld) -> None:
    with concurrent.futures.ThreadPoolExecutor(30) as pool:
        outs = list(pool.map(lambda number: ssh.run("box", f"cat; echo {number}", input=b"in "), range(30)))
    assert [done.stdout for done in outs] == [b"in %d\n" % number for number in range(30)]


def test_another_user(ssh: SshWorld) -> None:
    assert ssh.run("-l", "root", "box", "id -un").stdout == b"root\n"
    ssh.run("box", "echo 'ada:x:1234:1234::/tmp:/bin/sh' >> /etc/passwd; echo 'ada:x:1234:' >> /etc/group")
    assert ssh.run("-l", "ada", "box", "id -un; pwd; echo $HOME").stdout == b"ada\n/tmp\n/tmp\n"
    err = ssh.run("-l", "nosuchuser", "box", "true", code=255).stderr.decode()
    assert "nosuchuser" in err


def test_ssh_copy_id_does_no_harm(ssh: SshWorld, tmp_path: Path) -> None:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / "key"], check=True)
    (ssh.gateway.home / ".ssh").mkdir(mode=0o700, exist_ok=True)
    ssh.sh(f"ssh-copy-id -f -F {ssh.config} -i {tmp_path}/key.pub box")
    key = (tmp_path / "key.pub").read_text().split()[1]
    assert key in ssh.run("box", "cat ~/.ssh/authorized_keys").stdout.decode()


def test_unknown_subsystems_are_refused(ssh: SshWorld) -> None:
    assert b"subsystem request failed" in ssh.run("-s", "box", "netconf", code=255).stderr


def test_a_stopped_sandbox_ends_its_sessions_with_a_message(ssh: SshWorld) -> None:
    make(ssh.gateway, "mortal")
    process = ssh.popen("mortal", "echo ready; sleep 600", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    ssh.gateway.sandbox("stop", "mortal")
    _, err = process.communicate(timeout=15)
    assert process.returncode == 255
    assert b"mortal" in err
    assert b"stopped" in err
    assert ssh.run("mortal", "echo awake").stdout == b"awake\n"


def test_a_wrong_name_is_told_before_ssh_speaks(ssh: SshWorld) -> None:
    err = ssh.run("nosuchbox", "true", code=255).stderr.decode()
    assert "nosuchbox" in err

"""exec, ps and attach through the daemon and the embedded service: bytes, codes, signals, sessions that stay."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from .conftest import BIN, Gateway, make, wait_until

pytestmark = pytest.mark.e2e

DEADLINE = 60.0  # seconds
BLOCK = bytes(range(256)) * 4096  # 1 MiB; every block of the stream begins with its number
COUNT = 100  # MiB


@contextlib.contextmanager
def running(gateway: Gateway, *args: str) -> Iterator[subprocess.Popen[bytes]]:
    """`sandbox ARGS` with pipes."""
    pipe = subprocess.PIPE
    with subprocess.Popen([BIN / "sandbox", *args], env=gateway.env, stdin=pipe, stdout=pipe, stderr=pipe) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()
            for stream in (process.stdin, process.stdout, process.stderr):
                assert stream is not None
                with contextlib.suppress(BrokenPipeError):
                    stream.close()


def line(process: subprocess.Popen[bytes]) -> bytes:
    assert process.stdout is not None
    return process.stdout.readline()


def through(process: subprocess.Popen[bytes], at: dict[int, Callable[[], None]] | None = None) -> tuple[str, str]:
    """Send COUNT MiB in and read all that comes out; both hashes. `at`: what to do once so many MiB have come out."""
    assert process.stdin is not None
    assert process.stdout is not None
    stdin, sent = process.stdin, hashlib.sha256()

    def feed() -> None:
        for number in range(COUNT):
            block = number.to_bytes(8, "big") + BLOCK[8:]
            sent.update(block)
            stdin.write(block)
        stdin.close()

    feeder = threading.Thread(target=feed)
    feeder.start()
    came, size, todo = hashlib.sha256(), 0, dict(at or {})
    while data := process.stdout.read1(1 << 20):  # type: ignore[attr-defined]  # a pipe's reader is buffered
        came.update(data)
        size += len(data)
        for mebibytes in [number for number in todo if size >= number << 20]:
            todo.pop(mebibytes)()
    feeder.join(DEADLINE)
    assert size == COUNT << 20
    return sent.hexdigest(), came.hexdigest()


def test_a_hundred_megabytes_both_ways(gateway: Gateway, box: str) -> None:
    with running(gateway, "exec", box, "--", "cat") as process:
        sent, came = through(process)
        assert process.wait(DEADLINE) == 0
    assert sent == came


def test_binary_into_a_file_and_back(gateway: Gateway, box: str) -> None:
    data = os.urandom(5_000_000)
    gateway.sandbox("exec", box, "--", "sh", "-c", "cat > /root/data", stdin=data)
    digest = gateway.sh(box, "sha256sum < /root/data").split()[0]
    assert digest == hashlib.sha256(data).hexdigest()
    assert gateway.run(BIN / "sandbox", "exec", box, "--", "cat", "/root/data").stdout == data


@pytest.mark.parametrize("code", [0, 1, 42, 255])
def test_exit_codes(gateway: Gateway, box: str, code: int) -> None:
    gateway.sandbox("exec", box, "--", "sh", "-c", f"exit {code}", code=code)


def test_how_a_command_may_fail(gateway: Gateway, box: str) -> None:
    gateway.sandbox("exec", box, "--", "sh", "-c", "kill -SEGV $$", code=139)
    assert "no-such-program" in gateway.sandbox("exec", box, "--", "no-such-program", code=127).stderr
    assert "/etc/passwd" in gateway.sandbox("exec", box, "--", "/etc/passwd", code=126).stderr
    assert "no-such-user" in gateway.sandbox("exec", box, "--user", "no-such-user", "--", "id", code=127).stderr


def test_another_user(gateway: Gateway, box: str) -> None:
    assert gateway.sandbox("exec", box, "--user", "nobody", "--", "id", "-un").stdout == "nobody\n"


def test_environment_folder_and_shell(gateway: Gateway, box: str) -> None:
    options = ("--env", "A=1", "--env", "HERE", "--cwd", "/usr")
    done = gateway.sandbox("exec", box, *options, "--", "sh", "-c", "echo $A $HERE $PWD", env={"HERE": "ü b"})
    assert done.stdout == "1 ü b /usr\n"
    assert gateway.sandbox("exec", box, "--shell", "/bin/bash", "--", "echo", "$HOME", "a  b").stdout == "$HOME a  b\n"


def test_half_close(gateway: Gateway, box: str) -> None:
    assert gateway.sandbox("exec", box, "--", "sort", stdin="b\nc\na\n").stdout == "a\nb\nc\n"


def test_pipelines_end_as_they_do_here(gateway: Gateway, box: str) -> None:
    script = f'"{BIN}/sandbox" exec {box} -- yes | head -1; echo "${{PIPESTATUS[0]}}"'
    done = gateway.run("bash", "-c", script)
    assert (done.stdout, done.stderr) == (b"y\n141\n", b"")
    script = f'yes | "{BIN}/sandbox" exec {box} -- head -1; echo "${{PIPESTATUS[*]}}"'
    assert gateway.run("bash", "-c", script).stdout == b"y\n141 0\n"


def test_flags_of_shared_descriptors_stay(gateway: Gateway, box: str) -> None:
    """A program that shares our streams must not find them non-blocking."""
    script = f'''
import fcntl, os, subprocess
process = subprocess.Popen(["{BIN}/sandbox", "exec", "{box}", "--", "sh", "-c", "echo up; read x"])
while os.fstat(0) and process.poll() is None:
    assert not any(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_NONBLOCK for fd in (0, 1, 2))
    os.write(1, b"")
assert process.returncode == 0
assert not any(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_NONBLOCK for fd in (0, 1, 2))
'''
    with subprocess.Popen(
        [BIN / "python", "-c", script], env=gateway.env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert line(process) == b"up\n"
        out, err = process.communicate(b"\n", timeout=DEADLINE)
    assert (process.returncode, out, err) == (0, b"", b"")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGQUIT, 131)])
def test_signals_reach_the_command(gateway: Gateway, box: str, number: signal.Signals, code: int) -> None:
    with running(gateway, "exec", box, "--", "sh", "-c", "ulimit -c 0; echo up; exec sleep 1000") as process:
        assert line(process) == b"up\n"
        process.send_signal(number)
        assert process.wait(DEADLINE) == code
    script = f"trap 'echo caught; exit 7' {number.name[3:]}; echo up; while :; do sleep 0.05; done"
    with running(gateway, "exec", box, "--", "sh", "-c", script) as process:
        assert line(process) == b"up\n"
        process.send_signal(number)
        assert line(process) == b"caught\n"
        assert process.wait(DEADLINE) == 7


def test_detach_ps_attach(gateway: Gateway, box: str) -> None:
    script = "echo early; until [ -e /tmp/go ]; do sleep 0.05; done; echo late; exit 6"
    started = gateway.json("exec", box, "--detach", "--", "sh", "-c", script)
    (item,) = gateway.json("ps", box)["sessions"]
    assert (item["id"], item["pid"], item["attached"]) == (started["session"], started["pid"], False)
    assert started["session"][:8] in gateway.sandbox("ps", box, "--format", "pretty").stdout
    gateway.sandbox("down", "--keep-local")  # what is left running outlives the daemon
    with running(gateway, "attach", box, started["session"][:4]) as process:
        assert line(process) == b"early\n"
        gateway.sh(box, "touch /tmp/go")
        assert line(process) == b"late\n"
        assert process.wait(DEADLINE) == 6
    assert gateway.json("ps", box) == {"sessions": []}


def test_ps_leaves_a_stopped_sandbox_alone(gateway: Gateway) -> None:
    make(gateway, "asleep")
    gateway.sandbox("exec", "asleep", "--", "true")
    gateway.sandbox("stop", "asleep", "--wait")
    done = gateway.sandbox("ps", "asleep")
    assert json.loads(done.stdout) == {"sessions": []}
    assert "asleep" in done.stderr
    assert gateway.json("status", "asleep")["status"] == "stopped"
    assert "asleep" in gateway.sandbox("attach", "asleep", code=69).stderr
    assert gateway.json("status", "asleep")["status"] == "stopped"


# --- what may break --------------------------------------------------------------------------------------


def kill_daemon(gateway: Gateway) -> None:
    """As a crash would end it; nobody but the command itself starts another one."""
    pid = gateway.daemon_pid
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not Path(f"/proc/{pid}").exists() or " Z " in Path(f"/proc/{pid}/stat").read_text(), "the daemon is gone")


def test_the_daemon_is_killed_in_the_middle(own_gateway: Gateway) -> None:
    """100 MB go through while the daemon is killed three times; not one byte is lost or repeated."""
    gateway = own_gateway
    make(gateway, "box")
    with running(gateway, "exec", "box", "--", "cat") as process:
        sent, came = through(process, dict.fromkeys((5, 40, 80), lambda: kill_daemon(gateway)))
        assert process.wait(DEADLINE) == 0
    assert sent == came


def test_the_sandbox_is_stopped(own_gateway: Gateway) -> None:
    gateway = own_gateway
    make(gateway, "box")
    with running(gateway, "exec", "box", "--", "sh", "-c", "echo up; exec sleep 1000") as process:
        assert line(process) == b"up\n"
        gateway.sandbox("stop", "box", "--wait")
        assert process.wait(DEADLINE) == 69
        assert process.stderr is not None
        assert b"stopped" in process.stderr.read()
    assert gateway.json("status", "box")["status"] == "stopped"  # it was not started again


def test_the_sandbox_is_restarted(own_gateway: Gateway) -> None:
    gateway = own_gateway
    make(gateway, "box")
    with running(gateway, "exec", "box", "--", "sh", "-c", "echo up; exec sleep 1000") as process:
        assert line(process) == b"up\n"
        process.send_signal(signal.SIGSTOP)  # asleep meanwhile
        gateway.sandbox("stop", "box", "--wait")
        gateway.sandbox("start", "box", "--wait")
        process.send_signal(signal.SIGCONT)
        assert process.wait(DEADLINE) in (1, 69)
        assert process.stderr is not None
        said = process.stderr.read()
        assert b"restarted" in said or b"stopped" in said


def test_the_service_is_killed(own_gateway: Gateway) -> None:
    """The embedded service takes its sandboxes with it: the command says so instead of hanging."""
    gateway = own_gateway
    make(gateway, "box")
    with running(gateway, "exec", "box", "--", "sh", "-c", "echo up; exec sleep 1000") as process:
        assert line(process) == b"up\n"
        os.kill(int(gateway.service["pid"]), signal.SIGKILL)
        assert process.wait(DEADLINE) in (1, 69)
        assert process.stderr is not None
        assert process.stderr.read().startswith(b"sandbox: ")

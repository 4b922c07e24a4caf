"""What `gatewayd.local.runtime.base` promises, checked against every runtime that this machine can run."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from typing import Any

import pytest

from gatewayd.local.runtime.base import Box, BoxSpec, PortRefused, Runtime, RuntimeFailure, SpawnSpec
from gatewayd.local.runtime.docker import LABEL_BOX
from gatewayd.local.runtime.docker_api import DockerApi

from .conftest import Kind, Start, clear, close, read_all, read_until, run, sh, write_all

pytestmark = pytest.mark.asyncio(loop_scope="module")

MARK = b"\x1e\xff"  # how the Docker runtime's own records begin


# Processes


async def test_a_process_has_three_streams_and_an_exit_code(box: Box) -> None:
    ran = await run(box, "/bin/sh", "-c", "cat; echo problem >&2; exit 3", stdin=b"in\n")
    assert ran == (3, b"in\n", b"problem\n")


async def test_the_end_of_stdin_ends_that_direction_only(box: Box) -> None:
    process = await box.spawn(SpawnSpec(["/bin/sh", "-c", "cat >/dev/null; echo after the end"]))
    os.close(process.stdin)
    assert await read_all(process.stdout) == b"after the end\n"
    assert await process.exited == 0
    os.close(process.stderr or -1)


async def test_every_byte_comes_through(box: Box) -> None:
    content = os.urandom(700_000) + MARK * 5 + b"\n" + MARK + b"x" * 3000 + MARK[:1]
    ran = await run(box, "/bin/sh", "-c", "cat; head -c 400000 /dev/zero >&2", stdin=content * 3)
    assert ran.code == 0
    assert hashlib.sha256(ran.out).digest() == hashlib.sha256(content * 3).digest()
    assert ran.err == bytes(400_000)


async def test_the_last_byte_does_not_wait_for_another(box: Box) -> None:
    process = await box.spawn(SpawnSpec(["/bin/sh", "-c", r"printf 'x\036'; read y; printf 'z\036\377'; read y"]))
    assert await read_until(process.stdout, b"x\x1e") == b"x\x1e"
    os.write(process.stdin, b"\n")
    assert await read_until(process.stdout, b"\xff") == b"z\x1e\xff"
    os.write(process.stdin, b"\n")
    assert await process.exited == 0
    close(process)


async def test_what_was_written_before_the_exit_is_there_at_the_exit(box: Box) -> None:
    process = await box.spawn(SpawnSpec(["/bin/sh", "-c", "head -c 30000 /dev/zero; head -c 20000 /dev/zero >&2; exit 9"]))
    assert await asyncio.wait_for(process.exited, 20) == 9
    assert len(os.read(process.stdout, 65536)) == 30_000
    assert len(os.read(process.stderr or -1, 65536)) == 20_000
    close(process)


async def test_a_process_nobody_reads_from_is_held_up_and_can_be_killed(box: Box) -> None:
    process = await box.spawn(SpawnSpec(["/bin/sh", "-c", "echo up >&2; exec cat /dev/zero"]))
    assert await read_until(process.stderr or -1, b"up\n") == b"up\n"
    await process.signal(signal.SIGKILL)
    assert await asyncio.wait_for(process.exited, 20) == 128 + signal.SIGKILL
    close(process)


async def test_a_process_left_behind_keeps_its_pipe(box: Box) -> None:
    script = "(read x; echo late) <&3 & echo early; exit 4"
    process = await box.spawn(
        SpawnSpec(["/bin/bash", "-c", f"exec 3<> <(:); mkfifo /tmp/go$$; echo /tmp/go$$; exec 3<>/tmp/go$$; {script}"])
    )
    seen = await read_until(process.stdout, b"early\n")
    assert await asyncio.wait_for(process.exited, 20) == 4
    await sh(box, f"echo > {seen.split()[0].decode()}")
    assert await read_all(process.stdout) == b"late\n"
    os.close(process.stdin)
    os.close(process.stderr or -1)


async def test_a_process_ended_by_a_signal_counts_from_128(box: Box) -> None:
    assert await run(box, "/bin/sh", "-c", "kill -TERM $$") == (128 + signal.SIGTERM, b"", b"")


async def test_a_process_leads_its_own_session(box: Box) -> None:
    process = await box.spawn(SpawnSpec(["/bin/sh", "-c", "ps -o pid=,pgid=,sid= -p $$"]))
    assert (await read_all(process.stdout)).split() == [str(process.pid).encode()] * 3
    await process.exited
    os.close(process.stdin)
    os.close(process.stderr or -1)


async def test_environment_folder_and_user(box: Box) -> None:
    script = 'echo "$(id -un) $(id -gn) $HOME $USER $LOGNAME $(pwd) $X"'
    assert await sh(box, script, env={"X": "a b'c\n$d"}) == "root root /root root root /root a b'c\n$d\n"
    assert await sh(box, script, user="user", cwd="/usr") == "user user /home/user user user /usr \n"
    assert await sh(box, script, user="1000", env={"HOME": "/tmp"}) == "user user /tmp user user /home/user \n"
    assert await sh(box, "id -g; id -G", user="user:sshd") == "100\n100\n"
    assert await sh(box, "id -u; id -g", user="4321:8765") == "4321\n8765\n"
    assert (
        await sh(box, "pwd; umask; echo $PATH", cwd="../usr/bin/../lib", env={"PATH": "/usr/bin:/x"})
        == "/usr/lib\n0022\n/usr/bin:/x\n"
    )


async def test_arguments_arrive_as_they_are(box: Box) -> None:
    words = ["", " ", "a'b", '"', "$HOME", "`id`", "\\", "*", "-n", "new\nline", "ünï", "\x1e\x01", "x" * 20_000]
    ran = await run(box, "python3", "-c", "import sys; print(ascii(sys.argv[1:]))", *words)
    assert ran.out.decode() == ascii(words) + "\n"


@pytest.mark.parametrize(
    ("argv", "options", "number"),
    [
        (["no-such-program"], {}, errno.ENOENT),
        (["/no/such/program"], {}, errno.ENOENT),
        (["/etc"], {}, errno.EACCES),
        (["/etc/passwd"], {}, errno.EACCES),
        (["true"], {"cwd": "/no/such/folder"}, errno.ENOENT),
        (["true"], {"cwd": "/etc/passwd"}, errno.ENOTDIR),
        (["true"], {"cwd": "/root", "user": "user"}, errno.EACCES),
        (["true"], {"env": {"PATH": "/nowhere"}}, errno.ENOENT),
        (["true"], {"user": "nobody-at-all"}, errno.EINVAL),
        (["tr\0ue"], {}, errno.EINVAL),
    ],
)
async def test_what_cannot_be_started_says_why(box: Box, argv: list[str], options: dict[str, Any], number: int) -> None:
    with pytest.raises(OSError) as caught:
        await box.spawn(SpawnSpec(argv, **options))
    assert caught.value.errno == number


async def test_too_large_a_request_is_refused_and_harms_nothing(box: Box) -> None:
    with pytest.raises(RuntimeFailure, match="too large"):
        await run(box, "true", env={"X": "y" * 300_000})
    with pytest.raises(RuntimeFailure, match="too large"):
        await run(box, "true", *["word"] * 100_000)
    assert (await run(box, "true")).code == 0


async def test_many_processes_at_once_do_not_mix(box: Box) -> None:
    async def one(number: int) -> tuple[int, bytes]:
        ran = await run(box, "/bin/sh", "-c", f"cat; exit {number}", stdin=b"%d" % number)
        return ran.code, ran.out

    assert await asyncio.gather(*(one(number) for number in range(10))) == [(n, b"%d" % n) for n in range(10)]


async def test_a_signal_reaches_the_whole_group(box: Box) -> None:
    process = await box.spawn(SpawnSpec(["/bin/sh", "-c", "sleep 1000 & echo up; wait"]))
    assert await read_until(process.stdout, b"\n") == b"up\n"
    await process.signal(signal.SIGKILL)
    assert await process.exited == 128 + signal.SIGKILL
    assert await read_all(process.stdout) == b""  # end of file: the child that held the pipe is gone too
    await process.signal(signal.SIGKILL)  # no error once it is gone
    os.close(process.stdin)
    os.close(process.stderr or -1)


async def test_a_signal_can_be_handled(box: Box) -> None:
    script = "trap 'echo got it; exit 5' INT; echo up; while :; do sleep 0.05; done"
    process = await box.spawn(SpawnSpec(["/bin/sh", "-c", script], user="user"))
    assert await read_until(process.stdout, b"\n") == b"up\n"
    await process.signal(signal.SIGINT)
    assert await read_all(process.stdout) == b"got it\n"
    assert await process.exited == 5
    os.close(process.stdin)
    os.close(process.stderr or -1)


# Terminals


async def test_a_terminal_has_a_size_and_an_owner(box: Box, kind: Kind) -> None:
    script = "tty | tr ' ' -; stty size; stat -L -c %U /dev/stdin; echo $TERM; read x; stty size; exit 6"
    process = await box.spawn(SpawnSpec(["/bin/sh", "-c", script], pty=True, cols=90, rows=30, user="user"))
    assert process.stderr is None
    assert process.stdin == process.stdout
    seen = await read_until(process.stdout, b"xterm-256color\r\n")
    assert seen.startswith(b"not-a-tty" if kind.name == "runsc" else b"/dev/pts/")  # gVisor cannot name what it has from outside
    assert seen.split()[1:4] == [b"30", b"90", b"user"]
    await process.resize(100, 40)
    os.write(process.stdin, b"\n")
    assert b"40 100" in await read_all(process.stdout)
    assert await process.exited == 6


async def test_a_terminal_turns_keys_into_signals(box: Box) -> None:
    process = await box.spawn(SpawnSpec(["/bin/sh", "-c", "echo up; exec sleep 1000"], pty=True))
    await read_until(process.stdout, b"up\r\n")
    os.write(process.stdin, b"\x03")
    assert await asyncio.wait_for(process.exited, 20) == 128 + signal.SIGINT
    os.close(process.stdout)


async def test_a_closed_terminal_hangs_up(box: Box) -> None:
    process = await box.spawn(SpawnSpec(["/bin/sh", "-c", "echo up; exec sleep 1000"], pty=True))
    await read_until(process.stdout, b"up\r\n")
    os.close(process.stdout)
    assert await asyncio.wait_for(process.exited, 20) == 128 + signal.SIGHUP


# Ports

SERVER = """
import socket
server = socket.create_server((%r, 0), family=socket.%s)
print(server.getsockname()[1], flush=True)
connection = server.accept()[0]
data = b""
while chunk := connection.recv(65536):
    data += chunk
connection.sendall(b"got %%d" %% len(data))
"""


@pytest.mark.parametrize(("address", "family"), [("127.0.0.1", "AF_INET"), ("::1", "AF_INET6")])
async def test_ports_are_reached_on_both_loopbacks(box: Box, address: str, family: str) -> None:
    process = await box.spawn(SpawnSpec(["python3", "-c", SERVER % (address, family)]))
    port = int(await read_until(process.stdout, b"\n"))
    loop = asyncio.get_running_loop()
    with await box.connect(port) as sock:
        assert sock.getblocking() is False
        await loop.sock_sendall(sock, bytes(300_000))
        sock.shutdown(socket.SHUT_WR)
        answer = b""
        while data := await asyncio.wait_for(loop.sock_recv(sock, 100), 20):
            answer += data
    assert answer == b"got 300000"
    assert await process.exited == 0
    close(process)


async def test_a_silent_port_refuses(box: Box) -> None:
    with pytest.raises(PortRefused, match="5432"):
        await box.connect(5432)


async def test_this_machines_loopback_is_out_of_reach(box: Box) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(PortRefused):
            await box.connect(port)
        ran = await run(box, "python3", "-c", f"import socket; socket.create_connection(('127.0.0.1', {port}))")
        assert b"ConnectionRefusedError" in ran.err


# Files


async def test_files_are_replaced_at_once_or_not_at_all(box: Box) -> None:
    writer = await box.open_write("made/on/the/way/file")
    os.write(writer.fd, b"first")
    await writer.commit()
    path = "/root/made/on/the/way/file"
    assert await sh(box, f"stat -c %a {path}") == "644\n"
    await sh(box, f"chmod 640 {path}; chown user {path}")
    dropped = await box.open_write(path)
    os.write(dropped.fd, b"never seen")
    assert await sh(box, f"cat {path}") == "first"
    await dropped.abort()
    await dropped.abort()
    assert await sh(box, f"ls -A $(dirname {path})") == "file\n"
    again = await box.open_write(path)
    os.write(again.fd, b"second")
    await again.commit()
    assert await sh(box, f"cat {path}; stat -c '%a %U' {path}") == "second640 user\n"
    fd, info = await box.open_read(path)
    with os.fdopen(fd, "rb") as file:
        assert file.read() == b"second"
    assert stat.S_IMODE(info.st_mode) == 0o640
    assert await sh(box, f"stat -c '%s %Y %i' {path}") == f"{info.st_size} {int(info.st_mtime)} {info.st_ino}\n"


async def test_a_large_file_makes_the_round_trip(box: Box) -> None:
    content = os.urandom(1 << 20) * 5 + MARK
    writer = await box.open_write("/root/large")
    with os.fdopen(os.dup(writer.fd), "wb") as file:
        file.write(content)
    await writer.commit()
    assert (await sh(box, "sha256sum < /root/large")).split()[0] == hashlib.sha256(content).hexdigest()
    fd, info = await box.open_read("large")
    assert info.st_size == len(content)
    with os.fdopen(fd, "rb") as file:
        assert file.read() == content
        assert os.pread(file.fileno(), 10, 1 << 20) == content[1 << 20 :][:10]


async def test_an_empty_file_is_a_file(box: Box) -> None:
    await (await box.open_write("/root/empty")).commit()
    fd, info = await box.open_read("/root/empty")
    os.close(fd)
    assert info.st_size == 0
    assert await sh(box, "stat -c %s /root/empty") == "0\n"


@pytest.mark.parametrize(
    ("path", "number"),
    [
        ("missing", errno.ENOENT),
        ("/etc", errno.EISDIR),
        ("/etc/passwd/x", errno.ENOTDIR),
        ("/dev/zero", errno.EINVAL),
        ("/root/fifo", errno.EINVAL),
        ("/root/loop", errno.ELOOP),
        ("/root/" + "x" * 300, errno.ENAMETOOLONG),
        ("nul\0", errno.EINVAL),
    ],
)
async def test_only_regular_files_are_opened(box: Box, path: str, number: int) -> None:
    await sh(box, "cd /root; [ -p fifo ] || mkfifo fifo; ln -sfT loop loop")
    with pytest.raises(OSError) as caught:
        await box.open_read(path)
    assert caught.value.errno == number


async def test_a_folder_is_not_replaced(box: Box) -> None:
    with pytest.raises(IsADirectoryError):
        await box.open_write("/etc")
    with pytest.raises((NotADirectoryError, FileExistsError)):
        await box.open_write("/etc/passwd/x")


@pytest.mark.parametrize(
    "name", ["-rf", "a b", "new\nline\n", "q'\"`$(id)\\", "*", "\udcff\udcfe", "ünï", "\\0101", "%s", "~", "\x1e\udcff", " "]
)
async def test_any_name_is_a_name(box: Box, name: str) -> None:
    writer = await box.open_write(f"names/{name}/{name}", user="user")
    os.write(writer.fd, name.encode("utf-8", "surrogateescape"))
    await writer.commit()
    fd, _ = await box.open_read(f"/home/user/names/{name}/{name}", user="user")
    with os.fdopen(fd, "rb") as file:
        assert file.read() == os.fsencode(name)
    listing = await run(
        box, "python3", "-c", "import os, sys; sys.stdout.buffer.write(b'\\0'.join(os.listdir(b'/home/user/names')))"
    )
    assert os.fsencode(name) in listing.out.split(b"\0")


async def test_a_long_path_is_a_path(box: Box) -> None:
    path = "/root/" + "/".join(str(number) * 200 for number in range(10)) + "/" + "f" * 200
    assert 2000 < len(path) < 4096
    writer = await box.open_write(path)
    os.write(writer.fd, b"deep")
    await writer.commit()
    fd, _ = await box.open_read(path)
    with os.fdopen(fd, "rb") as file:
        assert file.read() == b"deep"
    assert await sh(box, f"ls -A $(dirname {path})") == "f" * 200 + "\n"


async def test_links_lead_nowhere_but_inside(box: Box, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("of this machine")
    await sh(box, f"ln -s {secret} /root/out; ln -s ../../../../../../..{secret} /root/up; ln -s /proc/1/root{secret} /root/proc")
    for name in ("out", "up", "proc"):
        with pytest.raises(OSError):
            await box.open_read(name)
    for name in ("out", "up"):
        await (await box.open_write(name)).commit()
    assert secret.read_text() == "of this machine"


async def test_a_user_reads_and_writes_with_its_own_rights_only(box: Box) -> None:
    await sh(box, "echo secret > /var/private; chmod 600 /var/private")
    for path in ("/root/file", "/var/private"):
        with pytest.raises(PermissionError):
            await box.open_write(path, user="user")
        with pytest.raises(PermissionError):
            await box.open_read(path, user="user")
    await (await box.open_write("file", user="user")).commit()
    assert await sh(box, "stat -c %U /home/user/file") == "user\n"


# Isolation


# below /sys: what Docker mounts there even so, on gVisor covered rather than masked
_FOLDERS_OF_SYS = {"runsc": ("/sys/fs\n", "/sys/fs/cgroup\n")}


async def test_what_is_inside_is_an_allow_list(box: Box, kind: Kind) -> None:
    assert await sh(box, "ls /home; hostname") == "user\nboxy\n"
    assert (await run(box, "touch", "/usr/x")).code != 0
    assert await sh(box, "find /sys ! -type d 2>/dev/null || true") == ""
    assert await sh(box, "find /sys -mindepth 1 2>/dev/null || true") == "".join(_FOLDERS_OF_SYS.get(kind.name, ()))
    assert await sh(box, "grep -v ':\\*:' /etc/shadow || true") == ""
    status = dict(line.split(":\t") for line in (await sh(box, "cat /proc/self/status")).splitlines() if ":\t" in line)
    assert status["CapBnd"] == status["CapEff"] == ("00000000a00405fb" if kind.name == "runsc" else "00000000a00425fb")
    assert status["NoNewPrivs"] == "1"
    assert int(status["CapInh"], 16) & ~0xA00425FB == 0
    assert (await run(box, "mount", "-t", "tmpfs", "none", "/mnt")).code != 0
    assert (await run(box, "grep", "-q", "eth", "/proc/net/dev")).code != 0


async def test_a_user_inside_has_no_capabilities(box: Box) -> None:
    assert await sh(box, "grep CapEff /proc/self/status", user="user") == "CapEff:\t0000000000000000\n"


async def test_memory_limits_hold(start: Start, kind: Kind) -> None:
    box = await start(mem_bytes=64 << 20, vcpus=0.5)
    if box.limits_note:
        assert "mem_bytes" in box.limits_note
        pytest.skip(f"this machine cannot: {box.limits_note}")
    ran = await run(box, "python3", "-c", "x = bytearray(256 << 20)")
    if kind.name == "runsc":  # its kernel is inside the limit too
        assert ran.code >= 128
        assert await asyncio.wait_for(box.ended, 20)
        return
    assert ran.code == 128 + signal.SIGKILL
    assert (await run(box, "true")).code == 0  # the sandbox lives on


# Life


async def test_stop_keeps_files_but_not_tmp(runtime: Runtime, start: Start) -> None:
    box = await start(id="keep", mem_bytes=256 << 20)
    await sh(box, "echo kept > /root/file; echo gone > /tmp/file; echo gone > /run/file; mkdir -m 0 /root/closed")
    sleeper = await box.spawn(SpawnSpec(["sleep", "1000"]))
    await box.stop(grace=0.2)
    await box.stop()
    assert await box.ended == "stopped"
    assert await asyncio.wait_for(sleeper.exited, 20) >= 128
    close(sleeper)
    await sleeper.signal(signal.SIGKILL)
    attempts = (box.spawn(SpawnSpec(["true"])), box.connect(80), box.open_read("/etc/passwd"), box.open_write("/root/file"))
    for attempt in attempts:
        with pytest.raises(RuntimeFailure):
            await attempt
    assert "keep" in await runtime.disks()
    again = await start(id="keep", vcpus=1)
    assert await sh(again, "cat /root/file; ls /tmp /run/file 2>/dev/null; stat -c %a /root/closed") == "kept\n/tmp:\n0\n"


async def test_a_graceful_stop_lets_processes_say_goodbye(start: Start) -> None:
    box = await start(id="grace")
    script = "trap 'echo bye > /root/bye; exit 7' TERM; echo up; while :; do sleep 0.01; done"
    process = await box.spawn(SpawnSpec(["/bin/sh", "-c", script], user="root"))
    assert await read_until(process.stdout, b"\n") == b"up\n"
    await box.stop(grace=10)
    assert await process.exited == 7
    close(process)
    again = await start(id="grace")
    assert await sh(again, "cat /root/bye") == "bye\n"


async def test_a_stop_does_not_wait_for_the_stubborn(start: Start) -> None:
    box = await start()
    process = await box.spawn(SpawnSpec(["/bin/sh", "-c", "trap '' TERM; echo up; while :; do sleep 1; done"]))
    assert await read_until(process.stdout, b"\n") == b"up\n"
    async with asyncio.timeout(20):
        await box.stop(grace=0.2)
    assert await process.exited == 128 + signal.SIGKILL
    close(process)


async def test_a_sandbox_that_kills_itself_is_seen(start: Start) -> None:
    box = await start()
    process = await box.spawn(SpawnSpec(["sleep", "1000"]))
    killer = await box.spawn(SpawnSpec(["/bin/sh", "-c", "read x; kill -KILL -1; sleep 1000"]))
    os.write(killer.stdin, b"\n")
    async with asyncio.timeout(20):
        assert await box.ended
        assert await process.exited == 128 + signal.SIGKILL
        assert await killer.exited == 128 + signal.SIGKILL
        await box.stop()
    close(process)
    close(killer)


async def test_remove_deletes_what_others_own(runtime: Runtime, start: Start) -> None:
    box = await start(id="gone")
    await sh(box, "mkdir -p /home/user/a/b; chown -R user /home/user; chmod 0 /home/user/a")
    await box.stop(grace=0.1)
    await runtime.remove("gone")
    assert "gone" not in await runtime.disks()
    await runtime.remove("gone")
    await runtime.remove("never-was")
    fresh = await start(id="gone")
    assert await sh(fresh, "ls -A /home/user") == ""


async def test_the_machine_is_described(runtime: Runtime) -> None:
    findings = await runtime.check()
    assert findings
    assert all(finding.what and finding.detail for finding in findings)
    assert all(finding.remedy for finding in findings if not finding.ok)


async def test_nothing_is_left_after_many_lives(runtime: Runtime, start: Start, state: Path) -> None:
    def census() -> tuple[int, int, int, int]:
        mounts = Path("/proc/self/mounts").read_text().splitlines()
        processes = subprocess.run(["ps", "--ppid", str(os.getpid()), "-o", "pid="], capture_output=True, text=True, check=False)
        return (
            len(list(Path("/proc/self/fd").iterdir())),
            sum(text in line for line in mounts for text in (str(state), "gatewayd-docker-")),
            len(processes.stdout.split()),
            sum(thread.name == "netns" for thread in threading.enumerate()),
        )

    async def live(box_id: str) -> None:
        box = await start(id=box_id)
        assert (await run(box, "true")).code == 0
        terminal = await box.spawn(SpawnSpec(["true"], pty=True))
        await read_all(terminal.stdout)
        with pytest.raises(PortRefused):
            await box.connect(1)
        await (await box.open_write("x")).abort()
        fd, _ = await box.open_read("/etc/passwd")
        os.close(fd)
        await box.stop(grace=0.1)
        await runtime.remove(box_id)

    await live("warm")
    before = census()
    for number in range(3):
        await live(f"n{number}")
    assert census() == before


KILLED_SERVICE = """
    import asyncio, sys
    from pathlib import Path
    import gatewayd.local.runtime.native, gatewayd.local.runtime.docker, gatewayd.local.runtime.gvisor
    from gatewayd.local.runtime.base import BoxSpec, SpawnSpec

    STATE = Path(sys.argv[1])

    async def main():
        runtime = %s
        await runtime.recover()
        box = await runtime.start(BoxSpec("killed", "boxy", 1, 256 << 20))
        writer = await box.open_write("/root/file")
        process = await box.spawn(SpawnSpec(["/bin/sh", "-c", "echo kept > /root/kept; sync; echo up; exec sleep %s"]))
        await asyncio.get_running_loop().run_in_executor(None, wait, process.stdout)
        print("up", flush=True)
        await asyncio.sleep(1000)

    def wait(fd):
        import os
        os.set_blocking(fd, True)
        os.read(fd, 10)

    asyncio.run(main())
"""


async def _visible(kind: Kind, word: str) -> str:
    """An argument by which this machine sees a process inside that has the argument `word`."""
    if kind.name != "runsc" or kind.socket is None:
        return word
    # processes on gVisor are its own: those that are this machine's name the container
    query = {"filters": json.dumps({"label": [f"{LABEL_BOX}=killed"]})}
    (container,) = await DockerApi(kind.socket).request("list sandboxes", "GET", "/containers/json", query=query)
    return str(container["Id"])


def _running(word: str) -> list[int]:
    """Processes of this machine with that argument."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                if word.encode() in (folder / "cmdline").read_bytes().split(b"\0"):
                    found.append(int(folder.name))
            except OSError:
                continue
    return found


async def test_a_killed_service_leaves_its_disks_and_nothing_else(kind: Kind, tmp_path: Path) -> None:
    word = f"98765.{os.getpid()}"
    script = textwrap.dedent(KILLED_SERVICE) % (kind.code, word)
    service = await asyncio.create_subprocess_exec(sys.executable, "-c", script, str(tmp_path), stdout=subprocess.PIPE)
    assert service.stdout is not None
    assert await asyncio.wait_for(service.stdout.readline(), 30) == b"up\n"
    word = await _visible(kind, word)
    async with asyncio.timeout(15):
        while not _running(word):  # noqa: ASYNC110 - between its echo and its exec
            await asyncio.sleep(0.02)
    service.kill()
    await service.wait()
    runtime = kind.make(tmp_path)
    await runtime.recover()
    async with asyncio.timeout(15):
        while _running(word):  # noqa: ASYNC110 - processes of nobody's: the kernel sends no event
            await asyncio.sleep(0.02)
    assert await runtime.disks() == {"killed"}
    box = await runtime.start(BoxSpec("killed", "boxy"))
    assert await sh(box, "cat /root/kept") == "kept\n"
    await box.stop(grace=0.1)
    await clear(runtime)


async def test_stdin_that_nobody_reads_breaks_when_the_process_has_ended(box: Box) -> None:
    process = await box.spawn(SpawnSpec(["true"]))
    await process.exited
    await asyncio.wait_for(write_all(process.stdin, bytes(1 << 20)), 20)
    close(process)

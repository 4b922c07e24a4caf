"""The native runtime: processes, ports, files and lifetimes of real sandboxes."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import resource
import signal
import socket
import stat
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from gatewayd.local.runtime.base import PortRefused, RuntimeFailure, SpawnSpec
from gatewayd.local.runtime.native import NativeRuntime
from gatewayd.local.runtime.nativebox import NativeBox

from .conftest import Start, needs_bubblewrap, read_all, run, sh

pytestmark = needs_bubblewrap


async def test_a_process_has_three_streams_and_an_exit_code(box: NativeBox) -> None:
    ran = await run(box, "/bin/sh", "-c", "cat; echo problem >&2; exit 3", stdin=b"in\n")
    assert (ran.code, ran.out, ran.err) == (3, "in\n", "problem\n")


async def test_a_process_ended_by_a_signal_counts_from_128(box: NativeBox) -> None:
    assert (await run(box, "/bin/sh", "-c", "kill -TERM $$")).code == 128 + signal.SIGTERM


async def test_environment_folder_and_user(box: NativeBox) -> None:
    script = 'echo "$(id -un) $HOME $(pwd) $X"'
    assert await sh(box, script, env={"X": "1"}) == "root /root /root 1\n"
    assert await sh(box, script, user="user", cwd="/usr") == "user /home/user /usr \n"
    assert await sh(box, "id -g", user="user:sshd") == "100\n"


@pytest.mark.parametrize(
    ("argv", "options", "number"),
    [
        (["no-such-program"], {}, errno.ENOENT),
        (["/etc"], {}, errno.EACCES),
        (["true"], {"cwd": "/no/such/folder"}, errno.ENOENT),
        (["true"], {"user": "nobody-at-all"}, errno.EINVAL),
        (["tr\0ue"], {}, errno.EINVAL),
    ],
)
async def test_what_cannot_be_started_says_why(box: NativeBox, argv: list[str], options: dict[str, Any], number: int) -> None:
    with pytest.raises(OSError) as caught:
        await run(box, *argv, **options)
    assert caught.value.errno == number


async def test_a_service_out_of_descriptors_for_a_moment_keeps_its_sandbox(box: NativeBox) -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(int(fd) for fd in os.listdir("/proc/self/fd"))  # noqa: PTH208
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 1, limits[1]))
    fillers: list[int] = []
    try:
        with contextlib.suppress(OSError):
            while True:
                fillers.append(os.dup(0))
        with pytest.raises(OSError) as caught:
            await box.spawn(SpawnSpec(["/bin/sh", "-c", "exit 0"]))
    finally:
        for fd in fillers:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert caught.value.errno == errno.EMFILE
    assert await sh(box, "echo alive") == "alive\n"
    assert not box.ended.done()


async def test_too_large_a_request_is_refused_and_harms_nothing(box: NativeBox) -> None:
    with pytest.raises(RuntimeFailure, match="too large"):
        await run(box, "true", env={"X": "y" * 300_000})
    assert (await run(box, "true")).code == 0


async def test_a_terminal_has_a_size_and_an_owner(box: NativeBox) -> None:
    process = await box.spawn(
        SpawnSpec(["/bin/sh", "-c", "tty; stty size; read x; stty size"], pty=True, cols=90, rows=30, user="user")
    )
    os.set_blocking(process.stdout, True)
    seen = b""
    while b"30 90\r\n" not in seen:
        seen += await asyncio.to_thread(os.read, process.stdout, 1024)
    assert seen.startswith(b"/dev/pts/")
    await process.resize(100, 40)
    os.write(process.stdin, b"\n")
    rest = await read_all(process.stdout)
    assert b"40 100" in rest
    assert await process.exited == 0


async def test_a_signal_reaches_the_whole_group(box: NativeBox) -> None:
    process = await box.spawn(SpawnSpec(["/bin/sh", "-c", "sleep 1000 & echo up; wait"]))
    assert process.stderr is not None
    os.set_blocking(process.stdout, True)
    assert await asyncio.to_thread(os.read, process.stdout, 10) == b"up\n"
    await process.signal(signal.SIGKILL)
    assert await process.exited == 128 + signal.SIGKILL
    assert await read_all(process.stdout) == b""  # end of file: the child that held the pipe is gone too
    await process.signal(signal.SIGKILL)  # no error once it is gone
    os.close(process.stdin)
    os.close(process.stderr)


SERVER = """
import socket
server = socket.create_server((%r, 0), family=socket.%s)
print(server.getsockname()[1], flush=True)
server.accept()[0].send(b"hello")
"""


@pytest.mark.parametrize(("address", "family"), [("127.0.0.1", "AF_INET"), ("::1", "AF_INET6")])
async def test_ports_are_reached_on_both_loopbacks(box: NativeBox, address: str, family: str) -> None:
    process = await box.spawn(SpawnSpec(["python3", "-c", SERVER % (address, family)]))
    os.set_blocking(process.stdout, True)
    port = int(await asyncio.to_thread(os.read, process.stdout, 16))
    sock = await box.connect(port)
    with sock:
        assert await asyncio.get_running_loop().sock_recv(sock, 16) == b"hello"
    assert await process.exited == 0
    for fd in {process.stdin, process.stdout, process.stderr} - {None}:
        os.close(fd)  # type: ignore[arg-type]  # None is taken out above


async def test_a_silent_port_refuses(box: NativeBox) -> None:
    with pytest.raises(PortRefused):
        await box.connect(5432)


async def test_this_machines_loopback_is_out_of_reach(box: NativeBox) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(PortRefused):
            await box.connect(port)
        ran = await run(box, "python3", "-c", f"import socket; socket.create_connection(('127.0.0.1', {port}))")
        assert "ConnectionRefusedError" in ran.err


async def test_files_are_replaced_at_once_or_not_at_all(box: NativeBox) -> None:
    writer = await box.open_write("made/on/the/way/file")
    os.write(writer.fd, b"first")
    await writer.commit()
    path = "/root/made/on/the/way/file"
    await sh(box, f"chmod 640 {path}; chown user {path}")
    dropped = await box.open_write(path)
    os.write(dropped.fd, b"never seen")
    await dropped.abort()
    assert await sh(box, f"cat {path}; ls -A $(dirname {path})") == "firstfile\n"
    again = await box.open_write(path)
    os.write(again.fd, b"second")
    await again.commit()
    assert await sh(box, f"cat {path}; stat -c '%a %U' {path}") == "second640 user\n"
    fd, info = await box.open_read(path)
    with os.fdopen(fd, "rb") as file:
        assert file.read() == b"second"
    assert stat.S_IMODE(info.st_mode) == 0o640


@pytest.mark.parametrize(
    ("path", "number"),
    [("missing", errno.ENOENT), ("/etc", errno.EISDIR), ("/dev/zero", errno.EINVAL), ("/root/fifo", errno.EINVAL)],
)
async def test_only_regular_files_are_opened(box: NativeBox, path: str, number: int) -> None:
    await sh(box, "mkfifo /root/fifo")
    with pytest.raises(OSError) as caught:
        await box.open_read(path)
    assert caught.value.errno == number


async def test_links_lead_nowhere_but_inside(box: NativeBox, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("of this machine")
    await sh(box, f"ln -s {secret} /root/out; ln -s ../../../../../../..{secret} /root/up; ln -s /proc/1/root{secret} /root/proc")
    for name, number in (("out", errno.ENOENT), ("up", errno.ENOENT), ("proc", errno.ELOOP)):
        with pytest.raises(OSError) as caught:
            await box.open_read(name)
        assert caught.value.errno == number
    for name in ("out", "up", "proc"):
        await (await box.open_write(name)).commit()
    assert secret.read_text() == "of this machine"


async def test_a_user_writes_with_its_own_rights_only(box: NativeBox) -> None:
    with pytest.raises(PermissionError):
        await box.open_write("/root/file", user="user")
    writer = await box.open_write("file", user="user")
    await writer.commit()
    assert await sh(box, "stat -c %U /home/user/file") == "user\n"
    assert (await run(box, "true")).code == 0  # the agent is root again


async def test_what_is_inside_is_an_allow_list(box: NativeBox) -> None:
    assert await sh(box, "ls /home") == "user\n"
    assert "\n/sys" not in await sh(box, "ls -d /*")
    assert (await run(box, "touch", "/usr/x")).code != 0
    assert await sh(box, "cat /proc/1/environ | wc -c") == "0\n"
    assert Path("/etc/shadow").exists()
    assert await sh(box, "grep -v ':\\*:' /etc/shadow || true") == ""
    status = dict(line.split(":\t") for line in (await sh(box, "cat /proc/self/status")).splitlines() if line.startswith("Cap"))
    assert int(status["CapBnd"], 16) & (1 << 21) == 0  # CAP_SYS_ADMIN
    assert int(status["CapEff"], 16) & ~int(status["CapBnd"], 16) == 0


async def test_the_agent_keeps_its_memory_to_itself(box: NativeBox) -> None:
    pid = (await sh(box, "pgrep -x gatewayd-agent")).strip()
    for name in ("mem", "environ", "maps"):
        assert "denied" in (await run(box, "cat", f"/proc/{pid}/{name}")).err
    assert "denied" in (await run(box, "ls", f"/proc/{pid}/fd")).err
    ran = await run(box, "python3", "-c", f"import ctypes; l=ctypes.CDLL(None); raise SystemExit(l.ptrace(16, {pid}, 0, 0) == 0)")
    assert ran.code == 0


async def test_stop_keeps_files_but_not_tmp(start: Start) -> None:
    box = await start(id="keep")
    await sh(box, "echo kept > /root/file; echo gone > /tmp/file; echo gone > /run/file; mkdir -m 0 /root/closed")
    await box.stop()
    assert (await box.ended) == "stopped"
    with pytest.raises(RuntimeFailure):
        await box.spawn(SpawnSpec(["true"]))
    again = await start(id="keep")
    assert await sh(again, "cat /root/file; ls -A /tmp /run") == "kept\n/run:\n\n/tmp:\n"


async def test_a_graceful_stop_lets_processes_say_goodbye(start: Start) -> None:
    box = await start(id="grace")
    script = "trap 'echo bye > /root/bye; exit 0' TERM; echo up; while :; do sleep 0.01; done"
    process = await box.spawn(SpawnSpec(["/bin/sh", "-c", script]))
    os.set_blocking(process.stdout, True)
    assert await asyncio.to_thread(os.read, process.stdout, 10) == b"up\n"
    await box.stop(grace=5)
    assert await process.exited == 0
    for fd in (process.stdin, process.stdout, process.stderr or -1):
        os.close(fd)
    again = await start(id="grace")
    assert await sh(again, "cat /root/bye") == "bye\n"


async def test_a_sandbox_that_kills_itself_is_seen(box: NativeBox) -> None:
    process = await box.spawn(SpawnSpec(["/bin/sh", "-c", "kill -9 2; sleep 1000"]))  # pid 2 keeps the sandbox alive
    async with asyncio.timeout(10):
        await box.ended
        assert await process.exited == 128 + signal.SIGKILL
    for fd in (process.stdin, process.stdout, process.stderr or -1):
        os.close(fd)


async def test_remove_deletes_what_others_own(runtime: NativeRuntime, start: Start, tmp_path: Path) -> None:
    box = await start(id="gone")
    await sh(box, "mkdir -p /home/user/a/b; chown -R user /home/user; chmod 0 /home/user/a; chattr +i /root 2>/dev/null || true")
    await box.stop()
    await runtime.remove("gone")
    assert await runtime.disks() == set()
    assert list((tmp_path / "state" / "trash").iterdir()) == []


async def test_memory_and_process_limits_hold(start: Start) -> None:
    box = await start(mem_bytes=64 << 20, vcpus=0.5)
    if box.limits_note:
        assert "mem_bytes" in box.limits_note
        pytest.skip(f"this machine cannot: {box.limits_note}")
    ran = await run(box, "python3", "-c", "x = bytearray(256 << 20)")
    assert ran.code == 128 + signal.SIGKILL
    assert (await run(box, "true")).code == 0  # the agent lives on


async def test_nothing_is_left_after_many_lives(start: Start) -> None:
    def census() -> tuple[int, int, int]:
        processes = subprocess.run(["ps", "--ppid", str(os.getpid()), "-o", "pid="], capture_output=True, text=True, check=False)
        return (
            len(list(Path("/proc/self/fd").iterdir())),
            len(Path("/proc/self/mounts").read_text().splitlines()),
            len(processes.stdout.split()),
        )

    await (await start(id="warm")).stop()
    before = census()
    for number in range(10):
        box = await start(id=f"n{number}")
        await sh(box, "echo x > /root/x")
        await box.stop(grace=0.1)
    async with asyncio.timeout(10):  # what is just being closed still counts: what stays is a leak
        while any(now > then for now, then in zip(census(), before, strict=True)):  # noqa: ASYNC110 - no event tells
            await asyncio.sleep(0.05)


KILLED_SERVICE = """
    import asyncio, sys
    from pathlib import Path
    from gatewayd.local.runtime.base import BoxSpec, SpawnSpec
    from gatewayd.local.runtime.native import NativeRuntime

    async def main():
        runtime = NativeRuntime(Path(sys.argv[1]))
        box = await runtime.start(BoxSpec("killed", "boxy", 1, 256 << 20))
        await box.spawn(SpawnSpec(["sleep", "1000"]))
        print(box._monitor.pid, flush=True)
        await asyncio.sleep(1000)

    asyncio.run(main())
"""


async def test_a_killed_service_leaves_nothing(tmp_path: Path, runtime: NativeRuntime) -> None:
    service = subprocess.Popen(  # noqa: ASYNC220 - it is to be killed, not awaited
        [sys.executable, "-c", textwrap.dedent(KILLED_SERVICE), str(tmp_path / "state")], stdout=subprocess.PIPE, text=True
    )
    with service:
        assert service.stdout is not None
        monitor = int(await asyncio.to_thread(service.stdout.readline))
        tree = _descendants(monitor)
        assert len(tree) >= 4  # bubblewrap, pid 1, anchor, agent, and the sleeper
        watched = [os.pidfd_open(pid) for pid in [monitor, *tree]]
        service.kill()
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(10):
        for fd in watched:
            gone = loop.create_future()
            loop.add_reader(fd, lambda gone=gone: gone.done() or gone.set_result(None))  # type: ignore[misc]  # mypy cannot infer it
            await gone
            loop.remove_reader(fd)
            os.close(fd)
    assert runtime._cgroups.leftovers() == set()
    await runtime.remove("killed")


def _descendants(pid: int) -> list[int]:
    children = [int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()]
    return children + [grandchild for child in children for grandchild in _descendants(child)]

"""Much of everything through the gateway's ssh server: bytes, files, sessions, connections; slow ends; a person's terminal."""

from __future__ import annotations

import concurrent.futures
import contextlib
import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from .conftest import Gateway, make, wait_until
from .sshworld import SshWorld, digest
from .tmux import Window

pytestmark = pytest.mark.e2e

MIB = 1 << 20
SESSIONS = 50
STALLED = 500 * MIB  # bytes of a stream whose reader stands still
RESUMED = 50 * MIB  # bytes that pass once it goes on
GROWTH_MAX = 48 * MIB  # bytes of memory that one stalled stream may cost; buffers and windows are a few MiB
SIZES = [
    pytest.param(100 * MIB, id="100MB"),
    pytest.param(1 << 30, id="1GB", marks=[pytest.mark.slow, pytest.mark.timeout(900)]),
]
COUNTS = [
    pytest.param(5_000, id="5000"),
    pytest.param(100_000, id="100000", marks=[pytest.mark.slow, pytest.mark.timeout(1800)]),
]


@pytest.fixture(scope="module")
def ssh(gateway: Gateway) -> SshWorld:
    del gateway.env["PYTHONASYNCIODEBUG"]  # a third of the speed
    make(gateway, "box")
    return SshWorld(gateway)


def fill(path: Path, size: int) -> str:
    """Random bytes; their digest."""
    sum_ = hashlib.sha256()
    with path.open("wb") as file:
        for _ in range(size // MIB):
            block = os.urandom(MIB)
            sum_.update(block)
            file.write(block)
    return sum_.hexdigest()


@pytest.mark.parametrize("size", SIZES)
def test_a_big_file_both_ways(ssh: SshWorld, tmp_path: Path, size: int) -> None:
    source, back, piped = tmp_path / "source", tmp_path / "back", tmp_path / "piped"
    wanted = fill(source, size)
    ssh.run("-q", "-b", "-", "box", program="sftp", input=f"put {source} /var/tmp/big\n".encode(), timeout=300)
    assert ssh.run("box", "sha256sum < /var/tmp/big", timeout=60).stdout.decode().split()[0] == wanted
    ssh.run("-q", "-b", "-", "box", program="sftp", input=f"get /var/tmp/big {back}\n".encode(), timeout=300)
    assert digest(back) == wanted
    back.unlink()
    ssh.sh(f"cat {source} | $SSH box 'tee /var/tmp/piped | cmp - /var/tmp/big'", timeout=300)
    ssh.sh(f"$SSH box 'cat /var/tmp/piped' | cat > {piped}", timeout=300)
    assert digest(piped) == wanted
    ssh.run("box", "rm /var/tmp/big /var/tmp/piped")


def grow(tree: Path, count: int) -> None:
    """Small files, a hundred in a folder."""
    for number in range(count):
        if number % 100 == 0:
            folder = tree / f"d{number // 1000}" / f"e{number // 100}"
            folder.mkdir(parents=True)
        (folder / f"f{number}").write_bytes(b"%d\n" % number * (number % 40))


@pytest.mark.parametrize("count", COUNTS)
def test_many_small_files(ssh: SshWorld, tmp_path: Path, count: int) -> None:
    """By rsync, and as a tar that goes through the sandbox and comes back on the same connection."""
    tree = tmp_path / "tree"
    grow(tree, count)
    rsync = f"rsync -a -e 'ssh -F {ssh.config}'"
    ssh.sh(f"{rsync} {tree}/ box:/var/tmp/tree/", timeout=600)
    assert ssh.sh(f"{rsync} -i --delete {tree}/ box:/var/tmp/tree/", timeout=600).stdout == b""
    ssh.sh(f"{rsync} box:/var/tmp/tree/ {tmp_path}/back/", timeout=600)
    ssh.sh(f"diff -r {tree} {tmp_path}/back && rm -r {tmp_path}/back", timeout=300)
    there = "$SSH box 'rm -r /var/tmp/tree; mkdir /var/tmp/tarred; cd /var/tmp/tarred && tar xf - && tar cf - tree'"
    ssh.sh(f"tar -C {tmp_path} -cf - tree | {there} | tar -C {tmp_path} --one-top-level=back -xf -", timeout=600)
    ssh.sh(f"diff -r {tree} {tmp_path}/back/tree", timeout=300)
    ssh.run("box", "rm -r /var/tmp/tarred", timeout=300)


def one_of_many(ssh: SshWorld, number: int, *options: str) -> None:
    """A session with input, output, errors and an exit code of its own."""
    data = os.urandom(1000) * 200
    script = f"tee /tmp/many-{number}; sha256sum < /tmp/many-{number} >&2; rm /tmp/many-{number}; exit {number}"
    done = ssh.run(*options, "box", script, input=data, code=number, timeout=100)
    assert done.stdout == data
    assert done.stderr.decode().split()[0] == hashlib.sha256(data).hexdigest()


def test_fifty_sessions_on_one_connection(ssh: SshWorld) -> None:
    control = ssh.root / "many"
    master = ssh.popen("-o", "ControlMaster=yes", "-o", f"ControlPath={control}", "-N", "box")
    try:
        wait_until(control.exists, "the master is up")
        with concurrent.futures.ThreadPoolExecutor(SESSIONS) as pool:
            for _ in pool.map(lambda number: one_of_many(ssh, number, "-o", f"ControlPath={control}"), range(SESSIONS)):
                pass
    finally:
        master.terminate()
        master.wait(20)


def test_fifty_connections(ssh: SshWorld) -> None:
    with concurrent.futures.ThreadPoolExecutor(SESSIONS) as pool:
        for _ in pool.map(lambda number: one_of_many(ssh, number), range(SESSIONS)):
            pass


# --- slow ends --------------------------------------------------------------------------------------------------------

GUEST_MEMORY = """
for p in /proc/[0-9]*; do
    if tr '\\0' ' ' < $p/cmdline 2>/dev/null | grep -q ' /[^ ]*/guest-[0-9a-f]*\\.py '; then
        sed -n 's/^VmRSS:[^0-9]*\\([0-9]*\\) kB/\\1/p' $p/status
    fi
done
"""


def memory(ssh: SshWorld) -> tuple[int, int]:
    """Resident memory of the daemon and of all guests in the sandbox, bytes."""
    daemon = psutil.Process(ssh.gateway.daemon_pid).memory_info().rss
    guests = [int(line) * 1024 for line in ssh.run("box", GUEST_MEMORY).stdout.split()]
    assert guests
    return daemon, sum(guests)


def stands_still(ssh: SshWorld) -> bool:
    """Whether hardly anything moves on the link for a second; asking moves some bytes itself."""

    def moved() -> int:
        link = ssh.gateway.json("status", "box")["link"]
        return int(link["bytes_in"]) + int(link["bytes_out"])

    before = moved()
    ssh.run("box", "sleep 1")
    return moved() - before < 65536


def assert_bounded(before: tuple[int, int], after: tuple[int, int]) -> None:
    daemon, guest = after[0] - before[0], after[1] - before[1]
    assert daemon < GROWTH_MAX, f"the daemon grew by {daemon >> 20} MiB"
    assert guest < GROWTH_MAX, f"the guest grew by {guest >> 20} MiB"


def test_a_reader_that_stands_still(ssh: SshWorld) -> None:
    ssh.run("box", "head -c 20000000 /dev/zero")  # whatever is made once is there
    before = memory(ssh)
    process = ssh.popen("box", f"head -c {STALLED} /dev/zero", stdout=subprocess.PIPE)
    assert process.stdout is not None
    try:
        count = len(process.stdout.read(MIB))
        wait_until(lambda: stands_still(ssh), "the stream stands still", 60)
        assert_bounded(before, memory(ssh))
        while count < RESUMED and (chunk := process.stdout.read(MIB)):
            count += len(chunk)
        assert count >= RESUMED
    finally:
        process.kill()
        process.communicate()


def test_a_command_that_does_not_read(ssh: SshWorld, tmp_path: Path) -> None:
    before = memory(ssh)
    with (tmp_path / "zeros").open("w+b") as zeros:
        zeros.truncate(STALLED)
        script = f"mkfifo /tmp/go; cat /tmp/go; head -c {RESUMED} | wc -c"
        process = ssh.popen("box", script, stdin=zeros, stdout=subprocess.PIPE)
    try:
        wait_until(lambda: ssh.run("box", "test -p /tmp/go; echo $?").stdout == b"0\n", "the command runs")
        wait_until(lambda: stands_still(ssh), "the stream stands still", 60)
        assert_bounded(before, memory(ssh))
        ssh.run("box", "echo go > /tmp/go; rm /tmp/go")
        out, _ = process.communicate(timeout=100)
        assert out == b"go\n%d\n" % RESUMED
    finally:
        process.kill()
        process.communicate()


# --- a person's terminal ----------------------------------------------------------------------------------------------


@pytest.fixture
def window(ssh: SshWorld, request: pytest.FixtureRequest) -> Iterator[Window]:
    """tmux with a login in the sandbox whose prompt is known."""
    if shutil.which("tmux") is None:
        pytest.skip("not installed: tmux")
    ssh.run("box", "printf 'PS1=\"BOX> \"\\nPROMPT_COMMAND=\\nunset HISTFILE\\n' > ~/.bash_profile")
    window = Window(ssh.gateway, ssh.gateway.root / f"tmux-{request.node.name[:20]}")
    window.type(f"ssh -F {ssh.config} box")
    window.prompt("BOX>")
    yield window
    with contextlib.suppress(subprocess.CalledProcessError):
        window("kill-server")


def test_type_resize_interrupt_leave(window: Window) -> None:
    window.type("echo ü€😀; stty size")
    window.until("30 100")
    assert "ü€😀" in window.shown()
    window("resize-window", "-x", "71", "-y", "19")
    window.type("clear; stty size")
    window.until("19 71")
    window.type("sh -c 'echo running; exec sleep 1000'")
    window.until("running")
    window.key("C-c")
    window.prompt("BOX>")
    window.type("echo code=$?")
    window.until("code=130")
    window.type("clear; sh -c 'echo sleeping; exec sleep 1000'")
    window.until("sleeping")
    window.key("C-z")
    window.prompt("BOX>")
    window.type("clear; exec sh -c 'exit 5'")  # a plain exit would insist that there are stopped jobs
    window.prompt("LOCAL>")
    window.type("echo code=$?")
    window.until("code=5")
    window.type("stty -a | grep -o ' icanon'")
    window.until(" icanon")  # the terminal is as it was


def test_interrupting_a_flood(window: Window) -> None:
    """Ctrl-C comes through while the terminal is drowned in output."""
    window.type("clear; yes flood")
    window.until("flood")
    window.key("C-c")
    window.prompt("BOX>")
    window.type("echo code=$?")
    window.until("code=130")


def test_full_screen_programs(window: Window, ssh: SshWorld) -> None:
    ssh.run("box", "seq -f 'line %g' 1 500 > /root/lines")
    window.type("less /root/lines")
    window.until("line 1")
    window.key("G")
    window.until("line 500")
    window("resize-window", "-x", "60", "-y", "12")
    painted = [f"line {number}" for number in range(472, 483)]  # from the line that was the first one before
    wait_until(lambda: window.shown().splitlines()[:11] == painted, "it is painted anew, in the new size")
    window.key("q")
    window.prompt("BOX>")
    window.type("vi -u NONE /root/note")
    wait_until(lambda: window.shown().count("~\n") > 5, "the editor is there")
    window.type("iwritten in an editor", enter=False)
    window.key("Escape")
    window.type(":wq")
    window.prompt("BOX>")
    assert ssh.run("box", "cat /root/note").stdout == b"written in an editor\n"

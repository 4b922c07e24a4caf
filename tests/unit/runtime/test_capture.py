"""Captured layers: what a sandbox has written, all of it, at one moment, and nothing else."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from gatewayd.local.runtime import idmap, layerstore
from gatewayd.local.runtime.base import BoxSpec, RuntimeFailure, SpawnSpec
from gatewayd.local.runtime.checks import find_bubblewrap, why_no_disk_limits
from gatewayd.local.runtime.native import NativeRuntime
from gatewayd.local.runtime.nativebox import NativeBox

IDS = idmap.current()
pytestmark = [
    pytest.mark.skipif(find_bubblewrap() is None, reason="bubblewrap is not installed"),
    pytest.mark.skipif(IDS.method == "single", reason="this user has no range of ids in /etc/subuid"),
]
SIZES = [None, pytest.param(256 << 20, marks=pytest.mark.skipif(bool(why_no_disk_limits()), reason="disks are not limited here"))]


@pytest.fixture
async def runtime() -> AsyncIterator[NativeRuntime]:
    """On a folder of a disk: overlayfs takes no tmpfs with user.* names everywhere."""
    state = Path("/var/tmp" if os.getuid() == 0 else Path.home()) / f"capture-{os.getpid()}-{os.urandom(4).hex()}"
    state.mkdir(mode=0o700)
    made = NativeRuntime(state)
    yield made
    for box_id in await made.disks():
        await made.remove(box_id)
    await made.layers.keep_only([])
    await made.aclose()
    await asyncio.to_thread(shutil.rmtree, state)


async def sh(box: NativeBox, script: str) -> str:
    """Output of a shell script; it must succeed."""
    process = await box.spawn(SpawnSpec(["/bin/bash", "-ec", script]))
    os.close(process.stdin)
    for fd in (process.stdout, process.stderr or 0):
        os.set_blocking(fd, True)
    out, err = await asyncio.gather(*(asyncio.to_thread(_all, fd) for fd in (process.stdout, process.stderr or 0)))
    assert await process.exited == 0, err
    return out


def _all(fd: int) -> str:
    with open(fd, "rb") as file:
        return file.read().decode()


FILL = """
mkdir -p /srv/a/b /home/user/deep; rm -rf /etc/ssl; mkdir /etc/ssl; echo mine > /etc/ssl/own; rm /etc/passwd
echo text > /srv/a/file; ln /srv/a/file /srv/a/b/twin; ln -s ../nowhere /srv/link; mkfifo /srv/pipe
truncate -s 50M /srv/sparse; printf end | dd of=/srv/sparse bs=1 seek=30000000 conv=notrunc status=none
head -c 70000000 /dev/urandom > /srv/large; sha256sum /srv/large > /root/sum
setfattr -n user.note -v kept /srv/a/file 2>/dev/null || python3 -c 'import os; os.setxattr("/srv/a/file", "user.note", b"kept")'
chmod 4751 /srv/a/file; chown -R 1000:1000 /home/user/deep; touch -d 2001-02-03T04:05:06Z /srv/a/b; echo no > /tmp/no
"""
LOOK = """
cat /etc/ssl/own /srv/a/b/twin; ls /etc/ssl; ls /tmp; ! ls /etc/passwd 2>/dev/null; readlink /srv/link; test -p /srv/pipe
stat -c '%a %h %u' /srv/a/file /home/user/deep; stat -c %Y /srv/a/b; test $(stat -c %b /srv/sparse) -lt 1000
stat -c %s /srv/sparse; sha256sum -c /root/sum
python3 -c 'import os; print(os.getxattr("/srv/a/file", "user.note").decode())'
"""
SEEN = [
    *("mine", "text", "own", "../nowhere", "4751 2 0", f"755 2 {1000 if IDS.method != 'single' else 0}"),
    *("981173106", "52428800", "/srv/large: OK", "kept"),
]


@pytest.mark.parametrize("size", SIZES)
async def test_everything_is_captured_running_and_stopped(runtime: NativeRuntime, size: int | None) -> None:
    box = await runtime.start(BoxSpec("one", "one", fs_capacity_bytes=size))
    await sh(box, FILL)
    before = (await sh(box, LOOK)).replace("no\n", "", 1).splitlines()
    running = await runtime.layers.capture("one", box)
    await sh(box, "echo later > /srv/later")
    await box.stop(0.0)
    stopped = await runtime.layers.capture("one", None)
    for number, (captured, later) in enumerate(((running, False), (stopped, True))):
        assert captured.size >= 70_000_000
        assert captured.size < 75_000_000
        assert captured.layers[0] == captured.made
        copy = await runtime.start(BoxSpec(f"copy-{number}", "copy", layers=captured.layers))
        seen = (await sh(copy, LOOK)).splitlines()
        assert seen == before == SEEN
        assert (await sh(copy, "ls /srv/later || true")) == ("/srv/later\n" if later else "")
        await copy.stop(0.0)


async def test_a_running_sandbox_is_captured_at_one_moment(runtime: NativeRuntime) -> None:
    """Two files that are always changed in the same order, one through memory: never seen the other way round."""
    box = await runtime.start(BoxSpec("one", "one"))
    program = """
import mmap, os, struct
os.makedirs("/srv/w", exist_ok=True)
with open("/srv/w/mapped", "wb") as file: file.write(bytes(4096))
memory = mmap.mmap(os.open("/srv/w/mapped", os.O_RDWR), 4096)
plain = os.open("/srv/w/plain", os.O_RDWR | os.O_CREAT)
number = 0
while True:
    number += 1
    memory[:8] = struct.pack("<Q", number)
    os.pwrite(plain, struct.pack("<Q", number), 0)
    if number == 1: open("/srv/w/begun", "w").close()
"""
    writer = await box.spawn(SpawnSpec(["/usr/bin/env", "python3", "-c", program]))
    stopped = await box.spawn(SpawnSpec(["/bin/sleep", "1000"]))
    await sh(box, f"until test -e /srv/w/begun; do sleep 0.01; done; kill -STOP {stopped.pid}")
    await sh(box, "head -c 30000000 /dev/urandom > /srv/ballast")
    for number in range(3):
        captured = await runtime.layers.capture("one", box)
        copy = await runtime.start(BoxSpec(f"copy-{number}", "copy", layers=captured.layers))
        look = "od -An -t u8 -N 8 /srv/w/mapped; od -An -t u8 -N 8 /srv/w/plain; stat -c %s /srv/ballast"
        mapped, plain, size = map(int, (await sh(copy, look)).split())
        assert plain <= mapped <= plain + 1
        assert (plain > 0, size) == (True, 30_000_000)
        await copy.stop(0.0)
    states = await sh(box, f"cut -d' ' -f3 /proc/{stopped.pid}/stat; cut -d' ' -f3 /proc/{writer.pid}/stat")
    assert states.split()[0] == "T"
    assert states.split()[1] != "T"
    for process in (writer, stopped):
        for fd in {process.stdin, process.stdout, process.stderr or process.stdout}:
            os.close(fd)
    await box.stop(0.0)


async def test_what_changes_under_the_copy_leads_nowhere_else(runtime: NativeRuntime) -> None:
    """Folders swapped for links to this machine's files while they are copied: nothing of them arrives."""
    victim = runtime._state_dir / "victim"
    victim.mkdir()
    (victim / "secret").write_text("secret")
    box = await runtime.start(BoxSpec("one", "one"))
    swap = f"""
mkdir -p /srv/real; for i in $(seq 300); do mkdir /srv/real/$i; echo x > /srv/real/$i/secret; done
(while :; do mv /srv/real /srv/aside; ln -s {victim} /srv/real; rm /srv/real; mv /srv/aside /srv/real; done) >/dev/null 2>&1 &
"""
    await sh(box, swap)
    for _ in range(3):
        captured = await runtime.layers.capture("one", box)
        layer = runtime._state_dir / captured.made
        command = ["grep", "-rl", "^secret$", str(layer)]
        search = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL)
        found, _ = await search.communicate()
        assert found == b""
    await box.stop(0.0)


async def test_too_many_layers_become_one(runtime: NativeRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layerstore, "MAX_LAYERS", 3)
    stack: tuple[str, ...] = ()
    for number in range(5):
        box = await runtime.start(BoxSpec(f"box-{number}", "box", layers=stack))
        await sh(box, f"echo {number} > /srv/{number}; rm -f /srv/{number - 2} /etc/ssl/openssl.cnf; which ls")
        await box.stop(0.0)
        stack = (await runtime.layers.capture(f"box-{number}", None)).layers
        assert len(stack) <= 3
    box = await runtime.start(BoxSpec("last", "last", layers=stack))
    assert (await sh(box, "ls /srv; ls /etc/ssl/openssl.cnf || true; which bash")).split() == ["3", "4", "/usr/bin/bash"]
    await box.stop(0.0)


async def test_layers_that_nobody_needs_are_removed(runtime: NativeRuntime) -> None:
    box = await runtime.start(BoxSpec("one", "one"))
    await box.stop(0.0)
    kept, used, unused = [await runtime.layers.capture("one", None) for _ in range(3)]
    copy = await runtime.start(BoxSpec("copy", "copy", layers=used.layers))
    (runtime._state_dir / "layers" / ".half.made").mkdir()
    await runtime.layers.keep_only([kept.made])
    left = {f"layers/{entry.name}" for entry in (runtime._state_dir / "layers").iterdir()}
    assert left == {kept.made, used.made}
    assert [runtime.layers.has(one.made) for one in (kept, used, unused)] == [True, True, False]
    await copy.stop(0.0)
    with pytest.raises(RuntimeFailure, match="never been started"):
        await runtime.layers.capture("nobody", None)
    with pytest.raises(RuntimeFailure, match="a layer of its snapshot is missing"):
        await runtime.start(BoxSpec("other", "other", layers=unused.layers))

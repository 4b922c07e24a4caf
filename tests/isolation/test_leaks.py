"""Two hundred lives of sandboxes leave this machine as it was."""

from __future__ import annotations

import hashlib
import time
from pathlib import Path
from typing import NamedTuple

import psutil

from gatewayd.local.runtime.checks import why_no_disk_limits

from .conftest import Host

MOUNTPOINTS = ("/mnt", "/media", "/srv", "/opt")  # where a sandbox is put together, in a mount namespace of its own
NAMESPACES = ("cgroup", "ipc", "mnt", "net", "pid", "user", "uts")


class Census(NamedTuple):
    """What could leak; of this machine only what belongs to one runtime, since others may be at work beside it."""

    processes: int
    namespaces: int  # distinct ones that its processes are in, or hold
    descriptors: int
    mounts: int
    loops: int
    control_groups: int
    files: int  # in the state folder
    trash: int


def _orphans() -> list[psutil.Process]:
    """Processes of sandboxes whose service has gone."""
    names = ("bwrap", "gatewayd-agent")
    return [one for one in psutil.process_iter(["ppid", "name"]) if one.info["ppid"] == 1 and one.info["name"] in names]


def _mounts(pid: int, state: str) -> int:
    """Mounts in the driver's own namespace, this machine's, that can be of a sandbox: by what is mounted, or where."""
    lines = [line.split() for line in Path(f"/proc/{pid}/mounts").read_text().splitlines()]
    return sum(
        state in source + target or "bases/" in options or target in MOUNTPOINTS for source, target, _, options, _, _ in lines
    )


def census(host: Host) -> Census:
    driver = psutil.Process(host.process.pid)
    processes = [driver, *driver.children(recursive=True), *_orphans()]
    namespaces: set[str] = set()
    for process in processes:
        for name in NAMESPACES:
            try:
                namespaces.add(str(Path(f"/proc/{process.pid}/ns/{name}").readlink()))
            except OSError:
                continue
    descriptors = [str(path.readlink()) for path in Path(f"/proc/{driver.pid}/fd").iterdir() if path.is_symlink()]
    namespaces |= {target for target in descriptors if target.startswith(NAMESPACES)}
    instance = hashlib.sha256(str(host.state.resolve()).encode()).hexdigest()[:12]
    loops = [path for path in Path("/sys/block").glob("loop*/loop/backing_file") if str(host.state) in path.read_text()]
    files = [path for path in host.state.rglob("*") if "bases" not in path.relative_to(host.state).parts]
    return Census(
        processes=len(processes),
        namespaces=len(namespaces),
        descriptors=len(descriptors),
        mounts=_mounts(driver.pid, str(host.state)),
        loops=len(loops),
        control_groups=sum(1 for kind in ("", "/*/") for _ in Path("/sys/fs/cgroup").glob(f"*/gatewayd-{instance}{kind}")),
        files=len(files),
        trash=sum(1 for path in files if path.parent.name == "trash"),
    )


def growth(host: Host, before: Census) -> dict[str, int]:
    """What has become more, once the kernel has finished tidying, or as it is after a while."""
    end = time.monotonic() + 10
    while True:
        now = census(host)
        more = {name: new - old for name, old, new in zip(Census._fields, before, now, strict=True) if new > old}
        if not more or time.monotonic() > end:
            return more
        time.sleep(0.1)


def at_rest(host: Host) -> Census:
    """The census when two in a row are equal: the last lives are over."""
    last = census(host)
    for _ in range(50):
        time.sleep(0.1)
        if (now := census(host)) == last:
            break
        last = now
    return last


def test_nothing_is_left_after_two_hundred_lives(host: Host) -> None:
    host.ask("cycles", count=8, abreast=4)
    before = at_rest(host)
    assert psutil.Process(host.process.pid).children() == []
    host.ask("cycles", count=200, abreast=4, deadline=100)
    assert growth(host, before) == {}


def test_nothing_is_left_after_lives_with_limits(host: Host) -> None:
    limits = {"mem_bytes": 256 << 20, "vcpus": 1}
    if not why_no_disk_limits():
        limits["fs_capacity_bytes"] = 64 << 20
    host.ask("cycles", count=4, abreast=2, **limits)
    before = at_rest(host)
    host.ask("cycles", count=20, abreast=2, deadline=100, **limits)
    assert growth(host, before) == {}

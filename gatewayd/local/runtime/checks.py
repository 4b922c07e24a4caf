"""What the native runtime needs of this machine, tried for real where a trial is harmless, and told as data."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Collection
from pathlib import Path

from gatewayd.local.runtime.base import Finding
from gatewayd.local.runtime.idmap import IdMap
from gatewayd.local.runtime.inside import seccomp

_DEADLINE = 10.0  # seconds for one trial
SEARCH = os.defpath + ":/usr/local/bin:/usr/sbin:/sbin"  # a service's own PATH may be a user's
_BUBBLEWRAP = (0, 5)  # the first with --perms
_DISK_TOOLS = ("mkfs.ext4", "e2fsck", "resize2fs")
_LIMITED = {"memory": "mem_bytes", "cpu": "vcpus", "pids": "the number of processes"}  # controller → what it limits


def find_bubblewrap() -> str | None:
    """Absolute path of bwrap(1)."""
    return shutil.which("bwrap", path=SEARCH)


@functools.cache
def can_size_tmpfs(bwrap: str) -> bool:
    """Whether this bubblewrap has --size (0.7 and later)."""
    try:
        done = subprocess.run([bwrap, "--help"], env={}, stdin=subprocess.DEVNULL, capture_output=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return b"--size" in done.stdout + done.stderr


def why_no_disk_limits() -> str:
    """What this machine lacks to limit a sandbox's disk; "" when nothing."""
    if os.getuid() != 0:
        return "only root may mount a disk of a fixed size"
    if not Path("/dev/loop-control").exists():
        return "there are no loop devices here"
    missing = [name for name in _DISK_TOOLS if shutil.which(name, path=SEARCH) is None]
    return f"{', '.join(missing)} not installed" if missing else ""


async def _try(*command: str, cwd: Path | None = None) -> tuple[bool, str]:
    """Run a command; whether it succeeded, and what it said."""
    try:
        process = await asyncio.create_subprocess_exec(
            *command,
            cwd=cwd,
            env={"PATH": SEARCH, "LC_ALL": "C"},
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
    except OSError as exc:
        return False, f"{command[0]}: {exc.strerror}"
    try:
        async with asyncio.timeout(_DEADLINE):
            said, _ = await process.communicate()
    except TimeoutError:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
        return False, f"{command[0]}: no end within {_DEADLINE:.0f} s"
    return process.returncode == 0, said.decode("utf-8", "replace").strip()[:300]


async def _user_namespaces() -> Finding:
    ok, said = await _try("unshare", "--user", "--map-root-user", "true")
    remedy = "allow them: sysctl user.max_user_namespaces=65536 kernel.unprivileged_userns_clone=1"
    if Path("/proc/sys/kernel/apparmor_restrict_unprivileged_userns").exists():
        remedy = "allow them: sysctl kernel.apparmor_restrict_unprivileged_userns=0, or an AppArmor profile for bwrap"
    return Finding("user namespaces", ok, "available" if ok else said, "" if ok else remedy)


async def _overlay(state_dir: Path) -> Finding:
    """Mount one, in namespaces that end with the trial."""
    options = "lowerdir=lower,upperdir=upper,workdir=work,userxattr"
    namespaces = ["--mount"] if os.getuid() == 0 else ["--user", "--map-root-user", "--mount"]
    with tempfile.TemporaryDirectory(dir=state_dir if state_dir.is_dir() else None, ignore_cleanup_errors=True) as name:
        folder = Path(name)
        for part in ("lower", "upper", "work", "merged"):
            (folder / part).mkdir()
        command = ["mount", "-t", "overlay", "overlay", "-o", options, "merged"]
        ok, said = await _try("unshare", *namespaces, *command, cwd=folder)
        with contextlib.suppress(OSError):
            (folder / "work" / "work").chmod(0o700)  # overlayfs makes it with no mode at all
    remedy = "" if ok else "use a kernel from 5.11 on, and a state folder on ext4, xfs or btrfs (not on NFS or an overlay)"
    return Finding("overlay", ok, "available" if ok else said, remedy)


async def _bubblewrap() -> Finding:
    path = find_bubblewrap()
    if path is None:
        return Finding("bubblewrap", False, "not installed", "apt-get install bubblewrap")
    _, said = await _try(path, "--version")
    numbers = tuple(int(number) for number in re.findall(r"\d+", said)[:3])
    if numbers < _BUBBLEWRAP:
        return Finding("bubblewrap", False, f"too old: {said}", f"install {'.'.join(map(str, _BUBBLEWRAP))} or later")
    return Finding("bubblewrap", True, ".".join(map(str, numbers)))


def _ids(ids: IdMap) -> Finding:
    if ids.method == "single":
        return Finding(
            "id mapping",
            False,
            "only root exists inside a sandbox: this user has no range in /etc/subuid and /etc/subgid, or no newuidmap",
            "apt-get install uidmap && usermod --add-subuids 100000-165535 --add-subgids 100000-165535 USER",
        )
    count = sum(row[2] for row in ids.uid)
    return Finding("id mapping", True, f"{count} ids, {'written by root' if ids.method == 'direct' else 'by newuidmap'}")


def _control_groups(controllers: Collection[str]) -> Finding:
    missing = [limit for controller, limit in _LIMITED.items() if controller not in controllers]
    if missing:
        remedy = "run the service as root, or as a systemd unit with Delegate=yes"
        return Finding("control groups", False, f"not enforced: {', '.join(missing)}", remedy)
    return Finding("control groups", True, ", ".join(sorted(controllers)))


def _disk_limits() -> Finding:
    reason = why_no_disk_limits()
    remedy = "apt-get install e2fsprogs" if "installed" in reason else "run the service as root, on a machine with loop devices"
    return Finding("disk limits", not reason, reason or "ext4 images on loop devices", remedy if reason else "")


def _call_filter() -> Finding:
    if seccomp.program() is None:
        detail = f"there is no list of system calls for {os.uname().machine}"
        return Finding("seccomp", False, detail, "use x86_64 or aarch64 to have system calls filtered")
    try:
        known = "errno" in Path("/proc/sys/kernel/seccomp/actions_avail").read_text().split()
    except OSError:
        known = False
    detail = "system calls are filtered" if known else "this kernel has no seccomp filters"
    return Finding("seccomp", known, detail, "" if known else "use a kernel with CONFIG_SECCOMP_FILTER")


async def examine(state_dir: Path, ids: IdMap, controllers: Collection[str]) -> list[Finding]:
    """Everything, in the order in which a sandbox needs it."""
    return [
        await _user_namespaces(),
        await _overlay(state_dir),
        await _bubblewrap(),
        _ids(ids),
        _control_groups(controllers),
        _disk_limits(),
        _call_filter(),
    ]

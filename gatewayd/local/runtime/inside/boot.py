"""How one sandbox comes up: control groups, user namespace, overlay, bubblewrap, agent.

Runs in the monitor. The order is the security of it: processes join the control groups first, give up the host's ids next, and
only then touch anything that the sandbox owns.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from gatewayd.local.runtime.inside import agent, anchor, idspace, kernel, loopdisk, network

_DEADLINE = 15.0  # seconds for bubblewrap to report that the sandbox stands
_MOUNTPOINTS = ("/mnt", "/media", "/srv", "/opt")  # a folder every user may pass through; used in a private mount namespace only
_NAMESPACES = ("user", "mnt", "net", "ipc", "uts", "pid")  # user first: it grants the right to the others
_MAX_STDERR = 4096  # bytes of complaint that are kept


class BootError(Exception):
    """The sandbox did not come up; the message is for the user."""


class Tree:
    """The processes that the monitor must see gone."""

    def __init__(self) -> None:
        self.bubblewrap: int | None = None  # pid, our child once its short-lived parent is gone
        self.init: int | None = None  # pidfd of pid 1 in the sandbox: its end is the end of everything inside


class _Pipes:
    """What the processes of a boot tell each other; every end is closed by `keep`."""

    def __init__(self) -> None:
        self.pids_r, self.pids_w = os.pipe()  # frame → monitor: pids of launcher and joiner
        self.mapped_r, self.mapped_w = os.pipe()  # launcher → monitor: "my user namespace exists"
        self.go_r, self.go_w = os.pipe()  # monitor → launcher: "its ids are mapped"
        self.info_r, self.info_w = os.pipe()  # bubblewrap → monitor: JSON with the pid of pid 1
        self.ready_r, self.ready_w = os.pipe()  # anchor → monitor: "I run"
        self.enter_r, self.enter_w = os.pipe()  # monitor → joiner: the pid to join
        self.error_r, self.error_w = os.pipe()  # everybody's stderr → monitor
        self._open = set(vars(self).values())

    def close(self, *fds: int) -> None:
        """Close these."""
        for fd in fds:
            self._open.discard(fd)
            os.close(fd)

    def keep(self, *fds: int) -> None:
        """Close all others that are still open: a child that holds a writing end would hide that everybody else has gone."""
        self.close(*(self._open - set(fds)))


def boot(plan: dict[str, Any], tree: Tree, channel: socket.socket) -> None:
    """Bring the sandbox up and let the agent in; `tree` is filled in as processes appear.

    Raises:
        BootError, OSError: it did not come up; whatever is in `tree` must be ended.
    """
    pipes = _Pipes()
    deadline = time.monotonic() + _DEADLINE
    try:
        frame = os.fork()
        if frame == 0:
            _child(pipes, lambda: _frame(plan, pipes, channel))
        pipes.close(pipes.pids_w, pipes.mapped_w, pipes.go_r, pipes.info_w, pipes.ready_w, pipes.enter_r, pipes.error_w)
        pids = _read(pipes.pids_r, 64, deadline, b";").rstrip(b";").split()
        os.waitpid(frame, 0)
        if len(pids) == 2:
            tree.bubblewrap = int(pids[0])
            if _read(pipes.mapped_r, 1, deadline):
                try:
                    idspace.write_maps(tree.bubblewrap, plan["id_map"])
                except idspace.MapError as exc:
                    raise BootError(str(exc)) from exc
                os.write(pipes.go_w, b"x")
                if info := _read(pipes.info_r, 65536, deadline, b"}"):
                    init = int(json.loads(info)["child-pid"])
                    tree.init = os.pidfd_open(init)
                    if _read(pipes.ready_r, 1, deadline):
                        os.write(pipes.enter_w, str(init).encode())
                        if os.waitpid(int(pids[1]), 0)[1] == 0:
                            return
        detail = _read(pipes.error_r, _MAX_STDERR, time.monotonic() + 0.5).decode("utf-8", "replace").strip()
        raise BootError(detail or f"not up within {_DEADLINE:.0f} s")
    finally:
        pipes.keep()


def _read(fd: int, size: int, deadline: float, end: bytes = b"") -> bytes:
    """Up to `size` bytes: until `end` (if given) or end of file, or what there is when the deadline passes."""
    data = b""
    while len(data) < size and select.select([fd], [], [], max(0.0, deadline - time.monotonic()))[0]:
        chunk = os.read(fd, size - len(data))
        data += chunk
        if not chunk or (end and data.rstrip(b" \n").endswith(end)):
            break
    return data


def explain(exc: BaseException) -> str:
    """One line for a user."""
    return f"{exc.filename or 'system call'}: {exc.strerror}" if isinstance(exc, OSError) else str(exc)


def _child(pipes: _Pipes, body: Callable[[], None]) -> NoReturn:
    """Run the rest of a forked child: it must never return into its parent's code."""
    status = 1
    try:
        body()
        status = 0
    except BaseException as exc:  # noqa: BLE001 - as above
        with contextlib.suppress(OSError):
            os.write(pipes.error_w, f"{explain(exc)}\n".encode()[:_MAX_STDERR])
    os._exit(status)


def _frame(plan: dict[str, Any], pipes: _Pipes, channel: socket.socket) -> None:
    """Join the control groups once for both children, start them, and leave."""
    for folder in plan["cgroups"]:
        # 0: the writer itself. In version 1 `tasks` moves one thread, all we are, without the wait for every processor that
        # `cgroup.procs` needs (some 10 ms on an idle machine)
        file = f"{folder}/tasks" if os.path.exists(f"{folder}/tasks") else f"{folder}/cgroup.procs"  # noqa: PTH110
        Path(file).write_text("0")
    kernel.leave_keyrings()  # the user's keys are none of the sandbox's business
    children = []
    for body in (lambda: _launch(plan, pipes), lambda: _join(plan, pipes, channel)):
        pid = os.fork()
        if pid == 0:
            _child(pipes, body)
        children.append(pid)
    os.write(pipes.pids_w, b"%d %d;" % tuple(children))


def _launch(plan: dict[str, Any], pipes: _Pipes) -> None:
    """User namespace, overlay, then become bubblewrap."""
    pipes.keep(pipes.mapped_w, pipes.go_r, pipes.info_w, pipes.ready_w, pipes.error_w)
    os.setsid()
    null = os.open("/dev/null", os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    os.chdir(plan["box_dir"])  # so that the overlay's options hold no path of this machine
    target = next(path for path in _MOUNTPOINTS if Path(path).is_dir())
    privileged = plan["id_map"]["method"] == "direct"
    if privileged:  # root's own overlay, made while the state folder can still be read
        _mount_overlay(plan, target)
    kernel.unshare(kernel.CLONE_NEWUSER)
    os.write(pipes.mapped_w, b"x")
    if os.read(pipes.go_r, 1) != b"x":
        return
    idspace.become_root()
    if privileged:
        kernel.unshare(kernel.CLONE_NEWNS)
    else:
        _mount_overlay(plan, target)
    kernel.die_with_parent(signal.SIGKILL)
    if os.getppid() == 1:  # the monitor died before that call
        return
    info_fd = fcntl.fcntl(pipes.info_w, fcntl.F_DUPFD, 10)  # inheritable, and out of the way
    os.dup2(pipes.error_w, 2)
    os.dup2(pipes.ready_w, anchor.READY_FD)
    options = [*plan["isolation"], "--bind", target, "/", *plan["mounts"], "--info-fd", str(info_fd)]
    if call_filter := bytes.fromhex(plan["seccomp"]):
        options += ["--seccomp", str(_memory_file(call_filter))]
    # by a descriptor: pid 1's command line is readable inside
    arguments = _memory_file(b"".join(word.encode() + b"\0" for word in options))
    command = [plan["bwrap"], "--args", str(arguments), "--", *anchor.command()]
    os.execve(command[0], command, {})  # noqa: S606 - no environment: bubblewrap's --clearenv would leave /proc/1/environ readable


def _memory_file(content: bytes) -> int:
    """An inheritable descriptor to read `content` from."""
    fd = os.memfd_create("options", 0)
    os.write(fd, content)
    os.lseek(fd, 0, os.SEEK_SET)
    return fd


def _mount_overlay(plan: dict[str, Any], target: str) -> None:
    kernel.unshare(kernel.CLONE_NEWNS)
    kernel.mount("none", "/", "none", kernel.MS_REC | kernel.MS_PRIVATE)
    upper, work = "upper", "work"
    if plan["disk"]:
        id_map = plan["id_map"]
        loopdisk.mount((id_map["uid"][0][1], id_map["gid"][0][1]), time.monotonic() + _DEADLINE / 2)
        upper, work = f"{loopdisk.MOUNTPOINT}/upper", f"{loopdisk.MOUNTPOINT}/work"
    kernel.mount("overlay", target, "overlay", 0, f"lowerdir={plan['lower']},upperdir={upper},workdir={work},userxattr")


def _join(plan: dict[str, Any], pipes: _Pipes, channel: socket.socket) -> None:
    """Enter the sandbox's namespaces when told to, and leave the agent there."""
    pipes.keep(pipes.enter_r, pipes.error_w)
    kernel.rename("gatewayd-agent")
    pid = os.read(pipes.enter_r, 32).decode()
    if not pid:
        return  # the boot failed before
    with contextlib.suppress(PermissionError):  # as root: a sandbox out of memory must not lose its agent
        Path("/proc/self/oom_score_adj").write_text("-900")
    fds = [os.open(f"/proc/{pid}/ns/{name}", os.O_RDONLY | os.O_CLOEXEC) for name in _NAMESPACES]
    way_out = None  # nobody asked for one
    if plan["network"] is not None:  # before the mount namespace is joined: the program is this machine's
        inside = (fds[_NAMESPACES.index("user")], fds[_NAMESPACES.index("net")])
        way_out = network.set_up(inside, plan["network"]["nft"], plan["network"]["rules"])
    for fd in fds:
        kernel.setns(fd)
        os.close(fd)
    idspace.become_root()
    if os.fork() == 0:  # only a child is inside the new pid namespace
        pipes.keep()
        agent.run(channel, bytes.fromhex(plan["seccomp"]), plan["max_pids"], way_out)

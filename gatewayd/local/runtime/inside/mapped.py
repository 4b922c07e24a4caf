"""A helper process that works on a sandbox's files as the sandbox's root: its plan, its ids, its answer.

Started with ``python -I -S PROGRAM N``; the plan is one JSON object on descriptor N, answers are JSON lines on standard output.
The work is done by a child, which begins with the service's ids and becomes root of the sandbox's when it calls `Door.enter`.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from typing import Any

from gatewayd.local.runtime.inside import idspace, kernel

_PLAN_MAX = 1 << 20  # bytes


class Door:
    """The way into a user namespace of a sandbox's ids, for the child."""

    def __init__(self, unshared: int, mapped: int, parent: int) -> None:
        self._unshared = unshared  # pipe to the parent: "my user namespace exists"
        self._mapped = mapped  # pipe from the parent: "its ids are mapped"
        self._parent = parent  # its pid

    def enter(self) -> None:
        """Become root in there, with all its capabilities. Raises idspace.MapError, OSError."""
        kernel.unshare(kernel.CLONE_NEWUSER)
        os.write(self._unshared, b"x")
        if os.read(self._mapped, 1) != b"x":
            raise idspace.MapError("its ids were not mapped")
        idspace.become_root()
        kernel.die_with_parent(signal.SIGKILL)  # again: new ids have undone it
        if os.getppid() != self._parent:
            raise idspace.MapError("the service ended")

    @staticmethod
    def settle() -> None:
        """Give up what the work on files does not need."""
        os.umask(0)
        kernel.keep_only(kernel.SANDBOX_CAPABILITIES)
        kernel.gain_no_privileges()


def answer(message: dict[str, Any]) -> None:
    """Tell the service."""
    os.write(1, json.dumps(message).encode() + b"\n")


def main(number: str, body: Callable[[dict[str, Any], Door], int]) -> int:
    """Run `body` in the child, with the plan on descriptor `number`; its exit status."""
    kernel.die_with_parent(signal.SIGKILL)
    plan_fd = int(number)
    content = b""
    while len(content) < _PLAN_MAX and (chunk := os.read(plan_fd, 65536)):
        content += chunk
    os.close(plan_fd)
    plan: dict[str, Any] = json.loads(content)
    unshared_r, unshared_w = os.pipe()
    mapped_r, mapped_w = os.pipe()
    parent = os.getpid()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            kernel.die_with_parent(signal.SIGKILL)
            os.close(unshared_r)
            os.close(mapped_w)
            status = body(plan, Door(unshared_w, mapped_r, parent))
        finally:
            os._exit(status)
    os.close(unshared_w)
    os.close(mapped_r)
    try:
        if os.read(unshared_r, 1) == b"x":
            idspace.write_maps(child, plan["id_map"])
            os.write(mapped_w, b"x")
    except (idspace.MapError, OSError) as exc:
        answer({"failed": str(exc) or "its ids cannot be mapped", "errno": getattr(exc, "errno", None)})
    os.close(mapped_w)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

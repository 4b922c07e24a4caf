"""The monitor: one small process per running sandbox, outside it.

Started by the service with ``python -I -S``; reads its plan as one JSON object on stdin. It brings the sandbox up (`boot`) and
then waits for one of two things: the sandbox ends, or the service lets go of the lifeline socket (it asked for a stop, or was
killed). Either way it ends everything inside and removes the control groups, so nothing outlives its owner.

Process tree::

    service ── monitor ─┬─ bubblewrap ── pid 1 in the sandbox ── anchor (keeps it alive)
                        └─ agent (joined the sandbox's namespaces)
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[4]))  # -I -S leaves our own packages out

from gatewayd.local.runtime.inside import kernel, loopdisk, packets
from gatewayd.local.runtime.inside.boot import BootError, Tree, boot, explain

_CLEANUP_DEADLINE = 5.0  # seconds for the killed processes to be gone and their control groups to be let go


def main() -> int:
    """Run one sandbox from start to end; 0 when it came up at all."""
    try:
        plan: dict[str, Any] = json.load(sys.stdin)
    except ValueError:  # the service was killed while it wrote
        return 1
    lifeline = socket.socket(fileno=plan["lifeline_fd"])
    channel = socket.socket(fileno=plan["channel_fd"])
    lifeline.set_inheritable(False)
    channel.set_inheritable(False)
    kernel.become_subreaper()
    tree = Tree()
    try:
        boot(plan, tree, channel)
    except (BootError, OSError) as exc:
        _end(plan, tree)
        with contextlib.suppress(OSError):  # the service may be gone
            packets.send(lifeline, {"failed": explain(exc)})
        return 1
    channel.close()
    with contextlib.suppress(OSError):  # the service was killed meanwhile: `_wait` sees that at once
        packets.send(lifeline, {"running": tree.bubblewrap})
    reason = _wait(lifeline, tree)
    _end(plan, tree)
    with contextlib.suppress(OSError):  # the service was killed
        packets.send(lifeline, {"ended": reason})
    return 0


def _wait(lifeline: socket.socket, tree: Tree) -> str:
    """Until the sandbox ends or the service lets go; returns the reason."""
    watched = [lifeline.fileno()] + ([tree.init] if tree.init is not None else [])
    readable, _, _ = select.select(watched, [], [])
    return "the sandbox's first process ended" if tree.init in readable else "stopped"


def _end(plan: dict[str, Any], tree: Tree) -> None:
    """Kill whatever is left and remove the control groups; returns when both are done."""
    if tree.init is not None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(tree.init, signal.SIGKILL)  # and with it every process of its pid namespace
    elif tree.bubblewrap is not None:  # it failed before it told us of its child
        with contextlib.suppress(ProcessLookupError):
            os.kill(tree.bubblewrap, signal.SIGKILL)
    deadline = time.monotonic() + _CLEANUP_DEADLINE
    _reap_all(deadline)
    if plan["disk"]:  # unmounted with its namespace: a moment after the last process
        with contextlib.suppress(OSError):
            os.close(loopdisk.lock(f"{plan['box_dir']}/{loopdisk.IMAGE}", deadline))
    for folder in plan["cgroups"]:
        while time.monotonic() < deadline:
            try:
                Path(folder).rmdir()
            except FileNotFoundError:
                break
            except OSError:
                time.sleep(0.01)  # the kernel empties a group a moment after its last process
            else:
                break
        with contextlib.suppress(OSError):  # the last to leave removes what was made for all sandboxes
            Path(folder).parent.rmdir()


def _reap_all(deadline: float) -> None:
    """Reap bubblewrap and, as a subreaper, the agent and other orphans: the pid namespace ends with the last of them."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})  # nothing is forked from here on
    while True:
        try:
            pid, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                return
            signal.sigtimedwait({signal.SIGCHLD}, remaining)


if __name__ == "__main__":
    sys.exit(main())

"""The few system calls that Python 3.11's `os` lacks, by ctypes: unshare, setns, mount, prctl, capset.

Each raises OSError with errno and the name of the call.
"""

from __future__ import annotations

import ctypes
import os
import struct

CLONE_NEWNS = 0x0002_0000
CLONE_NEWUSER = 0x1000_0000

MS_REC = 0x4000
MS_PRIVATE = 1 << 18

_PR_SET_PDEATHSIG = 1
_PR_SET_DUMPABLE = 4
_PR_CAPBSET_DROP = 24
_PR_SET_CHILD_SUBREAPER = 36
_CAPABILITY_VERSION_3 = 0x2008_0522
_LAST_CAP_MAX = 63  # two 32-bit words in capset(2)

# What root inside a sandbox may do: capabilities(7) numbers. Enough for package managers, daemons that drop to their own
# user, and sshd; nothing that mounts, traces other users or configures the network.
SANDBOX_CAPABILITIES = frozenset(
    {
        0,  # CHOWN
        1,  # DAC_OVERRIDE
        3,  # FOWNER
        4,  # FSETID
        5,  # KILL
        6,  # SETGID
        7,  # SETUID
        8,  # SETPCAP
        10,  # NET_BIND_SERVICE
        13,  # NET_RAW
        18,  # SYS_CHROOT
        29,  # AUDIT_WRITE
        31,  # SETFCAP
    }
)

_libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int, call: str) -> None:
    if result != 0:
        errno = ctypes.get_errno()
        raise OSError(errno, os.strerror(errno), call)


def unshare(flags: int) -> None:
    """unshare(2)."""
    _check(_libc.unshare(flags), "unshare")


def setns(fd: int) -> None:
    """setns(2), whatever kind of namespace `fd` names."""
    _check(_libc.setns(fd, 0), "setns")


def mount(source: str, target: str, fstype: str, flags: int = 0, data: str = "") -> None:
    """mount(2)."""
    _check(
        _libc.mount(source.encode(), target.encode(), fstype.encode(), ctypes.c_ulong(flags), data.encode() or None),
        f"mount {fstype}",
    )


def die_with_parent(signal_number: int) -> None:
    """prctl(PR_SET_PDEATHSIG): cleared by the kernel at each change of credentials, so call it after the last one."""
    _check(_libc.prctl(_PR_SET_PDEATHSIG, signal_number, 0, 0, 0), "prctl PDEATHSIG")


def become_subreaper() -> None:
    """prctl(PR_SET_CHILD_SUBREAPER): orphaned descendants become our children, so that we can see them gone."""
    _check(_libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0), "prctl CHILD_SUBREAPER")


def hide_from_tracers(*, hidden: bool = True) -> None:
    """prctl(PR_SET_DUMPABLE, 0): no ptrace, no /proc/PID/{mem,environ,fd,root} for the sandbox's processes."""
    _check(_libc.prctl(_PR_SET_DUMPABLE, 0 if hidden else 1, 0, 0, 0), "prctl DUMPABLE")


def keep_only(capabilities: frozenset[int]) -> None:
    """Drop every other capability from the bounding, permitted, effective and inheritable sets."""
    for number in range(_LAST_CAP_MAX + 1):
        # EINVAL marks the end of what this kernel knows
        if number not in capabilities and _libc.prctl(_PR_CAPBSET_DROP, number, 0, 0, 0) != 0:
            break
    words = [0, 0]
    for number in capabilities:
        words[number // 32] |= 1 << (number % 32)
    header = struct.pack("=Ii", _CAPABILITY_VERSION_3, 0)
    data = struct.pack("=6I", words[0], words[0], 0, words[1], words[1], 0)  # effective, permitted, inheritable; twice
    _check(_libc.capset(header, data), "capset")

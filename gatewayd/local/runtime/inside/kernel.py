"""The few system calls that Python 3.11's `os` lacks, by ctypes: unshare, setns, mount, prctl, capset, keyctl, openat2.

Each raises OSError with errno and the name of the call.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct

CLONE_NEWNS = 0x0002_0000
CLONE_NEWUSER = 0x1000_0000

MS_RDONLY = 1
MS_NOSUID = 2
MS_NODEV = 4
MS_REC = 0x4000
MS_PRIVATE = 1 << 18

_PR_SET_PDEATHSIG = 1
_PR_SET_DUMPABLE = 4
_PR_SET_NAME = 15
_PR_SET_SECCOMP = 22
_PR_CAPBSET_DROP = 24
_PR_SET_CHILD_SUBREAPER = 36
_PR_SET_NO_NEW_PRIVS = 38
_SECCOMP_MODE_FILTER = 2
_OPENAT2 = 437  # on every architecture
_RESOLVE_NO_MAGICLINKS = 0x02
_RESOLVE_NO_SYMLINKS = 0x04
_RESOLVE_BENEATH = 0x08
_KEYCTL = {"x86_64": 250, "aarch64": 219}  # call numbers: the C library has no wrapper
_KEYCTL_JOIN_SESSION_KEYRING = 1
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
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), call)


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


def open_plainly(path: str, flags: int) -> int:
    """openat2(2) that follows no magic link (/proc/PID/exe, fd, root), which could lead out of a sandbox; close-on-exec."""
    return _openat2(-100, path, flags, _RESOLVE_NO_MAGICLINKS)  # AT_FDCWD; the path is absolute


def open_beneath(folder: int, path: str, flags: int) -> int:
    """openat2(2) of a path below an open folder that follows no link at all; close-on-exec."""
    return _openat2(folder, path, flags, _RESOLVE_NO_SYMLINKS | _RESOLVE_BENEATH)


def _openat2(folder: int, path: str, flags: int, resolve: int) -> int:
    name = os.fsencode(path)
    if b"\0" in name:
        raise ValueError("embedded null byte")
    how = struct.pack("=QQQ", flags | os.O_CLOEXEC, 0, resolve)
    while True:
        fd = int(_libc.syscall(_OPENAT2, folder, name, how, len(how)))
        if fd >= 0:
            return fd
        if (number := ctypes.get_errno()) != errno.EINTR:
            raise OSError(number, os.strerror(number), path)


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


def gain_no_privileges() -> None:
    """prctl(PR_SET_NO_NEW_PRIVS): from here on execve gives nothing, neither set-user-id nor file capabilities."""
    _check(_libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "prctl NO_NEW_PRIVS")


class _Program(ctypes.Structure):
    """struct sock_fprog."""

    _fields_ = (("length", ctypes.c_ushort), ("steps", ctypes.c_char_p))


def filter_calls(program: bytes) -> None:
    """prctl(PR_SET_SECCOMP): `program`, an array of struct sock_filter, judges every call from now on, and our children's."""
    steps = _Program(len(program) // 8, program)
    _check(_libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(steps), 0, 0), "prctl SECCOMP")


def leave_keyrings() -> None:
    """keyctl(KEYCTL_JOIN_SESSION_KEYRING): an empty session keyring. Where keyrings do not exist there is nothing to leave."""
    if (number := _KEYCTL.get(os.uname().machine)) is not None:
        _libc.syscall(number, _KEYCTL_JOIN_SESSION_KEYRING, None)


def rename(title: str) -> None:
    """Replace this process's name and, in place, its command line, which everybody may read and which names host paths."""
    _check(_libc.prctl(_PR_SET_NAME, title.encode(), 0, 0, 0), "prctl NAME")
    with open("/proc/self/stat", "rb") as stat:  # noqa: PTH123 - pathlib is not worth its import here
        fields = stat.read().rpartition(b")")[2].split()
    start, end = int(fields[45]), int(fields[46])  # arg_start, arg_end: fields 48 and 49 of proc(5)
    if end > start:
        ctypes.memset(start, 0, end - start)
        ctypes.memmove(start, title.encode(), min(len(title), end - start - 1))

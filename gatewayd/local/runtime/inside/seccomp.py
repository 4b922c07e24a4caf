"""The seccomp filter of everything that runs in a sandbox: a classic BPF program, generated here for this machine.

Root inside holds few capabilities, so most of what is refused would be refused anyway; the filter keeps the code behind these
calls, where the kernel's privilege escalations are found, out of reach. It is a list of refusals: what a program may meet on any
machine is answered EPERM, and where programs have a second way (clone3 → clone, io_uring → epoll) ENOSYS shows them to it. Calls
newer than this list are ENOSYS too, and with them the x32 numbers; so are those of another architecture (32-bit programs).

clone3(2) hides its flags in memory, where a filter cannot look: so it does not exist, and clone(2)'s flags are checked.
io_uring would open sockets and files past the filter: so it does not exist.
"""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Iterable
from typing import NamedTuple

_LOAD = 0x20  # BPF_LD | BPF_W | BPF_ABS: a word of struct seccomp_data
_IF_EQUAL = 0x15  # BPF_JMP | BPF_JEQ | BPF_K
_IF_ABOVE = 0x25  # BPF_JMP | BPF_JGT | BPF_K
_IF_ANY_BIT = 0x45  # BPF_JMP | BPF_JSET | BPF_K
_RETURN = 0x06  # BPF_RET | BPF_K
_ALLOW = 0x7FFF_0000
_ERRNO = 0x0005_0000
_NR, _ARCH = 0, 4  # offsets in struct seccomp_data

# CLONE_NEWCGROUP, UTS, IPC, USER, PID, NET, NS; and NEWTIME, which clone(2) reads as a part of the exit signal
_NEW_NAMESPACE = 0x7E02_0000
_NEW_TIME = 0x80
_FAMILIES = (1, 2, 10, 16)  # AF_UNIX, AF_INET, AF_INET6, AF_NETLINK: no packet, vsock, alg, bluetooth, …
_PERSONALITIES = (0, 8, 0x2_0000, 0x2_0008, 0x4_0000, 0xFFFF_FFFF)  # Linux, 32-bit uname, 2.6 uname, no ASLR (gdb), "tell me"
_TERMINAL_INJECTION = (0x5412, 0x541C)  # TIOCSTI, TIOCLINUX: typing into somebody else's terminal
_NEWEST = 469  # file_setattr; numbers above 423 are the same on every architecture


class Machine(NamedTuple):
    """One architecture: its audit number and its call numbers."""

    audit: int
    refused: tuple[int, ...]  # EPERM
    absent: tuple[int, ...]  # ENOSYS
    clone: int
    unshare: int
    ioctl: int
    socket: int
    socketpair: int
    personality: int


# add_key request_key keyctl; bpf perf_event_open userfaultfd; kexec_load kexec_file_load; init_module finit_module delete_module;
# mount umount2 pivot_root setns open_by_handle_at fanotify_init; quotactl swapon swapoff reboot acct syslog vhangup;
# settimeofday clock_settime sethostname setdomainname lookup_dcookie nfsservctl
_REFUSED_X86_64 = (
    *(248, 249, 250, 321, 298, 323, 246, 320, 175, 313, 176),
    *(165, 166, 155, 308, 304, 300, 179, 167, 168, 169, 163, 103, 153),
    *(164, 227, 170, 171, 212, 180),
    *(172, 173, 154, 134, 136, 139, 156),  # iopl ioperm modify_ldt uselib ustat sysfs _sysctl
    *(174, 177, 178, 181, 182, 183, 184, 185, 236),  # create_module … getpmsg … security vserver
)
_REFUSED_AARCH64 = (
    *(217, 218, 219, 280, 241, 282, 104, 294, 105, 273, 106),
    *(40, 39, 41, 268, 265, 262, 60, 224, 225, 142, 89, 116, 58),
    *(170, 112, 161, 162, 18, 42),
)
# open_tree move_mount fsopen fsconfig fsmount fspick mount_setattr quotactl_fd statmount listmount open_tree_attr
_REFUSED_EVERYWHERE = (428, 429, 430, 431, 432, 433, 442, 443, 457, 458, 467)
_ABSENT = (425, 426, 427, 435)  # io_uring_setup, _enter, _register; clone3

MACHINES = {
    "x86_64": Machine(0xC000_003E, _REFUSED_X86_64 + _REFUSED_EVERYWHERE, _ABSENT, 56, 272, 16, 41, 53, 135),
    "aarch64": Machine(0xC000_00B7, _REFUSED_AARCH64 + _REFUSED_EVERYWHERE, _ABSENT, 220, 97, 29, 198, 199, 92),
}


def program(machine: str | None = None) -> bytes | None:
    """The filter as an array of struct sock_filter; None on a machine there is no table for.

    Args:
        machine: as uname(2) names it; None: this one.
    """
    known = MACHINES.get(machine or os.uname().machine)
    return _generate(known) if known is not None else None


def _step(code: int, value: int, then: int = 0, otherwise: int = 0) -> bytes:
    return struct.pack("=HBBI", code, then, otherwise, value)


def _fail(number: int) -> bytes:
    return _step(_RETURN, _ERRNO | number)


def _argument(index: int) -> bytes:
    """Load the low half of an argument: all that the kernel reads of the ones checked here (little-endian machines)."""
    return _step(_LOAD, 16 + 8 * index)


def _only_for(call: int, body: bytes) -> bytes:
    """`body` must end with a return; it is skipped for other calls."""
    return _step(_IF_EQUAL, call, 0, len(body) // 8) + body


def _refuse_if(code: int, values: Iterable[int], number: int) -> bytes:
    return b"".join(_step(code, value, 0, 1) + _fail(number) for value in values)


def _accept_only(values: Iterable[int], number: int) -> bytes:
    return b"".join(_step(_IF_EQUAL, value, 0, 1) + _step(_RETURN, _ALLOW) for value in values) + _fail(number)


def _generate(machine: Machine) -> bytes:
    allow = _step(_RETURN, _ALLOW)
    families = _argument(0) + _accept_only(_FAMILIES, errno.EAFNOSUPPORT)
    return b"".join(
        [
            _step(_LOAD, _ARCH),
            _step(_IF_EQUAL, machine.audit, 1, 0),
            _fail(errno.ENOSYS),
            _step(_LOAD, _NR),
            _refuse_if(_IF_ABOVE, [_NEWEST], errno.ENOSYS),
            _refuse_if(_IF_EQUAL, machine.absent, errno.ENOSYS),
            _refuse_if(_IF_EQUAL, machine.refused, errno.EPERM),
            _only_for(machine.clone, _argument(0) + _refuse_if(_IF_ANY_BIT, [_NEW_NAMESPACE], errno.EPERM) + allow),
            _only_for(machine.unshare, _argument(0) + _refuse_if(_IF_ANY_BIT, [_NEW_NAMESPACE | _NEW_TIME], errno.EPERM) + allow),
            _only_for(machine.ioctl, _argument(1) + _refuse_if(_IF_EQUAL, _TERMINAL_INJECTION, errno.EPERM) + allow),
            _only_for(machine.socket, families),
            _only_for(machine.socketpair, families),
            _only_for(machine.personality, _argument(0) + _accept_only(_PERSONALITIES, errno.EPERM)),
            allow,
        ]
    )

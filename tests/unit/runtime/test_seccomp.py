"""The filter of system calls, judged by a small interpreter of classic BPF: every architecture is tested on every machine."""

from __future__ import annotations

import errno
import struct

import pytest

from gatewayd.local.runtime.inside import seccomp

ALLOW = 0x7FFF_0000
X86, ARM = 0xC000_003E, 0xC000_00B7
BOTH = pytest.mark.parametrize("name", ["x86_64", "aarch64"])


def judge(program: bytes, audit: int, number: int, *arguments: int) -> int:
    """Run the filter on one call: 0 is allowed, else the errno."""
    data = struct.pack("=iIQ6Q", number, audit, 0, *(arguments + (0,) * 6)[:6])
    steps = list(struct.iter_unpack("=HBBI", program))
    accumulator: int = 0
    at = 0
    while True:
        code, then, otherwise, value = steps[at]
        at += 1
        if code == 0x20:
            (accumulator,) = struct.unpack_from("=I", data, value)
        elif code == 0x15:
            at += then if accumulator == value else otherwise
        elif code == 0x25:
            at += then if accumulator > value else otherwise
        elif code == 0x45:
            at += then if accumulator & value else otherwise
        else:
            assert code == 0x06
            if value == ALLOW:
                return 0
            assert value >> 16 == 5  # SECCOMP_RET_ERRNO
            return int(value & 0xFFFF)


class Calls:
    """The filter of one architecture, asked by name."""

    def __init__(self, name: str) -> None:
        program = seccomp.program(name)
        assert program is not None
        self.program = program
        self.machine = seccomp.MACHINES[name]

    def __call__(self, call: str | int, *arguments: int) -> int:
        number = call if isinstance(call, int) else getattr(self.machine, call)
        return judge(self.program, self.machine.audit, number, *arguments)


@BOTH
def test_ordinary_calls_pass(name: str) -> None:
    calls = Calls(name)
    special = {*calls.machine.refused, *calls.machine.absent}
    special |= {getattr(calls.machine, call) for call in ("socket", "socketpair", "personality")}
    for number in set(range(424)) - special:
        assert calls(number) == 0, number
    for number in (434, 436, 437, 439, 444, 449, 451, 452, 466):  # pidfd_open, close_range, openat2, faccessat2, landlock, …
        assert calls(number) == 0, number


@BOTH
def test_refused_and_absent_calls(name: str) -> None:
    calls = Calls(name)
    assert {calls(number) for number in calls.machine.refused} == {errno.EPERM}
    assert {calls(number) for number in calls.machine.absent} == {errno.ENOSYS}
    assert calls(470) == errno.ENOSYS  # newer than the list
    assert calls(-1) == errno.ENOSYS


def test_other_architectures_calls_do_not_exist() -> None:
    program = seccomp.program("x86_64")
    assert program is not None
    assert judge(program, 0x4000_0003, 20) == errno.ENOSYS  # i386 getpid
    assert judge(program, X86, 0x4000_0000 | 39) == errno.ENOSYS  # x32 getpid
    assert judge(program, ARM, 172) == errno.ENOSYS
    assert seccomp.program("riscv64") is None


@BOTH
@pytest.mark.parametrize("flag", [0x2_0000, 0x200_0000, 0x400_0000, 0x800_0000, 0x1000_0000, 0x2000_0000, 0x4000_0000])
def test_no_new_namespaces(name: str, flag: int) -> None:
    calls = Calls(name)
    assert calls("clone", flag | 17) == errno.EPERM
    assert calls("unshare", flag) == errno.EPERM
    assert calls("unshare", flag | 0x200) == errno.EPERM


@BOTH
def test_threads_and_forks_pass(name: str) -> None:
    calls = Calls(name)
    assert calls("clone", 17) == 0  # SIGCHLD: fork
    assert calls("clone", 0x3D0F00) == 0  # pthread_create
    assert calls("clone", 0x4111) == 0  # vfork
    assert calls("unshare", 0x600) == 0  # CLONE_FS | CLONE_FILES
    assert calls("unshare", 0x80) == errno.EPERM  # CLONE_NEWTIME
    assert calls("clone", 0x80) == 0  # only an odd exit signal there


@BOTH
def test_terminals_cannot_be_typed_into(name: str) -> None:
    calls = Calls(name)
    for request in (0x5412, 0x541C):
        assert calls("ioctl", 0, request) == errno.EPERM
        assert calls("ioctl", 0, 0xDEAD_0000_0000 | request) == errno.EPERM  # the kernel looks at the low half only
    assert calls("ioctl", 0x5412, 0x5413) == 0  # TIOCGWINSZ


@BOTH
@pytest.mark.parametrize("call", ["socket", "socketpair"])
def test_socket_families(name: str, call: str) -> None:
    calls = Calls(name)
    assert [family for family in range(64) if calls(call, family) == 0] == [1, 2, 10, 16]
    for family in (17, 38, 40, (1 << 32) | 17):  # packet, alg, vsock
        assert calls(call, family) == errno.EAFNOSUPPORT
    assert calls(call, (7 << 32) | 2) == 0


@BOTH
def test_personalities(name: str) -> None:
    calls = Calls(name)
    assert calls("personality", 0xFFFF_FFFF) == 0
    assert calls("personality", 0x4_0000) == 0  # gdb
    assert calls("personality", 0x40_0000) == errno.EPERM  # READ_IMPLIES_EXEC

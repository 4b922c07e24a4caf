"""The anchor: the first program inside a sandbox, which says that the sandbox stands and then waits for ever.

It is made here, byte by byte, and carried in memory: an image need not have a shell, nor anything else that could be run.

    write(3, "x", 1); close(3); for (;;) pause();
"""

from __future__ import annotations

import os
import struct

READY_FD = 3  # where it tells that it runs
_BASE = 0x400000  # address that the file is loaded at
_HEADERS = 64 + 56  # bytes of the ELF header and of one program header
_X86_64, _AARCH64 = 62, 183  # e_machine

_CODE = {
    "x86_64": (
        _X86_64,
        bytes.fromhex(
            "b801000000"  # mov eax, 1 (write)
            "bf03000000"  # mov edi, 3
            "488d351c000000"  # lea rsi, [rip + 28]: the byte behind the code
            "ba01000000"  # mov edx, 1
            "0f05"  # syscall
            "b803000000"  # mov eax, 3 (close)
            "bf03000000"  # mov edi, 3
            "0f05"  # syscall
            "b822000000"  # mov eax, 34 (pause)
            "0f05"  # syscall
            "ebf7"  # jmp to the mov above
        )
        + b"x",
    ),
    "aarch64": (
        _AARCH64,
        struct.pack(
            "<14I",
            0xD2800808,  # mov x8, #64 (write)
            0xD2800060,  # mov x0, #3
            0x10000181,  # adr x1, 48 bytes on: the byte behind the code
            0xD2800022,  # mov x2, #1
            0xD4000001,  # svc #0
            0xD2800728,  # mov x8, #57 (close)
            0xD2800060,  # mov x0, #3
            0xD4000001,  # svc #0
            0xD2800928,  # mov x8, #73 (ppoll)
            0xD2800000,  # mov x0, #0: no descriptors
            0xD2800001,  # mov x1, #0
            0xD2800002,  # mov x2, #0: no end
            0xD4000001,  # svc #0
            0x17FFFFFB,  # b to the mov of ppoll's number
        )
        + b"x",
    ),
}
_SHELL = ("/bin/sh", "-c", "printf x >&3; exec 3>&-; exec sleep infinity")  # on machines there is no code for


def program(machine: str) -> bytes | None:
    """The anchor as an ELF file (elf(5)); None on a machine there is no code for."""
    if machine not in _CODE:
        return None
    number, code = _CODE[machine]
    size = _HEADERS + len(code)
    ident = b"\x7fELF" + bytes((2, 1, 1)) + bytes(9)  # 64 bits, little-endian
    header = struct.pack("<16sHHIQQQIHHHHHH", ident, 2, number, 1, _BASE + _HEADERS, 64, 0, 0, 64, 56, 1, 0, 0, 0)
    segment = struct.pack("<IIQQQQQQ", 1, 5, 0, _BASE, _BASE, size, size, 0x1000)  # PT_LOAD, read and execute
    return header + segment + code


def command() -> list[str]:
    """What bubblewrap is to run: the anchor through an inheritable descriptor of ours, which /proc inside gives a name."""
    image = program(os.uname().machine)
    if image is None:
        return list(_SHELL)
    fd = os.memfd_create("anchor", 0)
    os.write(fd, image)
    readable = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)  # what is open for writing cannot be run
    os.close(fd)
    os.set_inheritable(readable, True)
    return [f"/proc/self/fd/{readable}"]

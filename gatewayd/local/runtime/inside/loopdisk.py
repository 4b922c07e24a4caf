"""A sandbox's disk of a fixed size: an ext4 image on a loop device, in root's hands only.

The device clears itself with its last mount (LO_FLAGS_AUTOCLEAR), and the mount ends with the sandbox's mount namespace, so a
`kill -9` of everybody leaves nothing. The loop device keeps the very file description that was opened here, and with it the
flock(2) on it: whoever holds the lock knows that no device uses the image any more, and no image is ever mounted twice.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import time

from gatewayd.local.runtime.inside import kernel

IMAGE = "disk.img"  # in a box's folder
MOUNTPOINT = "disk"  # likewise; holds upper/ and work/ once the image is mounted
_LOOP_CTL_GET_FREE = 0x4C82
_LOOP_CONFIGURE = 0x4C0A
_AUTOCLEAR = 4  # LO_FLAGS_AUTOCLEAR
_FLAGS_OFFSET = 60  # info.lo_flags in struct loop_config
_CONFIG_SIZE = 304  # struct loop_config
_TRIES = 64  # others on this machine may take the device that was free
_OPTIONS = "discard,errors=remount-ro"  # what is deleted inside is given back to this machine's disk


def lock(path: str, deadline: float) -> int:
    """An open descriptor of the image, locked: closing it lets go.

    Raises:
        OSError: EBUSY when a loop device still has it at `deadline` (time.monotonic()).
    """
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() < deadline:
                time.sleep(0.005)
                continue
            os.close(fd)
            raise OSError(errno.EBUSY, "the sandbox's disk is still in use", "disk") from None
        return fd


def mount(owner: tuple[int, int], deadline: float) -> None:
    """Mount the image in the current folder on its mountpoint there, in this process's own mount namespace.

    Args:
        owner: uid and gid of root inside, who owns the sandbox's files.
    """
    image = lock(IMAGE, deadline)
    device = -1
    try:
        device, name = _attach(image)
        kernel.mount(name, MOUNTPOINT, "ext4", kernel.MS_NOSUID | kernel.MS_NODEV, _OPTIONS)
    finally:
        os.close(image)  # the device has its own reference, and with it the lock
        if device >= 0:
            os.close(device)
    for part in ("upper", "work"):
        path = f"{MOUNTPOINT}/{part}"
        try:
            os.mkdir(path, 0o755)  # noqa: PTH102 - pathlib is not worth its import here
        except FileExistsError:
            continue
        os.chown(path, *owner)


def _attach(image: int) -> tuple[int, str]:
    """Put the image on a free loop device; returns the open device and its path."""
    config = bytearray(_CONFIG_SIZE)
    struct.pack_into("=I", config, 0, image)
    struct.pack_into("=I", config, _FLAGS_OFFSET, _AUTOCLEAR)
    control = os.open("/dev/loop-control", os.O_RDWR | os.O_CLOEXEC)
    try:
        for _ in range(_TRIES):
            name = f"/dev/loop{fcntl.ioctl(control, _LOOP_CTL_GET_FREE)}"
            device = os.open(name, os.O_RDWR | os.O_CLOEXEC)
            try:
                fcntl.ioctl(device, _LOOP_CONFIGURE, bytes(config))
            except OSError as exc:
                os.close(device)
                if exc.errno != errno.EBUSY:
                    raise
            else:
                return device, name
    finally:
        os.close(control)
    raise OSError(errno.EBUSY, "no loop device is free", "disk")

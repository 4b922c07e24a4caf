"""What a systemd service needs: READY and STOPPING to the manager, and the sockets it hands over (sd_notify, sd_listen_fds)."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, MutableMapping

FIRST_FD = 3  # SD_LISTEN_FDS_START
FDS_MAX = 16


def notify(state: str, environ: Mapping[str, str]) -> bool:
    """Send `state` (as in "READY=1") to the service manager; whether there was one to tell. Never fails."""
    path = environ.get("NOTIFY_SOCKET", "")
    if not path or path[0] not in "/@":
        return False
    address = "\0" + path[1:] if path[0] == "@" else path
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
            sock.connect(address)
            sock.sendall(state.encode())
    except OSError:
        return False
    return True


def listen_sockets(environ: MutableMapping[str, str]) -> list[socket.socket]:
    """The listening Unix sockets handed over to this process; the variables that say so are removed from `environ`."""
    pid, count = environ.pop("LISTEN_PID", ""), environ.pop("LISTEN_FDS", "")
    environ.pop("LISTEN_FDNAMES", None)
    if pid != str(os.getpid()) or not count.isdigit():
        return []
    sockets = []
    for fd in range(FIRST_FD, FIRST_FD + min(int(count), FDS_MAX)):
        os.set_inheritable(fd, False)
        sock = socket.socket(fileno=fd)
        if sock.family == socket.AF_UNIX and sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            sockets.append(sock)
        else:
            sock.close()
    return sockets

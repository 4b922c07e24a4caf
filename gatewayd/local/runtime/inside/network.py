"""A sandbox's way out: every connection and every DNS query of it ends at sockets that the service listens on.

The network namespace has a loopback interface and nothing else. A local default route makes every address one of this namespace's
own, and rules in its packet filter lead what goes out to one address and port; what the service would not let out anyway is
refused at once. Routes and rules are made with the rights of the sandbox's user namespace before anything runs inside, and
nothing inside has the right to change them (`kernel.SANDBOX_CAPABILITIES`).
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import signal
import socket
import stat
import struct
import time
from pathlib import Path
from typing import NoReturn

from gatewayd.local.runtime.inside import idspace, kernel
from gatewayd.local.runtime.inside.packets import Answer, Request

GATE4, GATE6 = "198.18.0.1", "fdf9:7c3a:51e2::1"  # where the service listens, inside; also the nameserver
GATE_PORT = 65053  # above every range that programs are given ports from
_DEADLINE = 10.0  # seconds for the packet filter to be loaded
_MAX_COMPLAINT = 500  # bytes of it that are told
_IPV6_FREEBIND = 78  # linux/in6.h: bind to an address that no interface has
_BACKLOG = 512  # connections that wait to be accepted
_RESOLV_CONF = "/etc/resolv.conf"
_MAX_RESOLV_CONF = 1 << 16  # bytes of it that are read

_RTM_NEWROUTE, _NLM_F_REQUEST, _NLM_F_ACK, _NLM_F_CREATE = 24, 1, 4, 0x400  # linux/netlink.h, linux/rtnetlink.h
_RT_TABLE_MAIN, _RTPROT_BOOT, _RT_SCOPE_HOST, _RTN_LOCAL, _RTA_OIF = 254, 3, 254, 2, 4


def set_up(namespaces: tuple[int, int], nft: str, rules: str) -> str:
    """Make the way out in a child process that enters user and network namespace only; "" or why it could not be made.

    Args:
        namespaces: descriptors of the sandbox's user and network namespace.
        nft: path of the program, on this machine.
        rules: what it is to load.
    """
    report_r, report_w = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(report_r)
        _load(namespaces, nft, rules, report_w)
    os.close(report_w)
    complaint, deadline = b"", time.monotonic() + _DEADLINE
    ended = False
    while not ended and select.select([report_r], [], [], max(0.0, deadline - time.monotonic()))[0]:
        chunk = os.read(report_r, 4096)
        complaint, ended = (complaint + chunk)[:_MAX_COMPLAINT], not chunk
    os.close(report_r)
    if not ended:
        os.kill(pid, signal.SIGKILL)
    status = os.waitpid(pid, 0)[1]
    if status == 0:
        return ""
    return complaint.decode("utf-8", "replace").strip().partition("\n")[0] or "the packet filter could not be loaded"


def _load(namespaces: tuple[int, int], nft: str, rules: str, report: int) -> NoReturn:
    """The child's part: becomes `nft`."""
    try:
        for fd in namespaces:
            kernel.setns(fd)
        idspace.become_root()
        for family in (socket.AF_INET, socket.AF_INET6):
            try:
                _route_everything_here(family)
            except OSError as exc:
                if family == socket.AF_INET or exc.errno not in (errno.EOPNOTSUPP, errno.EAFNOSUPPORT, errno.EACCES):
                    raise  # without IPv6 on this machine there is nothing to route
        text = os.memfd_create("rules", 0)
        os.write(text, rules.encode())
        os.lseek(text, 0, os.SEEK_SET)
        os.dup2(text, 0)
        os.dup2(report, 2)
        null = os.open("/dev/null", os.O_WRONLY)
        os.dup2(null, 1)
        os.closerange(3, 1024)
        os.execve(nft, [nft, "-f", "-"], {})  # noqa: S606 - no shell
    except BaseException as exc:  # noqa: BLE001 - a forked child must not return into its parent's code
        with contextlib.suppress(OSError):
            os.write(report, f"{type(exc).__name__}: {exc}".encode()[:_MAX_COMPLAINT])
    os._exit(1)


def _route_everything_here(family: int) -> None:
    """`ip route add local default dev lo`. Raises OSError."""
    header = struct.pack("=BBBBBBBBI", family, 0, 0, 0, _RT_TABLE_MAIN, _RTPROT_BOOT, _RT_SCOPE_HOST, _RTN_LOCAL, 0)
    body = header + struct.pack("=HHI", 8, _RTA_OIF, socket.if_nametoindex("lo"))
    flags = _NLM_F_REQUEST | _NLM_F_ACK | _NLM_F_CREATE
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0) as netlink:
        netlink.send(struct.pack("=IHHII", 16 + len(body), _RTM_NEWROUTE, flags, 1, 0) + body)
        answer = netlink.recv(4096)
    (code,) = struct.unpack_from("=i", answer, 16)
    if code:
        raise OSError(-code, os.strerror(-code), "route")


class Gate:
    """Makes the sockets, for the agent."""

    def __init__(self, answer: Answer, problem: str | None) -> None:
        """`problem`: why there is no way out, "" when there is, None when none was asked for."""
        self._answer = answer
        self._problem = problem

    def open(self, request: Request) -> None:
        """One address family's listening TCP socket and its UDP socket. Raises OSError when there is no way out."""
        if self._problem is None or self._problem:
            raise OSError(errno.EOPNOTSUPP, "", self._problem or "")
        six = request["family"] == 6
        family, address = (socket.AF_INET6, GATE6) if six else (socket.AF_INET, GATE4)
        with socket.socket(family, socket.SOCK_STREAM) as tcp, socket.socket(family, socket.SOCK_DGRAM) as udp:
            for sock in (tcp, udp):
                if six:
                    sock.setsockopt(socket.IPPROTO_IPV6, _IPV6_FREEBIND, 1)
                sock.bind((address, GATE_PORT))
            tcp.listen(_BACKLOG)
            self._answer(request, {}, (tcp.fileno(), udp.fileno()))
        if not six:
            with contextlib.suppress(OSError):  # what a sandbox did to its own /etc is its own affair
                _name_the_nameserver()


def _name_the_nameserver() -> None:
    """Write /etc/resolv.conf where it names no server outside: queries to any address are led to the service."""
    path = Path(_RESOLV_CONF)
    if path.is_file():
        with path.open("rb") as file:
            words = [line.split() for line in file.read(_MAX_RESOLV_CONF).splitlines()]
        named = [line[1] for line in words if len(line) > 1 and line[0] == b"nameserver"]
        if any(not name.startswith((b"127.", b"::1")) for name in named):
            return
    if path.is_symlink() or (path.exists() and not stat.S_ISREG(path.lstat().st_mode)):
        path.unlink()  # to a resolver's own file, which is not here
    path.write_text(f"nameserver {GATE4}\n")
    path.chmod(0o644)

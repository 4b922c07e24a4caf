"""TCP ports inside a container that has no network but its own loopback.

As root, beside the daemon and with an ordinary runtime, a socket is made in the container's network namespace by a thread that
lives for that one call; its `connect` is then ours to wait for. Where that is not possible (a plain user, gVisor's own network
stack) a relay runs inside, by exec: it needs python3 in the image, and takes as long as a command to begin.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import signal
import socket
import threading
from collections.abc import Callable
from pathlib import Path

from gatewayd.local.runtime import docker_guest
from gatewayd.local.runtime.base import PortRefused, RuntimeFailure
from gatewayd.local.runtime.docker_exec import Execs
from gatewayd.local.runtime.docker_pump import Outlet, Pump
from gatewayd.local.runtime.docker_wire import STDOUT, Record, new_token
from gatewayd.local.runtime.inside import kernel
from gatewayd.tasks import TaskOwner

_DEADLINE = 5.0  # seconds for a port inside to accept
_RELAY_DEADLINE = 20.0  # seconds for the relay inside to start and connect
_LOOPBACKS = ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1"))


class Namespace:
    """A container's network namespace, held open."""

    def __init__(self, fd: int) -> None:
        self._fd = fd  # of /proc/PID/ns/net; -1 once closed

    @classmethod
    def open(cls, pid: int, container: str) -> Namespace | None:
        """That of a container's pid 1; None when it cannot be entered from here, or `pid` is none of this machine's."""
        with contextlib.suppress(OSError):
            fd = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
            namespace = cls(fd)
            try:
                if container in Path(f"/proc/{pid}/cgroup").read_text():
                    namespace.enter(lambda: None)  # is it permitted?
                    return namespace
            except OSError:
                pass
            namespace.close()
        return None

    def socket(self, family: int) -> socket.socket:
        """A non-blocking TCP socket that lives inside. Raises OSError."""
        made: list[socket.socket] = []
        self.enter(lambda: made.append(socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)))
        return made[0]

    def enter(self, work: Callable[[], object]) -> None:
        """Run `work` inside: in a thread of its own, for the way back out of a namespace is to end. Raises OSError."""
        failed: list[OSError] = []

        def enter() -> None:
            try:
                kernel.setns(self._fd)
                work()
            except OSError as exc:
                failed.append(exc)

        thread = threading.Thread(target=enter, name="netns", daemon=True)
        thread.start()
        thread.join()  # some 0.1 ms
        if failed:
            raise failed[0]

    def close(self) -> None:
        """Let the namespace go; idempotent."""
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)


async def connect_through_namespace(namespace: Namespace, port: int) -> socket.socket:
    """A connected socket. Raises PortRefused, OSError."""
    loop = asyncio.get_running_loop()
    reason = os.strerror(errno.ECONNREFUSED)
    for family, address in _LOOPBACKS:
        sock: socket.socket | None = None
        try:
            sock = namespace.socket(family)
            async with asyncio.timeout(_DEADLINE):
                await loop.sock_connect(sock, (address, port))
            return sock
        except TimeoutError:
            reason = os.strerror(errno.ETIMEDOUT)
        except OSError as exc:
            reason = exc.strerror or reason
        except BaseException:
            if sock is not None:
                sock.close()
            raise
        if sock is not None:
            sock.close()
    raise PortRefused(f"port {port}: {reason}")


async def connect_through_relay(execs: Execs, tasks: TaskOwner, port: int) -> socket.socket:
    """One end of a socket pair; a relay inside connects the other with the port. Raises PortRefused, RuntimeFailure."""
    token = new_token()
    argv = ["/usr/bin/env", "python3", "-I", "-S", "-c", docker_guest.RELAY, token, str(port)]
    _, sock, early = await execs.open(argv, user=None)
    pump = Pump(sock, early, token, framed=True)
    try:
        async with asyncio.timeout(_RELAY_DEADLINE):
            first = await pump.first()
        if not isinstance(first, Record):
            raise RuntimeFailure("cannot reach ports of this sandbox: its image has no python3 for the relay")
        kind, _, word = first.text.partition(" ")
        number = int(word) if word.isdecimal() else 0
        if kind != "open" or number < 2:
            raise PortRefused(f"port {port}: {os.strerror(number if number in errno.errorcode else errno.ECONNREFUSED)}")
    except TimeoutError:
        pump.close()
        raise PortRefused(f"port {port}: {os.strerror(errno.ETIMEDOUT)}") from None
    except BaseException:
        pump.close()
        raise
    return _bridge(execs, pump, tasks, number)


def _bridge(execs: Execs, pump: Pump, tasks: TaskOwner, relay: int) -> socket.socket:
    """Move bytes between the relay's connection and a socket pair, of which one end is returned. `relay` is its pid inside."""
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    theirs.setblocking(False)

    async def kill() -> None:
        with contextlib.suppress(OSError, RuntimeFailure):
            await execs.talk(docker_guest.SIGNAL, str(int(signal.SIGKILL)), str(relay))

    def half_close() -> None:
        with contextlib.suppress(OSError):
            ours.shutdown(socket.SHUT_WR)
        release()
        if outlet.broken:  # closed, not half-closed: that does not get through to the relay
            with contextlib.suppress(RuntimeError):  # the box is closing
                tasks.start(kill(), f"relay {relay} kill")

    outlet = Outlet(ours.fileno(), half_close)

    def on_record(_: int, record: Record) -> None:
        if record.text == "eof":
            outlet.end()

    inward = tasks.start(pump.inward(ours.fileno()), f"relay {relay} in")
    outward = tasks.start(pump.outward({STDOUT: outlet}, on_record), f"relay {relay} out")

    def release() -> None:
        if inward.done() and outward.done():
            pump.close()
            if outlet.closed:  # else bytes still wait for their reader
                ours.close()

    def outward_done(_: object) -> None:
        inward.cancel()  # the relay is gone: what is still written goes nowhere
        if outward.cancelled():
            outlet.close()
        release()

    inward.add_done_callback(lambda _: release())
    outward.add_done_callback(outward_done)
    return theirs

"""One running sandbox of the native runtime, seen from the service: its monitor, its agent, its processes and files."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import logging
import os
import signal
import socket
import stat
import struct
import sys
import termios
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from gatewayd.local.runtime.agentlink import AgentLink
from gatewayd.local.runtime.base import BoxSpec, PortRefused, RuntimeFailure, SpawnSpec
from gatewayd.local.runtime.inside import packets
from gatewayd.local.runtime.nativelistener import NativeListener, checked, checked_gates

log = logging.getLogger(__name__)

_BOOT_DEADLINE = 20.0  # seconds from fork to the agent's hello; the monitor itself gives up after 15
_THAW_DEADLINE = 5.0  # seconds for the processes inside to go on
_END_DEADLINE = 12.0  # seconds for the monitor to end everything and leave
_MONITOR = Path(__file__).parent / "inside" / "monitor.py"


class NativeProcess:
    """A process in a native box. See `base.Process`."""

    def __init__(self, link: AgentLink, pid: int, fds: list[int], exited: asyncio.Future[int], *, pty: bool) -> None:
        self._link = link  # the box's agent
        self._pty = pty  # one descriptor instead of three
        self.pid = pid
        self.exited = exited
        self.stdin = fds[0]
        self.stdout = fds[0] if pty else fds[1]
        self.stderr = None if pty else fds[2]
        for fd in fds:
            os.set_blocking(fd, False)

    async def signal(self, number: int) -> None:
        """Signal the whole process group; no error when it is already gone."""
        if not self.exited.done():
            with contextlib.suppress(RuntimeFailure):  # the sandbox has ended, and the process with it
                await self._link.request("signal", pid=self.pid, signal=number)

    async def resize(self, cols: int, rows: int) -> None:
        """Set the terminal's size; nothing without a pty."""
        if self._pty:
            with contextlib.suppress(OSError):  # closed by its owner meanwhile
                fcntl.ioctl(self.stdout, termios.TIOCSWINSZ, struct.pack("HHHH", rows & 0xFFFF, cols & 0xFFFF, 0, 0))


class NativeWriter:
    """A file being replaced in a native box. See `base.FileWriter`."""

    def __init__(self, link: AgentLink, handle: str, fd: int) -> None:
        self._link = link  # the box's agent
        self._handle = handle  # names the temporary file there
        self._open = True  # until commit or abort
        self.fd = fd

    def _close(self) -> bool:
        was_open, self._open = self._open, False
        if was_open:
            os.close(self.fd)
        return was_open

    async def commit(self) -> None:
        """Put the new content in place atomically and close. Raises OSError."""
        if self._close():
            await self._link.request("commit", handle=self._handle)

    async def abort(self) -> None:
        """Drop the new content and close; idempotent."""
        if self._close():
            with contextlib.suppress(OSError, RuntimeFailure):
                await self._link.request("abort", handle=self._handle)


class NativeBox:
    """One running sandbox. See `base.Box`."""

    def __init__(self, spec: BoxSpec, limits_note: str) -> None:
        self.spec = spec
        self.limits_note = limits_note
        self.gates: list[socket.socket] = []  # set by boot
        self.ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._monitor: asyncio.subprocess.Process | None = None  # set by boot
        self._lifeline, self._their_lifeline = socket.socketpair(
            socket.AF_UNIX, socket.SOCK_SEQPACKET
        )  # its end ends the sandbox
        self._link: AgentLink | None = None  # set by boot
        self._stopping = False  # set by the first stop()
        self.outer_pid = 0  # of bubblewrap, whose mount namespace has the sandbox's disk; set by boot

    async def boot(self, plan: dict[str, Any]) -> None:
        """Start monitor and agent.

        Raises:
            RuntimeFailure: it did not come up; everything is gone again.
        """
        channel, their_channel = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._lifeline.setblocking(False)
        channel.setblocking(False)
        with self._their_lifeline as lifeline, their_channel:
            plan = {**plan, "lifeline_fd": lifeline.fileno(), "channel_fd": their_channel.fileno()}
            self._monitor = await asyncio.create_subprocess_exec(
                *(sys.executable, "-I", "-S", str(_MONITOR)),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.DEVNULL,
                env={"PATH": os.defpath + ":/usr/sbin:/sbin"},
                pass_fds=(lifeline.fileno(), their_channel.fileno()),
                start_new_session=True,  # a Ctrl-C at the service's terminal is the service's to handle
            )
        self._link = AgentLink(channel, self._channel_lost)
        try:
            async with asyncio.timeout(_BOOT_DEADLINE):
                if (stdin := self._monitor.stdin) is not None:
                    stdin.write(json.dumps(plan).encode())
                    stdin.write_eof()
                report = await self._report()
                if "running" not in report:
                    raise RuntimeFailure(f"cannot start the sandbox: {report.get('failed', 'its monitor died')}")
                self.outer_pid = int(report["running"])
                await self._link.hello
                if plan["network"] is not None:
                    await self._open_gates(self._link)
        except TimeoutError:
            await self._abandon()
            raise RuntimeFailure(f"cannot start the sandbox: not ready within {_BOOT_DEADLINE:.0f} s") from None
        except BaseException:
            await asyncio.shield(self._abandon())
            raise

    async def _open_gates(self, link: AgentLink) -> None:
        """Take the sockets that lead out over; where there are none the sandbox stays without, and says so."""
        try:
            for family, kind in ((4, socket.AF_INET), (6, socket.AF_INET6)):
                try:
                    _, fds = await link.request("network", family=family)
                except OSError:
                    if family == 4:
                        raise
                    return  # no IPv6 on this machine
                self.gates += checked_gates(fds, kind)
        except OSError as exc:
            problem = "".join(char if char.isprintable() else " " for char in str(exc.filename or exc.strerror))[:200]
            log.warning("box %s: no network: %s", self.spec.id, problem)
            self.limits_note = "; ".join(filter(None, (self.limits_note, f"no network: {problem}")))

    async def _report(self) -> dict[str, Any]:
        """The monitor's next packet; {} when it is gone."""
        try:
            data = await asyncio.get_running_loop().sock_recv(self._lifeline, packets.MAX_PACKET)
            return dict(json.loads(data)) if data else {}
        except (OSError, ValueError):
            return {}

    async def _abandon(self) -> None:
        """Let go of everything and see the monitor off."""
        if self._link is not None:
            self._link.close()
        for gate in self.gates:
            gate.close()
        self.gates.clear()
        self._lifeline.close()
        if self._monitor is not None:
            try:
                async with asyncio.timeout(_END_DEADLINE):
                    await self._monitor.wait()
            except TimeoutError:
                log.warning("box %s: its monitor did not end within %.0f s, killing it", self.spec.id, _END_DEADLINE)
                with contextlib.suppress(ProcessLookupError):
                    self._monitor.kill()
                await self._monitor.wait()

    async def watch(self) -> None:
        """Runs beside the box: resolves `ended` when the monitor reports the end or dies."""
        report = await self._report()
        await self._abandon()
        if not self.ended.done():
            self.ended.set_result(str(report.get("ended", "its monitor died")))

    def _channel_lost(self, reason: str) -> None:
        if not self._stopping:
            log.warning("box %s: %s", self.spec.id, reason)
        self._let_go()

    def _let_go(self) -> None:
        """Tell the monitor to end the sandbox; its last report is still read by `watch`."""
        with contextlib.suppress(OSError):
            self._lifeline.shutdown(socket.SHUT_WR)

    def _agent(self) -> AgentLink:
        if self._link is None or self.ended.done():
            raise RuntimeFailure("the sandbox has ended")
        return self._link

    async def spawn(self, spec: SpawnSpec) -> NativeProcess:
        """Start a process. Raises OSError (as execve or chdir would, errno set) or RuntimeFailure."""
        link = self._agent()
        answer, fds = await link.request(
            "spawn",
            unwanted=lambda started: link.tell("signal", pid=started.get("pid"), signal=signal.SIGKILL),
            argv=list(spec.argv),
            env=dict(spec.env),
            cwd=spec.cwd,
            user=spec.user,
            pty=spec.pty,
            cols=spec.cols & 0xFFFF,
            rows=spec.rows & 0xFFFF,
        )
        kind, count = (stat.S_ISCHR, 1) if spec.pty else (stat.S_ISFIFO, 3)
        if "exited" not in answer or len(fds) != count or not all(kind(os.fstat(fd).st_mode) for fd in fds):
            packets.close_all(fds)
            raise RuntimeFailure("the sandbox's agent gave no process")
        return NativeProcess(link, answer["pid"], fds, answer["exited"], pty=spec.pty)

    async def connect(self, port: int) -> socket.socket:
        """A connected non-blocking TCP socket to a port on the sandbox's loopback. Raises PortRefused, RuntimeFailure."""
        try:
            _, fds = await self._agent().request("connect", port=port)
        except OSError as exc:
            raise PortRefused(f"port {port}: {exc.strerror}") from exc
        if len(fds) != 1 or not stat.S_ISSOCK(os.fstat(fds[0]).st_mode):
            packets.close_all(fds)
            raise RuntimeFailure("the sandbox's agent gave no connection")
        sock = socket.socket(fileno=fds[0])
        if sock.type != socket.SOCK_STREAM or sock.family not in (socket.AF_INET, socket.AF_INET6):
            sock.close()
            raise RuntimeFailure("the sandbox's agent gave no TCP connection")
        sock.setblocking(False)
        return sock

    async def open_read(self, path: str, user: str | None = None) -> tuple[int, os.stat_result]:
        """Open a regular file for reading; relative to the user's home. Raises OSError with errno."""
        _, fds = await self._agent().request("open_read", path=path, user=user)
        fd = self._one_file(fds)
        return fd, os.fstat(fd)

    async def open_write(self, path: str, user: str | None = None) -> NativeWriter:
        """Begin replacing a file, creating parent folders; relative to the user's home. Raises OSError with errno."""
        link = self._agent()
        answer, fds = await link.request("open_write", path=path, user=user)
        return NativeWriter(link, str(answer.get("handle")), self._one_file(fds))

    @staticmethod
    def _one_file(fds: list[int]) -> int:
        if len(fds) != 1 or not stat.S_ISREG(os.fstat(fds[0]).st_mode):
            packets.close_all(fds)
            raise RuntimeFailure("the sandbox's agent gave no file")
        os.set_blocking(fds[0], True)
        return fds[0]

    async def listen_unix(self, user: str | None, on_connection: Callable[[socket.socket], None]) -> NativeListener:
        """Listen on a Unix socket in a new folder, the user's alone. See `base.Box`. Raises OSError, RuntimeFailure."""
        link = self._agent()
        answer, fds = await link.request(
            "listen", unwanted=lambda made: link.tell("unlisten", handle=made.get("handle")), user=user
        )
        sock, path = checked(answer, fds)
        return NativeListener(link, str(answer.get("handle")), path, sock, on_connection)

    @contextlib.asynccontextmanager
    async def standing_still(self) -> AsyncIterator[list[str]]:
        """Every process inside stopped for the length of a block; gives the files that are written through memory.

        Raises:
            RuntimeFailure: the sandbox has ended, or its processes cannot be stopped.
        """
        link = self._agent()
        try:
            answer, fds = await link.request("freeze", unwanted=lambda _: link.tell("thaw"))
        except OSError as exc:
            raise RuntimeFailure(f"the sandbox's processes cannot be stopped: {exc.strerror}") from exc
        packets.close_all(fds)
        mapped = answer.get("mapped")
        try:
            yield [path for path in mapped if isinstance(path, str)] if isinstance(mapped, list) else []
        finally:
            if (thawed := link.tell("thaw")) is not None:
                await asyncio.wait({thawed}, timeout=_THAW_DEADLINE)

    async def stop(self, grace: float = 2.0) -> None:
        """SIGTERM to all, SIGKILL after `grace` seconds; returns when nothing of the box is left running. Idempotent."""
        if not self._stopping and not self.ended.done() and self._link is not None:
            self._stopping = True
            with contextlib.suppress(OSError, RuntimeFailure):
                await self._link.request("terminate", grace=grace)
        self._stopping = True
        self._let_go()
        await asyncio.shield(self.ended)

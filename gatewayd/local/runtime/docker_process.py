"""A process in a container, seen from the service.

Exec tells neither the process's id nor lets it be signalled: the script `docker_guest.SPAWN` says the one, and a second exec of
``kill`` does the other, so a signal takes as long as a command.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import shlex
import signal
import socket
from typing import Any

from gatewayd.local.runtime import docker_guest
from gatewayd.local.runtime.base import RuntimeFailure, SpawnSpec
from gatewayd.local.runtime.docker_exec import Execs, failure
from gatewayd.local.runtime.docker_pump import Outlet, Pump
from gatewayd.local.runtime.docker_wire import STDERR, STDOUT, Record, new_token
from gatewayd.tasks import TaskOwner

_KILLED = 128 + signal.SIGKILL
_START_DEADLINE = 30.0  # seconds from the exec's start to the process's id
_KILL_DEADLINE = 2.0  # seconds from SIGKILL to the exit record, which may be stuck behind output that nobody reads
_MAX_STRING = 128 * 1024 - 1  # bytes of one argument or variable: MAX_ARG_STRLEN of Linux
_MAX_STRINGS = 1024 * 1024  # bytes of all of them
_ARGUMENTS = "GATEWAYD_SPAWN"  # variable that holds the script's arguments
_DEFAULTS = ("HOME", "USER", "LOGNAME", "SHELL")  # taken from /etc/passwd inside when not given


class DockerProcess:
    """See `base.Process`. A terminal is one end of a socket pair here, not a pty."""

    def __init__(self, execs: Execs, exec_id: str, pump: Pump, tasks: TaskOwner, pid: int, *, pty: bool) -> None:
        self._execs = execs
        self._exec_id = exec_id
        self._pump = pump
        self._tasks = tasks  # the box's
        self._pty = pty
        self._codes: dict[int, int] = {}  # stream → exit code in its record
        self.pid = pid
        self.exited: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        if pty:
            ours, theirs = socket.socketpair()
            ours.setblocking(False)
            theirs.setblocking(False)
            self._source = os.dup(ours.fileno())  # what the caller writes
            self._outlets = {STDOUT: Outlet(ours.detach())}  # what the caller reads
            self.stdin = self.stdout = theirs.detach()
            self.stderr: int | None = None
        else:
            self._source, self.stdin = _pipe()
            self.stdout, out = _pipe()
            self.stderr, err = _pipe()
            self._outlets = {STDOUT: Outlet(out), STDERR: Outlet(err)}
        self._unflushed = set(self._outlets)  # streams whose output up to the exit is not yet with the reader
        self._input = tasks.start(self._inward(), f"exec {pid} in")
        self._input.add_done_callback(lambda _: os.close(self._source))
        tasks.start(self._outward(), f"exec {pid} out").add_done_callback(self._ended)

    async def _inward(self) -> None:
        await self._pump.inward(self._source)
        if self._pty and not self.exited.done():  # the terminal was closed: a kernel would hang up
            with contextlib.suppress(RuntimeFailure, OSError):
                await self.signal(signal.SIGHUP)

    async def _outward(self) -> None:
        await self._pump.outward(self._outlets, self._record)
        if not self.exited.done() and STDOUT not in self._codes:  # a terminal, or the script around the process was killed
            self._exit(await self._execs.exit_code(self._exec_id))

    def _ended(self, task: asyncio.Task[Any]) -> None:
        """The connection is at its end, or was given up with the sandbox."""
        self._input.cancel()
        self._input.add_done_callback(lambda _: self._pump.close())  # not while it may still wait for that descriptor
        if task.cancelled():
            for outlet in self._outlets.values():
                outlet.close()
            self.lost()

    def _record(self, stream: int, record: Record) -> None:
        kind, _, code = record.text.partition(" ")
        if kind == "exit" and code.isdecimal() and stream in self._unflushed and stream not in self._codes:
            self._codes[stream] = int(code) & 0xFF
            self._outlets[stream].mark(lambda: self._flushed(stream))
            if len(self._codes) == len(self._outlets):
                self._input.cancel()  # whoever still writes learns that nobody reads

    def _flushed(self, stream: int) -> None:
        self._unflushed.discard(stream)
        if not self._unflushed:
            self._exit(self._codes[STDOUT])

    def _exit(self, code: int) -> None:
        if not self.exited.done():
            self.exited.set_result(code)

    def lost(self) -> None:
        """The sandbox has ended, and the process with it."""
        self._exit(_KILLED)

    async def signal(self, number: int) -> None:
        """Signal the whole process group; no error when it is already gone."""
        if self.exited.done():
            return
        with contextlib.suppress(RuntimeFailure):  # the sandbox has ended, and the process with it
            await self._execs.talk(docker_guest.SIGNAL, str(int(number)), str(self.pid))
            if number == signal.SIGKILL and not self.exited.done():
                with contextlib.suppress(RuntimeError):  # the box is closing
                    self._tasks.start(self._surely_dead(), f"exec {self.pid} kill")

    async def _surely_dead(self) -> None:
        await asyncio.wait([self.exited], timeout=_KILL_DEADLINE)
        self._exit(_KILLED)

    async def resize(self, cols: int, rows: int) -> None:
        """Set the terminal's size; nothing without a pty."""
        if self._pty and not self.exited.done():
            with contextlib.suppress(RuntimeFailure):  # ended meanwhile
                await self._execs.resize(self._exec_id, cols, rows)


def _pipe() -> tuple[int, int]:
    read, write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    return read, write


def _check(spec: SpawnSpec) -> None:
    """Raise what execve would, for what Docker or the shell would garble."""
    strings = [*spec.argv, *(f"{name}={value}" for name, value in spec.env.items()), spec.cwd or "", spec.user or ""]
    if not spec.argv or any("\0" in text for text in strings):
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), "")
    try:
        sizes = [len(text.encode("utf-8")) for text in strings]
    except UnicodeEncodeError as exc:  # Docker's API is JSON: bytes that are no text cannot be told
        raise OSError(errno.EILSEQ, os.strerror(errno.EILSEQ), "") from exc
    if max(sizes) > _MAX_STRING or sum(sizes) > _MAX_STRINGS:
        raise RuntimeFailure(f"the request is too large for the sandbox: {sum(sizes)} bytes of arguments and environment")
    for name in spec.env:
        if not (name.isidentifier() and name.isascii()):  # a shell would drop it in silence
            raise RuntimeFailure("cannot pass an environment variable whose name is no shell identifier in a Docker sandbox")


async def spawn(execs: Execs, tasks: TaskOwner, spec: SpawnSpec) -> DockerProcess:
    """Start a process. Raises OSError (errno as execve's or chdir's) or RuntimeFailure."""
    _check(spec)
    env = {"PATH": docker_guest.PATH, "LANG": "C.UTF-8", **({"TERM": "xterm-256color"} if spec.pty else {}), **spec.env}
    token = new_token()
    defaults = " ".join(name for name in _DEFAULTS if name not in spec.env)
    size = f"{spec.cols & 0xFFFF} {spec.rows & 0xFFFF}" if spec.pty else ""
    account = docker_guest.account_name(spec.user)
    words = shlex.join([token, account, defaults, spec.cwd or "", size, *spec.argv])
    if len(words.encode()) + len(_ARGUMENTS) >= _MAX_STRING:
        raise RuntimeFailure(f"the request is too large for the sandbox: {len(words)} characters of arguments")
    exec_id, sock, early = await execs.open(docker_guest.SPAWN, user=spec.user, env={**env, _ARGUMENTS: words}, pty=spec.pty)
    pump = Pump(sock, early, token, framed=not spec.pty)
    try:
        async with asyncio.timeout(_START_DEADLINE):
            first = await pump.first()
            if not isinstance(first, Record):
                await execs.started(exec_id, spec.user, first)
                raise RuntimeFailure("the sandbox's shell cannot start a process")
    except TimeoutError:
        pump.close()
        raise RuntimeFailure(f"the sandbox did not start a process within {_START_DEADLINE:.0f} s") from None
    except BaseException:
        pump.close()
        raise
    kind, _, rest = first.text.partition(" ")
    if kind != "pid" or not rest.isdecimal() or not 1 < int(rest) < 1 << 31:
        pump.close()
        raise failure(rest) if kind == "error" else RuntimeFailure("the sandbox's shell cannot start a process")
    if spec.pty:
        pump.plain()
    return DockerProcess(execs, exec_id, pump, tasks, int(rest), pty=spec.pty)

"""The SSH front end in front of this machine: sessions are real processes here, forwards real sockets, no sandbox is needed."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import termios
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from gatewayd.errors import GatewayError, StreamClosed
from gatewayd.frontends.ssh import server
from gatewayd.frontends.ssh.hostkey import private_host_key, public_host_key
from gatewayd.frontends.ssh.target import Target, Ways
from gatewayd.relay import ByteStream, SocketStream
from gatewayd.sandbox.session import STDOUT, ExitStatus, ProcessSpec
from gatewayd.tasks import TaskOwner

PASS = Path(__file__).with_name("pass_socket.py")
OnStream = Callable[[ByteStream, str], Coroutine[Any, Any, None]]


class HostSession:
    """`gatewayd.sandbox.session.Session` over a process of this machine."""

    def __init__(self, spec: ProcessSpec) -> None:
        self.spec = spec  # what was asked for
        self._tasks = TaskOwner("host session")
        self.input_stopped: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()  # a test makes it fail
        self.closed = False  # aclose was called
        self._pty = spec.pty
        argv = list(spec.argv) or (["/bin/bash", "-c", spec.command] if spec.command else ["/bin/bash"])
        env = {**os.environ, **spec.env, **({"TERM": spec.term} if spec.term else {})}
        options: dict[str, Any] = {"env": {os.fsencode(name): os.fsencode(value) for name, value in env.items()}}
        argv_bytes = [os.fsencode(word) for word in argv]
        if spec.pty:
            outer, inner = os.openpty()
            fcntl.ioctl(inner, termios.TIOCSWINSZ, struct.pack("HHHH", spec.rows, spec.cols, spec.xpixel, spec.ypixel))
            take = "import fcntl,os,sys,termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execvp(sys.argv[1], sys.argv[1:])"
            options |= {"stdin": inner, "stdout": inner, "stderr": inner}
            self._process = subprocess.Popen([sys.executable, "-c", take, *argv_bytes], start_new_session=True, **options)
            os.close(inner)
            self._stdin, self._stdout, self._stderr = outer, os.dup(outer), -1
        else:
            ours, theirs = zip(*(os.pipe() if number else os.pipe()[::-1] for number in range(3)), strict=True)
            self._process = subprocess.Popen(
                argv_bytes, stdin=theirs[0], stdout=theirs[1], stderr=theirs[2], start_new_session=True, **options
            )
            for fd in theirs:
                os.close(fd)
            self._stdin, self._stdout, self._stderr = ours
            self._tasks.start(self._watch_input(), "input")
        for fd in (self._stdin, self._stdout, self._stderr):
            if fd >= 0:
                os.set_blocking(fd, False)
        self.pid = self._process.pid

    async def _ready(self, fd: int, *, write: bool) -> None:
        loop = asyncio.get_running_loop()
        ready = loop.create_future()
        (loop.add_writer if write else loop.add_reader)(fd, lambda: None if ready.done() else ready.set_result(None))
        try:
            await ready
        finally:
            (loop.remove_writer if write else loop.remove_reader)(fd)

    async def _watch_input(self) -> None:
        """A pipe's writing end becomes readable, with an error, when nobody holds its other end."""
        import select

        poll = select.epoll()
        poll.register(self._stdin, 0)
        try:
            await self._ready(poll.fileno(), write=False)
            self.input_stopped.set_result(None)
        finally:
            poll.close()

    async def read(self, stream: int = STDOUT, limit: int = 262144, /) -> bytes:
        while True:
            fd = self._stdout if stream == STDOUT else self._stderr
            if fd < 0:
                return b""
            try:
                return os.read(fd, limit)
            except BlockingIOError:
                await self._ready(fd, write=False)
            except OSError:  # a terminal whose last holder has left
                return b""

    async def write(self, data: bytes, /) -> None:
        view = memoryview(data)
        while view:
            if self._stdin < 0:
                raise StreamClosed("cannot write: the input has ended")
            try:
                view = view[os.write(self._stdin, view) :]
            except BlockingIOError:
                await self._ready(self._stdin, write=True)
            except OSError:
                return

    def write_eof(self) -> None:
        if self._pty:
            with contextlib.suppress(OSError):
                os.write(self._stdin, b"\x04")
        else:
            self._close("_stdin")

    def _close(self, name: str) -> None:
        fd = getattr(self, name)
        if fd >= 0:
            setattr(self, name, -1)
            os.close(fd)

    def resize(self, cols: int, rows: int, xpixel: int = 0, ypixel: int = 0, /) -> None:
        fcntl.ioctl(self._stdout, termios.TIOCSWINSZ, struct.pack("HHHH", rows, cols, xpixel, ypixel))

    def signal(self, name: str, /) -> None:
        number = getattr(signal, f"SIG{name}", None)
        if number is None:
            raise GatewayError(f"there is no signal {name}", kind="usage")
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, number)

    def stop_output(self, stream: int, /) -> None:
        self._close("_stdout" if stream == STDOUT else "_stderr")

    async def wait(self) -> ExitStatus:
        fd = os.pidfd_open(self.pid) if self._process.returncode is None else -1
        try:
            if fd >= 0:
                exited = self._tasks.start(self._ready(fd, write=False), "exit")
                await asyncio.wait([exited, self.lost], return_when=asyncio.FIRST_COMPLETED)
                if self.lost.done():
                    self.lost.result()
        finally:
            if fd >= 0:
                os.close(fd)
        code = self._process.wait()
        return ExitStatus(code) if code >= 0 else ExitStatus(None, signal.Signals(-code).name.removeprefix("SIG"))

    async def aclose(self) -> None:
        self.closed = True
        if self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGHUP)
                await asyncio.sleep(0.05)
                os.killpg(self.pid, signal.SIGKILL)
            self._process.wait()
        await self._tasks.aclose()
        for name in ("_stdin", "_stdout", "_stderr"):
            self._close(name)


class HostListener:
    """A listener on this machine."""

    def __init__(self, sock: socket.socket, on_stream: OnStream, path: str = "") -> None:
        self.port = sock.getsockname()[1] if sock.family == socket.AF_INET else 0
        self.path = path
        self.closed = False  # aclose was called
        self._sock = sock
        self._tasks = TaskOwner("host listener")
        sock.setblocking(False)
        self._tasks.start(self._accept(on_stream), "accept")

    async def _accept(self, on_stream: OnStream) -> None:
        while True:
            sock, _ = await asyncio.get_running_loop().sock_accept(self._sock)
            self._tasks.start(on_stream(SocketStream.from_socket(sock), "127.0.0.1:4321"), "stream")

    async def aclose(self) -> None:
        self.closed = True
        await self._tasks.aclose()
        self._sock.close()


@dataclass
class HostGuests:
    """The part of `gatewayd.sandbox.guest_client.Guests` that the front end uses."""

    unusable: GatewayError | None = None  # raised by ready
    sessions: list[HostSession] = field(default_factory=list)  # all there were
    started: asyncio.Queue[HostSession] = field(default_factory=asyncio.Queue)  # those that no test has taken yet
    listeners: list[HostListener] = field(default_factory=list)  # all there were, on ports
    directory: str = ""  # for sockets
    users: list[str] = field(default_factory=list)  # whose rights sockets were asked for with
    listening: asyncio.Queue[int] = field(default_factory=asyncio.Queue)  # ports that somebody wants to listen on
    answers: asyncio.Event = field(default_factory=asyncio.Event)  # set: such requests are answered

    def __post_init__(self) -> None:
        self.answers.set()

    async def ready(self, *_: object, wake: bool) -> None:
        if self.unusable is not None:
            raise self.unusable

    async def process(self, account: object, sandbox: str, spec: ProcessSpec, *, wake: bool) -> HostSession:
        session = HostSession(spec)
        self.sessions.append(session)
        self.started.put_nowait(session)
        return session

    async def sftp(self, account: object, sandbox: str, user: str, *, wake: bool) -> HostSession:
        return await self.process(account, sandbox, ProcessSpec(argv=("/usr/lib/openssh/sftp-server",)), wake=wake)

    async def connect_tcp(self, account: object, sandbox: str, host: str, port: int, *, wake: bool) -> SocketStream:
        return await dial(host, port)

    async def connect_unix(self, account: object, sandbox: str, path: str, user: str, *, wake: bool) -> SocketStream:
        self.users.append(user)
        sock = socket.socket(socket.AF_UNIX)
        try:
            sock.connect(path)
        except OSError as exc:
            sock.close()
            raise GatewayError(f"cannot connect to {path}: {exc.strerror}", kind="refused") from exc
        return SocketStream.from_socket(sock)

    async def listen_tcp(
        self, account: object, sandbox: str, host: str, port: int, user: str, on_stream: OnStream, *, wake: bool
    ) -> HostListener:
        self.users.append(user)
        self.listening.put_nowait(port)
        await self.answers.wait()
        try:
            self.listeners.append(HostListener(socket.create_server((host, port)), on_stream))
        except OSError as exc:
            raise GatewayError(f"cannot listen on {port}: {exc.strerror}", kind="failed") from exc
        return self.listeners[-1]

    async def listen_unix(
        self, account: object, sandbox: str, path: str, user: str, on_stream: OnStream, *, wake: bool
    ) -> HostListener:
        path = path or f"{self.directory}/agent"
        sock = socket.socket(socket.AF_UNIX)
        sock.bind(path)
        sock.listen()
        return HostListener(sock, on_stream, path)


async def dial(host: str, port: int) -> SocketStream:
    sock = socket.socket()
    sock.setblocking(False)
    try:
        await asyncio.get_running_loop().sock_connect(sock, (host, port))
    except OSError as exc:
        sock.close()
        raise GatewayError(f"cannot connect to port {port}: {exc.strerror}", kind="refused") from exc
    return SocketStream.from_socket(sock)


class HostPool:
    """The part of `gatewayd.sandbox.pool.Pool` that the front end uses."""

    async def dial(self, account: object, sandbox: str, port: int, notice: object = None, *, wake: bool = True) -> SocketStream:
        return await dial("127.0.0.1", port)


class Front:
    """Listens on a Unix socket whose connections are passed to ssh, as the helper does it."""

    def __init__(self, root: Path) -> None:
        self.guests = HostGuests(directory=str(root))
        self.root = root
        self.options = server.options(private_host_key(root))
        self._tasks = TaskOwner("front")
        self.ways = Ways(cast(Any, None), cast(Any, HostPool()), cast(Any, self.guests))
        self._sock = socket.socket(socket.AF_UNIX)
        self._sock.bind(str(root / "front.sock"))
        self._sock.listen(128)
        self._sock.setblocking(False)
        (root / "known_hosts").write_text(f"gatewayd {public_host_key(root)}\n")
        self.config = root / "config"
        self.config.write_text(
            f"Host box\n  User sandbox\n  ProxyCommand {sys.executable} -I -S {PASS} {root}/front.sock\n  ProxyUseFdpass yes\n"
            f"Host *\n  HostName 127.0.0.1\n  HostKeyAlias gatewayd\n  UserKnownHostsFile {root}/known_hosts\n"
            "  CheckHostIP no\n  StrictHostKeyChecking yes\n  LogLevel ERROR\n  IdentityAgent none\n"
        )
        self._tasks.start(self._accept(), "accept")

    async def _accept(self) -> None:
        while True:
            sock, _ = await asyncio.get_running_loop().sock_accept(self._sock)
            sock.setblocking(False)
            target = Target(self.ways, cast(Any, None), "box", "")
            self._tasks.start(server.serve(sock, self.options, server.LocalServer(target)), "connection")

    def dial(self) -> socket.socket:
        """A connection to it."""
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(str(self.root / "front.sock"))
        return sock

    async def run(self, *argv: str | Path, data: bytes | None = None, timeout: float = 30) -> tuple[int, bytes, bytes]:
        """Run a program of OpenSSH with the configuration; exit code, output, errors."""
        process = await asyncio.create_subprocess_exec(
            argv[0],
            "-F",
            str(self.config),
            *map(str, argv[1:]),
            stdin=asyncio.subprocess.PIPE if data is not None else asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        try:
            async with asyncio.timeout(timeout):
                out, err = await process.communicate(data)
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        assert process.returncode is not None
        return process.returncode, out, err

    async def stop(self) -> None:
        """As a daemon does that ends."""
        await self._tasks.aclose()

    async def aclose(self) -> None:
        await self.stop()
        self._sock.close()
        for session in self.guests.sessions:
            await session.aclose()


@contextlib.asynccontextmanager
async def running_front() -> AsyncIterator[Front]:
    with tempfile.TemporaryDirectory(prefix="gw-", dir="/tmp") as folder:
        front = Front(Path(folder))
        try:
            yield front
        finally:
            await front.aclose()

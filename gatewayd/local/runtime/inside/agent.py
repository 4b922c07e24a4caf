"""The agent: the service's hands inside one sandbox.

A single-threaded process in the sandbox's user, mount, pid, network, IPC and UTS namespaces and in its control groups. It starts
processes, connects to ports, opens files and listens on Unix sockets there, and passes the descriptors out. The sandbox's
processes cannot trace it or read its memory (it never calls execve after joining, so its memory belongs to the host's user
namespace, and it is not dumpable); were it taken over all the same, it holds nothing of the host but one socket to a service
that checks what comes through it.

Requests carry an ``id``, repeated in the answer ``{"id", "ok"}`` or ``{"id", "errno", "where"}``. Events have no id.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import resource
import select
import signal
import socket
import struct
import termios
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gatewayd.local.runtime.inside import accounts, kernel, packets
from gatewayd.local.runtime.inside.files import Files
from gatewayd.local.runtime.inside.freezer import Freezer
from gatewayd.local.runtime.inside.listeners import Listeners
from gatewayd.local.runtime.inside.network import Gate
from gatewayd.local.runtime.inside.packets import Request

_CONNECT_DEADLINE = 5.0  # seconds for a port inside to accept: beyond the time of a full backlog being drained
_MAX_CONNECTS = 1024  # connects under way at once
_TTY_GROUP = 5  # gid of /dev/pts/N on every Linux
_BASE_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_UNFROZEN = ("freeze", "thaw", "terminate")  # operations that are done while everything else waits
_LOOPBACKS = ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1"))


def run(channel: socket.socket, call_filter: bytes, max_pids: int, way_out: str | None) -> None:
    """Serve requests until the service closes the channel; never returns normally to the caller's code.

    Everything in the sandbox descends from this process, so what it cannot do, nothing can: capabilities, privileges gained by
    execve, and system calls are taken from it (`call_filter` as `kernel.filter_calls`; empty: none on this machine).
    `way_out` is for `network.Gate`.
    """
    os.setsid()
    null = os.open("/dev/null", os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    os.umask(0o022)
    os.chdir("/")
    kernel.keep_only(kernel.SANDBOX_CAPABILITIES)
    kernel.hide_from_tracers()
    kernel.gain_no_privileges()
    with contextlib.suppress(ValueError, OSError):  # a lower limit of this user's own stays
        resource.setrlimit(resource.RLIMIT_NPROC, (max_pids, max_pids))  # of each uid: all there is without control groups
    if call_filter:
        kernel.filter_calls(call_filter)
    status = 0
    try:
        Agent(channel, way_out).serve()
    except BaseException as exc:  # noqa: BLE001 - the last word of a process that has no stderr
        with contextlib.suppress(OSError, ValueError):
            packets.send(channel, {"event": "failed", "reason": f"{type(exc).__name__}: {exc}"[:500]})
        status = 1
    os._exit(status)


class Agent:
    """The request loop and what it keeps between requests."""

    def __init__(self, channel: socket.socket, way_out: str | None) -> None:
        self._channel = channel  # to the service; its end is our end
        self._poll = select.epoll()  # the channel, the SIGCHLD pipe, connects under way
        self._children: set[int] = set()  # started and not yet reaped
        self._connects: dict[int, tuple[socket.socket, Request, int, float]] = {}  # fd → socket, request, family index, deadline
        self._anchors = self._pids()  # what keeps the sandbox alive: never signalled by `terminate`
        self._freezer = Freezer()
        self._deferred: list[Request] = []  # came while everything was frozen
        files, listeners = Files(self._answer), Listeners(self._answer)
        self._operations: dict[str, Callable[[Request], None]] = {  # by the name in a request's ``op``
            "spawn": self._spawn,
            "signal": self._signal,
            "terminate": self._terminate,
            "connect": self._start_connect,
            "open_read": files.open_read,
            "open_write": files.open_write,
            "commit": files.commit,
            "abort": files.abort,
            "listen": listeners.listen,
            "unlisten": listeners.unlisten,
            "network": Gate(self._answer, way_out).open,
            "freeze": self._freeze,
            "thaw": self._thaw,
        }

    def serve(self) -> None:
        """Answer until end of file on the channel."""
        wake_r, wake_w = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        signal.set_wakeup_fd(wake_w, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        self._poll.register(self._channel.fileno(), select.EPOLLIN)
        self._poll.register(wake_r, select.EPOLLIN)
        _prepare_homes()
        self._send({"event": "hello"})
        while True:
            for fd, _ in self._poll.poll(1.0 if self._connects else -1):
                if fd == self._channel.fileno():
                    received = packets.receive(self._channel)
                    if received is None:
                        return
                    self._handle(received[0])
                elif fd == wake_r:
                    os.read(wake_r, 4096)
                    self._reap()
                elif fd in self._connects:
                    self._connect_ready(fd)
            self._expire_connects()

    def _send(self, message: dict[str, Any], fds: tuple[int, ...] = ()) -> None:
        packets.send(self._channel, message, fds)

    def _answer(self, request: Request, ok: dict[str, Any], fds: tuple[int, ...] = ()) -> None:
        self._send({"id": request["id"], "ok": ok}, fds)

    def _handle(self, request: Request) -> None:
        handler = self._operations.get(str(request.get("op")))
        if handler is None:
            self._send({"id": request.get("id"), "errno": errno.ENOSYS, "where": str(request.get("op"))})
            return
        if self._freezer.frozen and request["op"] not in _UNFROZEN:
            self._deferred.append(request)
            return
        try:
            handler(request)
        except OSError as exc:
            self._send({"id": request["id"], "errno": exc.errno or errno.EIO, "where": str(exc.filename or "")[:200]})
        except (ValueError, LookupError) as exc:  # an unknown account, a NUL in a name
            self._send({"id": request["id"], "errno": errno.EINVAL, "where": str(exc)[:200]})

    # Processes

    def _spawn(self, request: Request) -> None:
        account = accounts.resolve(request["user"])
        ours: list[int] = []  # go to the service
        theirs: list[int] = []  # become the child's 0, 1, 2
        try:
            if request["pty"]:
                master, slave = os.openpty()
                ours, theirs = [master], [slave]
                os.fchown(slave, account.uid, _TTY_GROUP)
                os.fchmod(slave, 0o620)
                fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", request["rows"], request["cols"], 0, 0))
            else:
                in_r, in_w = os.pipe()
                ours, theirs = [in_w], [in_r]
                for _ in range(2):
                    out_r, out_w = os.pipe()
                    ours.append(out_r)
                    theirs.append(out_w)
            pid = self._fork_exec(request, account, theirs)
            try:
                self._answer(request, {"pid": pid}, tuple(ours))
            except OSError:  # too many descriptors on their way (ETOOMANYREFS): the service never hears of this process
                os.killpg(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                raise
            self._children.add(pid)
        finally:
            packets.close_all(ours + theirs)

    def _fork_exec(self, request: Request, account: accounts.Account, stdio: list[int]) -> int:
        """Fork and exec; the child reports a failed step through a close-on-exec pipe as ``errno where``."""
        report_r, report_w = os.pipe2(os.O_CLOEXEC)
        try:
            pid = os.fork()
        except OSError:  # no process more: what the pipe took must not be lost each time
            packets.close_all([report_r, report_w])
            raise
        if pid == 0:
            try:
                self._become(request, account, stdio)
            except BaseException as exc:  # noqa: BLE001 - a forked child must not return into its parent's code
                code = (exc.errno or errno.EIO) if isinstance(exc, OSError) else errno.EINVAL
                place = exc.filename if isinstance(exc, OSError) and exc.filename else exc
                os.write(report_w, f"{code} {place}"[:1000].encode("utf-8", "replace"))
            os._exit(127)
        os.close(report_w)
        with open(report_r, "rb") as report:  # noqa: PTH123 - a descriptor, not a path
            failed = report.read()
        if failed:
            os.waitpid(pid, 0)
            number, _, where = failed.decode("utf-8", "replace").partition(" ")
            raise OSError(int(number), os.strerror(int(number)), where)
        return pid

    def _become(self, request: Request, account: accounts.Account, stdio: list[int]) -> None:
        """In the child: own session, descriptors, user, folder, then the program."""
        self._channel.close()  # from here on nothing of the host's is left to take
        self._poll.close()
        _be_ordinary()
        os.setsid()
        for target in (0, 1, 2):
            os.dup2(stdio[min(target, len(stdio) - 1)], target)
        if request["pty"]:
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGPIPE, signal.SIGXFSZ, signal.SIGCHLD, signal.SIGINT):  # Python ignores or handles these
            signal.signal(number, signal.SIG_DFL)
        _become_user(account)
        env = {
            "PATH": _BASE_PATH,
            "HOME": account.home,
            "USER": account.name,
            "LOGNAME": account.name,
            "SHELL": account.shell,
            "LANG": "C.UTF-8",
        }
        if request["pty"]:
            env["TERM"] = "xterm-256color"
        env.update(request["env"])
        cwd = request["cwd"]
        try:
            os.chdir(account.home if cwd is None else os.path.join(account.home, cwd))  # noqa: PTH118 - may be relative
        except OSError:
            if cwd is not None:
                raise
            os.chdir("/")  # a home that was removed must not make the sandbox unusable
        env["PWD"] = os.getcwd()  # noqa: PTH109
        _exec(request["argv"], env)

    def _signal(self, request: Request) -> None:
        pid = request["pid"]
        if pid in self._children:  # not reaped yet, so the number cannot belong to anyone else
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, request["signal"])
        self._answer(request, {})

    def _reap(self) -> None:
        for pid in list(self._children):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                self._children.discard(pid)
                code = os.waitstatus_to_exitcode(status)
                self._send({"event": "exit", "pid": pid, "code": code if code >= 0 else 128 - code})

    @staticmethod
    def _pids() -> set[int]:
        return {int(name) for name in os.listdir("/proc") if name.isdigit()}  # noqa: PTH208 - names only

    def _terminate(self, request: Request) -> None:
        """SIGTERM to every process but the sandbox's own frame; answers when they are gone or after `grace` seconds."""
        self._freezer.thaw()
        others = self._pids() - self._anchors - {os.getpid()}
        for pid in others:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
                os.kill(pid, signal.SIGCONT)  # a stopped process would not see it
        deadline = time.monotonic() + request["grace"]
        while others and time.monotonic() < deadline:
            time.sleep(0.01)
            self._reap()
            others &= self._pids()
        self._answer(request, {"left": len(others)})

    def _freeze(self, request: Request) -> None:
        """Stop every process for a moment; what is asked for meanwhile is done afterwards."""
        self._answer(request, self._freezer.freeze())

    def _thaw(self, request: Request) -> None:
        self._freezer.thaw()
        self._answer(request, {})
        deferred, self._deferred = self._deferred, []
        for late in deferred:
            self._handle(late)

    # Ports

    def _start_connect(self, request: Request) -> None:
        if len(self._connects) >= _MAX_CONNECTS:
            raise OSError(errno.EAGAIN, "too many connects under way")
        self._connect(request, 0, time.monotonic() + _CONNECT_DEADLINE)

    def _connect(self, request: Request, family: int, deadline: float) -> None:
        """Try the loopback addresses in turn from number `family` on."""
        error = errno.ECONNREFUSED
        for index in range(family, len(_LOOPBACKS)):
            kind, address = _LOOPBACKS[index]
            try:
                sock = socket.socket(kind, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
            except OSError:
                continue  # no IPv6 here
            error = sock.connect_ex((address, request["port"]))
            if error == 0:
                self._connected(sock, request)
                return
            if error == errno.EINPROGRESS:
                self._connects[sock.fileno()] = (sock, request, index, deadline)
                self._poll.register(sock.fileno(), select.EPOLLOUT)
                return
            sock.close()
        self._send({"id": request["id"], "errno": error, "where": ""})

    def _connected(self, sock: socket.socket, request: Request) -> None:
        with sock:
            try:
                self._answer(request, {}, (sock.fileno(),))
            except OSError as exc:  # too many descriptors on their way (ETOOMANYREFS); or the channel, which the next line finds
                self._send({"id": request["id"], "errno": exc.errno or errno.EIO, "where": ""})

    def _connect_ready(self, fd: int) -> None:
        sock, request, index, deadline = self._forget_connect(fd)
        if sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0:
            self._connected(sock, request)
        else:
            sock.close()
            self._connect(request, index + 1, deadline)

    def _forget_connect(self, fd: int) -> tuple[socket.socket, Request, int, float]:
        self._poll.unregister(fd)
        return self._connects.pop(fd)

    def _expire_connects(self) -> None:
        now = time.monotonic()
        for fd in [fd for fd, entry in self._connects.items() if entry[3] < now]:
            sock, request, _, _ = self._forget_connect(fd)
            sock.close()
            self._send({"id": request["id"], "errno": errno.ETIMEDOUT, "where": ""})


def _be_ordinary() -> None:
    """Undo the protection that the monitor gave the agent from the out-of-memory killer."""
    kernel.hide_from_tracers(hidden=False)  # /proc/self belongs to us only when dumpable
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("0")


def _exec(argv: list[str], env: dict[str, str]) -> None:
    """execve along PATH, with the errno of the most telling failure, as execvp(3) does."""
    name = argv[0]
    folders = [""] if "/" in name else env.get("PATH", _BASE_PATH).split(":")
    failure = OSError(errno.ENOENT, os.strerror(errno.ENOENT), name)
    for folder in folders:
        try:
            os.execve(os.path.join(folder, name), argv, env)  # noqa: PTH118, S606
        except (FileNotFoundError, NotADirectoryError):
            continue
        except PermissionError as exc:
            failure = exc
        except OSError as exc:
            failure = exc
            break
    raise OSError(failure.errno, os.strerror(failure.errno or 0), name)


def _become_user(account: accounts.Account) -> None:
    with contextlib.suppress(PermissionError):  # refused where only one id is mapped; nothing to drop there either
        os.setgroups(account.groups)
    os.setresgid(account.gid, account.gid, account.gid)
    os.setresuid(account.uid, account.uid, account.uid)


def _prepare_homes() -> None:
    """Give every account of the default snapshot its home: only from inside can other users' files be made."""
    for account in accounts.everyone():
        home = Path(account.home)
        if account.uid >= accounts.FIRST_HUMAN and account.home.startswith("/home/") and not home.exists():
            try:
                home.mkdir(mode=0o700, parents=True)
                os.chown(home, account.uid, account.gid)
            except OSError:
                continue  # an id that is not mapped here

"""The ProxyCommand of ssh: hands ssh a connected descriptor (``ProxyUseFdpass yes``), or copies bytes where it cannot.

One self-contained file, because ssh runs it as ``python -I -S …/client/proxy.py NAME``: with ``-S`` there is no site-packages, so
nothing of this project can be imported. The path and credential rules of `gatewayd.api` are therefore repeated here; a test holds
both equal. What a client needs in order to reach the daemon (dialling, starting it, reading its reply) lives here once, and the
rest of the command imports it from here.

`_socket` is the C half of `socket`; the Python half doubles the start-up time of this program (9 ms against 18 ms).
"""
# pathlib and subprocess would be most of this program's start-up time:
# ruff: noqa: PTH100, PTH103, PTH111, PTH112, PTH116, PTH117, PTH118, PTH120, PTH208
# contextlib is not worth its import here either:
# ruff: noqa: SIM105

import _socket
import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

LINE_MAX = 65536  # bytes of a reply line, newline included
CHUNK = 262144  # bytes per read when copying
CONNECT_DEADLINE = 10.0  # seconds for the daemon to accept a connection
REPLY_DEADLINE = 180.0  # seconds for an answer: a stopped sandbox may have to start first
START_DEADLINE = 20.0  # seconds for the daemon to come up
ALREADY_RUNS = 73  # exit code of a daemon that found another one running (EX_CANTCREAT)
BAD_CONFIG = 78  # exit code of a daemon that cannot use its configuration (EX_CONFIG)
PREFIX = "sandbox-"  # of the host name that the user gave to ssh; the sandbox's name follows
USAGE = "usage: sandbox proxy [--direct] [--no-start] [--profile PROFILE] [sandbox-]NAME"


class Failure(Exception):
    """Something the user is told.

    Attributes:
        kind: one of `gatewayd.api.ErrorKind`; decides the exit code.
        message: one sentence.
        hint: what to do next, or "".
    """

    def __init__(self, kind: str, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.kind = kind
        self.message = message
        self.hint = hint


# --- where the daemon is, and who asks (the rules of gatewayd.api) ---------------------------------------


def _own_dir(path: str) -> bool:
    if not os.path.isabs(path):
        return False
    try:
        return os.stat(path).st_uid == os.getuid() and os.path.isdir(path)
    except OSError:
        return False


def state_dir() -> str:
    """`gatewayd.api.state_dir`."""
    env = os.environ
    if own := env.get("GATEWAYD_STATE_DIR"):
        return os.path.abspath(own)
    xdg = env.get("XDG_STATE_HOME", "")
    if not os.path.isabs(xdg):
        xdg = os.path.join(env.get("HOME") or os.path.expanduser("~"), ".local", "state")
    return os.path.join(xdg, "gatewayd")


def runtime_dir() -> str:
    """`gatewayd.api.runtime_dir`."""
    env = os.environ
    if own := env.get("GATEWAYD_RUNTIME_DIR"):
        return os.path.abspath(own)
    for parent in (env.get("XDG_RUNTIME_DIR", ""), f"/run/user/{os.getuid()}"):
        if _own_dir(parent):
            return os.path.join(parent, "gatewayd")
    return os.path.join(state_dir(), "run")


def caller_fields(profile: str = "") -> dict[str, str]:
    """`gatewayd.api.caller_fields`."""
    env = os.environ
    name = profile or env.get("GATEWAYD_PROFILE") or ""
    fields = {"profile": name} if name else {}
    key = env.get("LANGSMITH_API_KEY", "").strip()
    if key and name in ("", "env"):
        fields["api_key"] = key
        for field, variable in (("endpoint", "LANGSMITH_ENDPOINT"), ("workspace", "LANGSMITH_WORKSPACE_ID")):
            if value := env.get(variable, "").strip():
                fields[field] = value
    return fields


def is_name(text: str) -> bool:
    """Whether `text` can name a sandbox: a DNS label (RFC 1123), lower case."""
    inner = text.replace("-", "a")
    return (
        0 < len(text) <= 63
        and inner.isascii()
        and inner.isalnum()
        and inner == inner.lower()
        and text[0] != "-"
        and text[-1] != "-"
    )


# --- reaching the daemon ---------------------------------------------------------------------------------


def connect(path: str) -> _socket.socket:
    """A connection to a socket of the daemon, in blocking mode.

    Raises:
        FileNotFoundError, ConnectionRefusedError: no daemon runs.
        Failure: ``config`` for a socket that is not ours to use, ``unavailable`` for one that does not answer.
    """
    sock = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
    try:
        sock.settimeout(CONNECT_DEADLINE)
        sock.connect(path)
        sock.settimeout(None)
        # struct ucred: pid, uid, gid. Keys travel over this connection, so nobody else may be at the other end.
        cred = sock.getsockopt(_socket.SOL_SOCKET, _socket.SO_PEERCRED, 12)
        uid = int.from_bytes(cred[4:8], sys.byteorder)
        if uid not in (os.getuid(), 0):
            raise Failure("config", f"cannot use {path}: it belongs to a process of user {uid}")
    except (FileNotFoundError, ConnectionRefusedError):
        sock.close()
        raise
    except TimeoutError:
        sock.close()
        raise Failure("unavailable", f"cannot reach the daemon at {path}: it does not answer") from None
    except OSError as exc:
        sock.close()
        raise Failure("config", f"cannot use {path}: {exc.strerror or exc}") from exc
    except Failure:
        sock.close()
        raise
    return sock


def dial(socket_name: str) -> _socket.socket:
    """A connection to ``control.sock`` or ``connect.sock``; starts the daemon if it does not run.

    Raises:
        Failure: ``config`` or ``unavailable``, with the end of the daemon's log if it would not start.
    """
    path = os.path.join(runtime_dir(), socket_name)
    try:
        return connect(path)
    except (FileNotFoundError, ConnectionRefusedError):
        return start(path)


def start(path: str) -> _socket.socket:
    """Start the daemon unless somebody else does, and wait until it accepts a connection on `path`.

    Raises:
        Failure: as for `dial`.
    """
    import time

    runtime = os.path.dirname(path)
    try:
        os.makedirs(runtime, 0o700, exist_ok=True)
        info = os.stat(runtime)
        if info.st_uid != os.getuid() or info.st_mode & 0o077:
            raise Failure("config", f"cannot use {runtime}: it must belong to you alone", f"chmod 700 {runtime}")
        lock = os.open(os.path.join(runtime, "start.lock"), os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as exc:
        raise Failure("config", f"cannot use {runtime}: {exc.strerror or exc}") from exc
    deadline = time.monotonic() + START_DEADLINE
    locked = False
    child: tuple[int, str, int] | None = None  # the daemon we started: pid, log, size of the log before
    try:
        while True:
            locked = locked or _try_lock(lock)
            try:
                return connect(path)
            except (FileNotFoundError, ConnectionRefusedError):
                pass
            if locked and child is None:
                child = _spawn()
            elif child is not None and _ended(*child):
                child = None  # another daemon is just ending and still holds its lock: once more
                time.sleep(0.1)
            if time.monotonic() > deadline:
                tail = _tail(*child[1:]) if child else ""
                raise Failure("unavailable", f"cannot start the daemon: no answer at {path} within {START_DEADLINE:.0f} s{tail}")
            time.sleep(0.01)
    finally:
        os.close(lock)


def _try_lock(fd: int) -> bool:
    import fcntl

    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _ended(pid: int, log: str, size: int) -> bool:
    """Whether the daemon we started gave way to another one.

    Raises:
        Failure: it ended for another reason.
    """
    ended, status = os.waitpid(pid, os.WNOHANG)
    if not ended:
        return False
    code = os.waitstatus_to_exitcode(status)
    if code == ALREADY_RUNS:
        return True
    kind = "config" if code == BAD_CONFIG else "unavailable"
    raise Failure(kind, f"cannot start the daemon: it ended with status {code}{_tail(log, size)}", f"its log is {log}")


def _spawn() -> tuple[int, str, int]:
    """Start ``gatewayd`` in a session of its own; returns its pid, its log and the log's size before."""
    state = state_dir()
    log = os.path.join(state, "daemon.log")
    try:
        os.makedirs(state, 0o700, exist_ok=True)
        out = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    except OSError as exc:
        raise Failure("config", f"cannot write {log}: {exc.strerror or exc}") from exc
    size = os.fstat(out).st_size
    for name in os.listdir("/proc/self/fd"):  # what our caller let us inherit (a lock, a pipe) is not the daemon's to keep
        try:
            if int(name) > 2:
                os.set_inheritable(int(name), False)
        except OSError:
            pass  # the descriptor of this very listing
    null = os.open("/dev/null", os.O_RDONLY)
    try:
        # -P: a module in the current directory must not become part of the daemon.
        argv = [sys.executable, "-P", "-m", "gatewayd"]
        actions = [(os.POSIX_SPAWN_DUP2, null, 0), (os.POSIX_SPAWN_DUP2, out, 1), (os.POSIX_SPAWN_DUP2, out, 2)]
        pid = os.posix_spawn(sys.executable, argv, os.environ, file_actions=actions, setsid=True)
    except OSError as exc:
        raise Failure("unavailable", f"cannot start the daemon: {sys.executable}: {exc.strerror or exc}") from exc
    finally:
        os.close(out)
        os.close(null)
    return pid, log, size


def _tail(log: str, size: int, lines: int = 10) -> str:
    """The last lines that were added to `log` since it had `size` bytes, each on a line of its own."""
    try:
        fd = os.open(log, os.O_RDONLY)
    except OSError:
        return ""
    try:
        end = os.fstat(fd).st_size
        data = os.pread(fd, 8192, max(size, end - 8192))
    finally:
        os.close(fd)
    return "".join(f"\n  {printable(line)}" for line in data.decode(errors="replace").splitlines()[-lines:])


def read_line(sock: _socket.socket) -> bytes:
    """One line of the daemon's reply, and not a byte further: what follows belongs to the stream.

    Raises:
        Failure: ``unavailable`` when the connection ends or stays silent, ``internal`` for an overlong line.
    """
    line = b""
    while len(line) <= LINE_MAX:
        try:
            seen = sock.recv(LINE_MAX, _socket.MSG_PEEK)
            end = seen.find(b"\n") + 1
            line += sock.recv(end or len(seen))
        except TimeoutError:
            raise Failure("timeout", f"the daemon gave no answer within {REPLY_DEADLINE:.0f} s") from None
        except OSError as exc:
            raise Failure("unavailable", f"the connection to the daemon broke: {exc.strerror or exc}") from exc
        if not seen:
            raise Failure("unavailable", "the daemon closed the connection without an answer")
        if end:
            return line
    raise Failure("internal", f"the daemon's answer is longer than {LINE_MAX} bytes")


def printable(text: str) -> str:
    """`text` without what could act on a terminal."""
    return "".join(char if char.isprintable() else " " for char in text)


def say(text: str) -> None:
    """One message on standard error; a standard error nobody reads is no reason to fail."""
    try:
        os.write(2, f"{text}\n".encode(errors="replace"))
    except OSError:
        pass


# --- the stream ------------------------------------------------------------------------------------------


def bridge(sock: _socket.socket, source: int = 0, sink: int = 1) -> bool:
    """Copy `source` → `sock` and `sock` → `sink` until both have ended; EOF in one direction ends only that direction.

    Blocking reads and writes on two threads: each direction has its own back-pressure, and the flags of descriptors that are
    shared with other programs stay as they are. Returns False when `sink` broke: nobody reads any more.
    """
    import _thread

    done = _thread.allocate_lock()
    done.acquire()
    _thread.start_new_thread(_upstream, (sock, source, done.release))
    while True:
        try:
            data = sock.recv(CHUNK)
        except OSError:
            return True  # reset: both directions are gone
        if not data:
            break
        try:
            _write_all(sink, data)
        except OSError:
            return False
    try:
        os.close(sink)  # passes the EOF on; the other direction may go on for long
    except OSError:
        return False
    done.acquire()
    return True


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def _upstream(sock: _socket.socket, source: int, done: "Callable[[], None]") -> None:
    """Copy `source` → `sock`, then shut down the sending half. Ends early when the daemon has closed the connection."""
    import select

    poll = select.poll()
    poll.register(sock.fileno(), 0)  # reports POLLHUP: both halves are closed
    try:
        poll.register(source, select.POLLIN)
        while True:
            ready = dict(poll.poll())
            if sock.fileno() in ready:
                break
            data = os.read(source, CHUNK)
            if not data:
                break
            sock.sendall(data)
    except OSError:
        pass  # a source that cannot be read has ended, a socket that takes no more too
    try:
        sock.shutdown(_socket.SHUT_WR)
    except OSError:
        pass
    done()


def pass_descriptor(sock: _socket.socket, over: int = 1) -> None:
    """Send `sock` itself over the Unix socket `over`, with the one byte that OpenSSH expects.

    Raises:
        OSError: nobody receives it.
    """
    channel = _socket.socket(fileno=over)
    try:
        channel.sendmsg([b"\0"], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, sock.fileno().to_bytes(4, sys.byteorder))])
    finally:
        channel.detach()


def is_unix_socket(fd: int) -> bool:
    """Whether a descriptor could be passed over `fd`."""
    try:
        probe = _socket.socket(fileno=fd)
    except OSError:
        return False
    try:
        return probe.family == _socket.AF_UNIX
    finally:
        probe.detach()


def request_line(fields: "Mapping[str, str | bool]") -> bytes:
    """A connect.sock request of text and bool fields. By hand: importing json costs as much as the interpreter's own start."""

    def quote(value: "str | bool") -> str:
        if isinstance(value, bool):
            return "true" if value else "false"
        return '"' + "".join(c if " " <= c <= "~" and c not in '"\\' else _escape(c) for c in value) + '"'

    return ("{" + ",".join(f"{quote(key)}:{quote(value)}" for key, value in fields.items()) + "}\n").encode()


def _escape(char: str) -> str:
    units = char.encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{units[i]:02x}{units[i + 1]:02x}" for i in range(0, len(units), 2))


def open_ssh(host: str, profile: str = "", *, direct: bool = False, start_box: bool = True) -> _socket.socket:
    """The connection to the ssh server of sandbox `host` (its name, or the name ssh knows it by), ready for ssh's first byte.

    Args:
        direct: the sandbox's own sshd instead of the gateway.
        start_box: whether a stopped sandbox may be started, if the configuration does not forbid it.

    Raises:
        Failure: as the daemon tells it, or as for `dial`.
    """
    name = host[len(PREFIX) :] if host.startswith(PREFIX) else host
    if not is_name(name):
        raise Failure("usage", f"{printable(host)!r} is not a sandbox name")
    fields: dict[str, str | bool] = {"op": "ssh", "sandbox": name, **caller_fields(profile)}
    if direct:
        fields["direct"] = True
    if not start_box:
        fields["wake"] = False
    sock = dial("connect.sock")
    try:
        sock.settimeout(REPLY_DEADLINE)
        try:
            sock.sendall(request_line(fields))
        except OSError as exc:
            raise Failure("unavailable", f"the connection to the daemon broke: {exc.strerror or exc}") from exc
        while not (line := read_line(sock)).startswith(b'{"ok"'):
            _other_reply(line)
        sock.settimeout(None)
    except BaseException:
        sock.close()
        raise
    return sock


def _other_reply(line: bytes) -> None:
    """Show a notice, raise an error."""
    import json

    try:
        reply = json.loads(line)
        if "notice" in reply:
            say(f"sandbox: {printable(str(reply['notice']))}")
            return
        error = reply["error"]
        raise Failure(str(error["kind"]), printable(str(error["message"])), printable(str(error.get("hint") or "")))
    except (ValueError, TypeError, LookupError, AttributeError):
        raise Failure("internal", "the daemon's answer makes no sense") from None


def main(argv: list[str]) -> int:
    """Connect standard output (a Unix socket: by passing the descriptor) or both standard streams to the sandbox's ssh server."""
    profile, direct, start_box = "", False, True
    while len(argv) > 1:
        if argv[0] == "--profile":
            profile, argv = argv[1], argv[2:]
        elif argv[0] in ("--direct", "--no-start"):
            direct, start_box = direct or argv[0] == "--direct", start_box and argv[0] != "--no-start"
            argv = argv[1:]
        else:
            break
    if len(argv) != 1 or argv[0].startswith("-"):
        say(USAGE)
        return 2
    try:
        sock = open_ssh(argv[0], profile, direct=direct, start_box=start_box)
        if is_unix_socket(1):
            pass_descriptor(sock)
        else:
            bridge(sock)
    except Failure as exc:
        say(f"sandbox: {exc.message}" + (f"\nhint: {exc.hint}" if exc.hint else ""))
        return 1
    except OSError as exc:
        say(f"sandbox: cannot hand the connection to ssh: {exc.strerror or exc}")
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    os._exit(main(sys.argv[1:]))  # nothing is buffered, and nobody waits for the interpreter to take itself apart

"""The daemon: takes the lock, binds the sockets, puts the parts together, and stops them in order."""

from __future__ import annotations

import asyncio
import fcntl
import gc
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import MutableMapping
from pathlib import Path

import uvloop

from gatewayd import api, sdnotify
from gatewayd.api import EXIT_CODES, ErrorKind
from gatewayd.config import Settings, config_error
from gatewayd.control import ControlServer
from gatewayd.errors import GatewayError, printable
from gatewayd.frontends.routes import Services
from gatewayd.frontends.ssh.front import SshFront
from gatewayd.frontends.ssh.target import Ways
from gatewayd.frontends.stdio import ConnectServer
from gatewayd.frontends.tcp import Forwards
from gatewayd.sandbox.accounts import Accounts
from gatewayd.sandbox.boxes import Directory
from gatewayd.sandbox.embedded import Embedded
from gatewayd.sandbox.guest_client import Guests
from gatewayd.sandbox.pool import Pool
from gatewayd.yamux.config import SessionConfig

log = logging.getLogger("gatewayd")

LOCK_PATIENCE = 15.0  # seconds to wait for an instance that is stopping
STOP_DEADLINE = 8.0  # seconds for each step of the stop
SUN_PATH_MAX = 107  # bytes of a Unix socket's path on Linux
LISTEN_BACKLOG = 128
LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}
CHATTY = ("httpx2", "httpcore2", "websockets", "uvicorn", "asyncio", "asyncssh")  # loggers that have nothing to say at INFO


class LineFormatter(logging.Formatter):
    """One line for each record, without control characters; tracebacks only when debugging."""

    def __init__(self, *, debug: bool) -> None:
        super().__init__("%(asctime)s.%(msecs)03d %(levelname)s %(name)s: %(message)s", "%Y-%m-%dT%H:%M:%S")
        self._debug = debug

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        if self._debug:
            return super().format(record)
        exc = record.exc_info[1] if record.exc_info else None
        plain = logging.makeLogRecord({**record.__dict__, "exc_info": None, "exc_text": None, "stack_info": None})
        line = super().format(plain)
        if exc is not None:
            line += f": {type(exc).__name__}: {exc}"
        return printable(line, 2000)


def main(level: str = "info") -> int:
    """Run until told to stop; the exit code. Raises GatewayError when it cannot start."""
    if level not in LEVELS:
        raise GatewayError(f"unknown log level {level!r}", kind=ErrorKind.USAGE, hint=", ".join(LEVELS))
    set_up_logging(level)
    settings = Settings(os.environ)
    config = settings.current()
    make_private(config.state_dir)
    make_private(config.runtime_dir)
    with Lock(config.runtime_dir) as lock:
        lock.acquire()
        sockets = Sockets(config.runtime_dir, os.environ)
        os.chdir("/")  # nothing is pinned by a daemon that happened to be started there
        try:
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                return runner.run(Daemon(settings, sockets).run())
        finally:
            sockets.close()


def set_up_logging(level: str) -> None:
    """Lines to stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(LineFormatter(debug=level == "debug"))
    logging.basicConfig(level=LEVELS[level], handlers=[handler], force=True)
    for name in CHATTY:
        logging.getLogger(name).setLevel(max(LEVELS[level], logging.WARNING))


def make_private(path: Path) -> None:
    """Make a directory that is this user's alone. Raises GatewayError (config)."""
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        info = path.stat()
        if info.st_uid != os.getuid():
            raise config_error(
                f"{path} belongs to another user", "set GATEWAYD_RUNTIME_DIR and GATEWAYD_STATE_DIR to directories of yours"
            )
        if info.st_mode & 0o077:
            path.chmod(0o700)
    except OSError as exc:
        raise config_error(f"cannot make {path}: {exc.strerror}", "set GATEWAYD_RUNTIME_DIR or GATEWAYD_STATE_DIR") from exc


class Lock:
    """One daemon for each runtime directory: a lock that ends with the process, however it ends."""

    def __init__(self, runtime_dir: Path) -> None:
        self._runtime_dir = runtime_dir
        self._fd = -1  # open while we are inside

    def __enter__(self) -> Lock:
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        self._fd = os.open(self._runtime_dir / api.DAEMON_LOCK, flags, 0o600)
        return self

    def acquire(self) -> None:
        """Take the lock, waiting a while for an instance that is stopping. Raises GatewayError (conflict) naming its pid."""
        deadline = time.monotonic() + LOCK_PATIENCE
        while True:
            try:
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as exc:
                if _answers(self._runtime_dir / api.CONTROL_SOCKET) or time.monotonic() >= deadline:
                    pid = os.pread(self._fd, 32, 0).decode("ascii", "replace").strip()
                    holder = f" (pid {printable(pid, 12)})" if pid else ""
                    raise GatewayError(
                        f"gatewayd runs already{holder}, its sockets are in {self._runtime_dir}",
                        kind=ErrorKind.CONFLICT,
                        hint="`sandbox status` shows it, `sandbox down` stops it",
                    ) from exc
            time.sleep(0.05)
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, f"{os.getpid()}\n".encode(), 0)

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)


class Sockets:
    """control.sock and connect.sock: taken from the service manager, or bound here. The lock must be held."""

    def __init__(self, runtime_dir: Path, environ: MutableMapping[str, str]) -> None:
        self._bound: list[Path] = []  # paths that are ours to remove
        self._open: list[socket.socket] = []
        handed = {Path(str(sock.getsockname())).name: sock for sock in sdnotify.listen_sockets(environ)}
        self._open.extend(handed.values())
        try:
            self.control = handed.get(api.CONTROL_SOCKET) or self._bind(runtime_dir / api.CONTROL_SOCKET)
            self.connect = handed.get(api.CONNECT_SOCKET) or self._bind(runtime_dir / api.CONNECT_SOCKET)
        except BaseException:
            self.close()
            raise

    def _bind(self, path: Path) -> socket.socket:
        if len(os.fsencode(path)) > SUN_PATH_MAX:
            raise config_error(
                f"cannot listen on {path}: the path is longer than {SUN_PATH_MAX} bytes", "set GATEWAYD_RUNTIME_DIR"
            )
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        self._open.append(sock)
        try:
            path.unlink(missing_ok=True)  # the lock is ours, so whoever bound it is gone
            sock.bind(str(path))
            path.chmod(0o600)
            sock.listen(LISTEN_BACKLOG)
        except OSError as exc:
            raise config_error(f"cannot listen on {path}: {exc.strerror}") from exc
        self._bound.append(path)
        return sock

    def unlink(self) -> None:
        """Nobody finds the sockets any more; idempotent."""
        for path in self._bound:
            path.unlink(missing_ok=True)
        self._bound.clear()

    def close(self) -> None:
        """Idempotent."""
        self.unlink()
        for sock in self._open:
            sock.close()


class Daemon:
    """The parts, put together."""

    def __init__(self, settings: Settings, sockets: Sockets) -> None:
        self._settings = settings
        self._sockets = sockets
        self._stop = asyncio.Event()  # set by a signal or by POST /shutdown
        self._keep_local = True  # whether the embedded service outlives us
        self._exit_code = 0
        config = settings.current()
        self._environ = config.environ
        self._embedded = Embedded(config.state_dir, config.environ)
        self._accounts = Accounts(settings, self._embedded)
        self._directory = Directory()
        links = SessionConfig(keepalive_interval=config.keepalive_interval, keepalive_timeout=config.keepalive_timeout)
        self._pool = Pool(self._directory, session_config=links)
        self._guests = Guests(self._directory, self._pool)
        self._forwards = Forwards(self._pool, self._guests)
        self._ssh = SshFront(settings, self._accounts, Ways(self._directory, self._pool, self._guests))
        self._connect = ConnectServer(
            settings, self._accounts, self._directory, self._pool, self._forwards, self._guests, self._ssh
        )
        services = Services(
            settings,
            self._accounts,
            self._directory,
            self._pool,
            self._forwards,
            self._embedded,
            stop=self._shutdown_requested,
            carrier=self._guests.carrier,
        )
        self._control = ControlServer(services)

    async def run(self) -> int:
        """Serve until the stop; the exit code."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            loop.add_signal_handler(number, self._signalled, number)
        self._connect.start(self._sockets.connect)
        await self._control.start(self._sockets.control)
        await self._ssh.start()
        gc.collect()
        gc.freeze()  # what start-up made stays: the collector need not look at it again
        sdnotify.notify("READY=1", self._environ)
        log.info("gatewayd %s is ready (pid %d)", api.VERSION, os.getpid())
        await self._stop.wait()
        sdnotify.notify("STOPPING=1", self._environ)
        await self._end()
        log.info("gatewayd has stopped")
        return self._exit_code

    async def _end(self) -> None:
        """In reverse order of the start; every step has a deadline."""
        self._sockets.unlink()
        steps = [
            ("connect.sock", self._connect.aclose()),
            ("ssh", self._ssh.aclose()),
            ("forwards", self._forwards.aclose()),
            ("guests", self._guests.aclose()),
            ("links", self._pool.aclose()),
            ("control.sock", self._control.aclose()),
        ]
        for name, step in steps:
            try:
                async with asyncio.timeout(STOP_DEADLINE):
                    await step
            except TimeoutError:
                log.warning("%s did not close within %.0f s", name, STOP_DEADLINE)
        if not self._keep_local:
            await self._embedded.stop()  # has its own deadlines
        await self._embedded.aclose()
        await self._accounts.aclose()

    def _shutdown_requested(self, keep_local: bool) -> None:
        log.info("stopping on request%s", ", the local service stays" if keep_local else "")
        self._keep_local = keep_local
        self._stop.set()

    def _signalled(self, number: signal.Signals) -> None:
        if self._stop.is_set():
            log.warning("%s during the stop: ending at once", number.name)
            self._sockets.unlink()
            logging.shutdown()
            os._exit(EXIT_CODES[ErrorKind.INTERRUPTED])
        log.info("stopping on %s", number.name)
        self._stop.set()


def _answers(path: Path) -> bool:
    """Whether somebody listens on a Unix socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(1.0)
        try:
            sock.connect(str(path))
        except OSError:
            return False
    return True

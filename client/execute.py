"""One running command whose streams are text: connect.sock's frames here, this process's streams and signals there."""

from __future__ import annotations

import _socket
import os
import select
import signal
import stat
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from client import output
from client.control import failure_of
from client.proxy import Failure
from gatewayd import api
from gatewayd.api import Frame

READ = 65536  # bytes per read of standard input: one frame
RECEIVE = 262144  # bytes per read of the connection
PENDING_MAX = 1 << 20  # bytes waiting to be sent above which standard input is not read
KILL_DEADLINE = 2.0  # seconds for the daemon to tell that a killed command has ended

CAUGHT = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
INSIST = 0.2  # seconds after which an interruption that got lost is raised again


class Interrupted(BaseException):
    """A signal that ends this process.

    Attributes:
        number: the signal's.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@contextmanager
def interruptible() -> Iterator[None]:
    """Within, SIGINT, SIGTERM and SIGHUP raise `Interrupted` once; further ones then act as they would have."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        del frame
        restore()
        signal.signal(signal.SIGALRM, lambda *_: insist(number))
        insist(number)

    def insist(number: int) -> None:
        """Python drops an exception that is raised in a destructor or a callback of its own: raise it again until it is out."""
        signal.setitimer(signal.ITIMER_REAL, INSIST)
        raise Interrupted(number)

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    before = {number: signal.getsignal(number) for number in CAUGHT}
    alarm = signal.getsignal(signal.SIGALRM)
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:  # nohup, or a background job without job control: not ours to undo
            signal.signal(number, interrupt)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, alarm)
        restore()


def has_input(fd: int = 0) -> bool:
    """Whether `fd` may hold anything to pass on: it is open and not the null device."""
    try:
        info = os.fstat(fd)
    except OSError:
        return False
    return not (stat.S_ISCHR(info.st_mode) and info.st_rdev == os.makedev(1, 3))


class Execution:
    """Carries a command's streams until it ends.

    One thread and one poll loop: the connection is non-blocking, so that output is drained while input waits; standard output is
    written blocking, so that a slow reader slows the command down.
    """

    def __init__(self, sock: _socket.socket, *, stdin: int | None = 0, stdout: int = 1, stderr: int = 2) -> None:
        self._sock = sock  # positioned at the first frame; closed by the caller
        self._stdin = stdin  # None once its end has been passed on, or when there is none
        self._sinks = {Frame.STDOUT: stdout, Frame.STDERR: stderr}
        self._decoder = api.FrameDecoder()
        self._pending: deque[memoryview] = deque()  # frames to send; the first may be partly sent
        self._partial = False  # whether the first pending frame is partly sent
        sock.setblocking(False)

    def run(self) -> int:
        """Carry until the command ends; returns its exit code, 0 to 255.

        Raises:
            Failure: the command could not go on, or the connection broke.
            BrokenPipeError: nobody reads the output any more.
            Interrupted: a signal came (inside `interruptible`).
        """
        while True:
            code = self._step(None)
            if code is not None:
                return code

    def kill(self) -> None:
        """Kill the command and wait a moment for its end; output that still comes is dropped."""
        self._stdin = None
        self._sinks = {}
        while len(self._pending) > self._partial:
            self._pending.pop()
        self._send(Frame.SIGNAL, b'{"signal":"KILL"}')
        deadline = time.monotonic() + KILL_DEADLINE
        with suppress(Failure):
            while (left := deadline - time.monotonic()) > 0:
                if self._step(left) is not None:
                    return

    def _send(self, kind: int, payload: bytes = b"") -> None:
        self._pending.append(memoryview(api.encode_frame(kind, payload)))

    def _step(self, timeout: float | None) -> int | None:
        """Wait for one thing to happen and deal with it; returns the exit code when the command has ended."""
        poll = select.poll()
        poll.register(self._sock.fileno(), select.POLLIN | (select.POLLOUT if self._pending else 0))
        if self._stdin is not None and sum(map(len, self._pending)) < PENDING_MAX:
            poll.register(self._stdin, select.POLLIN)
        self._watch(poll)
        for fd, events in poll.poll(None if timeout is None else timeout * 1000):
            if fd != self._sock.fileno():
                if not self._other(fd):
                    self._read_input()
                continue
            if events & select.POLLOUT:
                self._flush()
            if events & ~select.POLLOUT:
                code = self._receive()
                if code is not None:
                    return code
        return None

    def _read_input(self) -> None:
        assert self._stdin is not None  # noqa: S101 - it is only polled while it is there
        try:
            data = os.read(self._stdin, READ)
        except OSError:
            data = b""  # a directory, a terminal that is gone: no input
        if data:
            self._input(data)
        else:
            self._send(Frame.STDIN_EOF)
            self._stdin = None

    def _input(self, data: bytes) -> None:
        """Pass on what was read."""
        self._send(Frame.STDIN, data)

    def _watch(self, poll: select.poll) -> None:
        """Register what else is to be waited for."""

    def _other(self, fd: int) -> bool:
        """Deal with what `_watch` registered; whether `fd` was that."""
        del fd
        return False

    def _flush(self) -> None:
        try:
            while self._pending:
                view = self._pending[0]
                sent = self._sock.send(view)
                self._partial = sent < len(view)
                if self._partial:
                    self._pending[0] = view[sent:]
                else:
                    self._pending.popleft()
        except BlockingIOError:
            return
        except OSError:
            self._pending.clear()  # what the daemon has still to say can be read; its silence shows there
            self._partial = False
            self._stdin = None

    def _receive(self) -> int | None:
        try:
            data = self._sock.recv(RECEIVE)
        except BlockingIOError:
            return None
        except OSError as exc:
            raise Failure(api.ErrorKind.UNAVAILABLE, f"the connection to the daemon broke: {exc.strerror or exc}") from exc
        if not data:
            raise Failure(api.ErrorKind.UNAVAILABLE, "the daemon closed the connection before the command ended")
        try:
            frames = self._decoder.feed(data)
        except api.FrameError as exc:
            raise Failure(api.ErrorKind.INTERNAL, f"the daemon's stream makes no sense: {exc}") from exc
        for kind, payload in frames:
            if kind in self._sinks:
                _write_all(self._sinks[kind], payload)
            elif kind == Frame.EXIT:
                return _exit_code(payload)
            elif kind == Frame.ERROR:
                raise failure_of({"error": _object(payload)}, "the daemon reports an error without saying which")
        return None


def _write_all(fd: int, data: bytes) -> None:
    """Write to a standard stream, waiting for its reader.

    Raises:
        BrokenPipeError: there is none any more.
        Failure: it cannot be written for another reason.
    """
    view = memoryview(data)
    while view:
        try:
            view = view[os.write(fd, view) :]
        except BlockingIOError:  # whoever shares the descriptor has made it non-blocking
            select.select([], [fd], [])
        except BrokenPipeError:
            raise
        except OSError as exc:
            raise Failure(api.ErrorKind.FAILED, f"cannot write the output: {exc.strerror or exc}") from exc


def _object(payload: bytes) -> dict[str, object]:
    try:
        return api.decode_line(payload)
    except ValueError:
        return {}


def _exit_code(payload: bytes) -> int:
    code = _object(payload).get("exit_code")
    if not isinstance(code, int) or isinstance(code, bool):
        raise Failure(api.ErrorKind.INTERNAL, "the daemon's stream makes no sense: an end without an exit code")
    return code & 0xFF if code >= 0 else min(128 - code, 255)  # negative: ended by that signal


def carry(sock: _socket.socket, stdin: int | None) -> int:
    """Run an execution to its end, whatever ends it; returns the exit code of this process.

    A signal kills the command (128 + its number), and so does a broken standard output (141, quietly).

    Raises:
        Failure: as for `Execution.run`.
    """
    execution = Execution(sock, stdin=stdin)
    try:
        with interruptible():
            return execution.run()
    except Interrupted as exc:
        if exc.number == signal.SIGINT:
            output.after_interrupt()
        execution.kill()
        return 128 + exc.number
    except BrokenPipeError:
        execution.kill()
        raise

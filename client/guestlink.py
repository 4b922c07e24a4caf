"""One connection to connect.sock that never waits: dialled (the daemon is started if need be), asked, then a stream of bytes."""
# ruff: noqa: PTH118 - pathlib is most of a start

from __future__ import annotations

import _socket
import os
import select
import signal
import time
from collections import deque
from collections.abc import Iterable
from typing import Any

from client import proxy
from client.control import failure_of
from client.proxy import Failure
from gatewayd import api

RECEIVE = 262144  # bytes per read
START_PAUSE = 0.05  # seconds between two looks for a daemon that is being started
STATEMENT_MAX = 65536  # bytes of the message of a failed start
_BLOCKED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGWINCH)


class Lost(Exception):
    """The connection is gone, or could not be made, without the daemon saying why: a new one may work."""


class Link:
    """From a request line to the end of its connection.

    Call `handle` for the descriptors of `watched`, and `tick` when `deadline` has passed.
    """

    def __init__(self, request: bytes, reply_deadline: float) -> None:
        """Dial and send `request`, an encoded line.

        Args:
            reply_deadline: seconds of silence before an answer after which the daemon is given up.

        Raises:
            Failure: the daemon's socket is not ours to use.
            Lost: it does not take the request.
        """
        self._request = request
        self._reply_deadline = reply_deadline
        self._path = os.path.join(api.runtime_dir(), api.CONNECT_SOCKET)
        self._sock: _socket.socket | None = None  # None while the daemon is being started
        self._starter: Starter | None = None  # starts the daemon
        self._head = b""  # of the reply: an incomplete line
        self._out: deque[memoryview] = deque()  # to be sent; the first may be partly sent
        self.up = False  # the ok line has come: the stream follows
        self.deadline: float | None = None  # when to call `tick`, on the clock time.monotonic
        self._dial(time.monotonic())

    def _dial(self, now: float) -> None:
        try:
            sock = proxy.connect(self._path)
        except (FileNotFoundError, ConnectionRefusedError):
            if self._starter is None:
                self._starter = Starter(self._path)
            self.deadline = now + START_PAUSE
            return
        if self._starter is not None:
            self._starter.close()
            self._starter = None
        sock.setblocking(False)
        self._sock = sock
        self.deadline = now + self._reply_deadline
        self.send([self._request])

    def watched(self) -> list[tuple[int, int]]:
        """Descriptors and the events to poll them for."""
        if self._sock is not None:
            return [(self._sock.fileno(), select.POLLIN | (select.POLLOUT if self._out else 0))]
        return [(self._starter.fd, select.POLLIN)] if self._starter is not None else []

    def tick(self, now: float) -> None:
        """Time has passed.

        Raises:
            Failure, Lost: as the constructor; also that the daemon could not be started, or gave no answer.
        """
        if self.deadline is None or now < self.deadline:
            return
        if self._sock is None:
            self._dial(now)
        else:
            raise Lost(f"the daemon gave no answer within {self._reply_deadline:.0f} s")

    def handle(self, events: int, now: float) -> tuple[list[dict[str, Any]], bytes]:
        """Something is to be read or can be written: reply lines (notices, then ok), and bytes of the stream.

        Raises:
            Failure: the daemon's error; nothing more comes.
            Lost: the connection is gone.
        """
        if self._sock is None:
            assert self._starter is not None  # noqa: S101 - nothing else is watched
            self._starter.ended()  # raises when the start failed
            self._dial(now)
            return [], b""
        if events & select.POLLOUT:
            self._flush()
        if not events & ~select.POLLOUT:
            return [], b""
        try:
            data = self._sock.recv(RECEIVE)
        except BlockingIOError:
            return [], b""
        except OSError as exc:
            raise Lost(f"the connection to the daemon broke: {exc.strerror or exc}") from exc
        if not data:
            raise Lost("the daemon closed the connection")
        return ([], data) if self.up else self._reply(data, now)

    def _reply(self, data: bytes, now: float) -> tuple[list[dict[str, Any]], bytes]:
        self._head += data
        replies: list[dict[str, Any]] = []
        self.deadline = now + self._reply_deadline
        while not self.up:
            line, newline, rest = self._head.partition(b"\n")
            if not newline:
                if len(line) > api.LINE_MAX:
                    raise Failure(api.ErrorKind.INTERNAL, f"the daemon's answer is longer than {api.LINE_MAX} bytes")
                return replies, b""
            self._head = rest
            try:
                reply = api.decode_line(line)
            except ValueError:
                raise Failure(api.ErrorKind.INTERNAL, "the daemon's answer makes no sense: it is not a JSON line") from None
            if isinstance(reply.get("ok"), dict):
                self.up = True
                self.deadline = None
            elif "notice" not in reply:
                raise failure_of(reply, "the daemon's answer makes no sense: neither ok nor error")
            replies.append(reply)
        stream, self._head = self._head, b""
        return replies, stream

    def send(self, parts: Iterable[bytes]) -> None:
        """Send, as far as the connection takes it now; the rest when it polls as writable.

        Raises:
            Lost: the connection is gone.
        """
        self._out.extend(memoryview(part) for part in parts)
        self._flush()

    @property
    def idle(self) -> bool:
        """Whether everything that was to be sent has gone into the connection."""
        return not self._out

    def _flush(self) -> None:
        assert self._sock is not None  # noqa: S101 - only what is connected is sent to
        try:
            while self._out:
                view = self._out[0]
                sent = self._sock.send(view, _socket.MSG_NOSIGNAL)
                if sent < len(view):
                    self._out[0] = view[sent:]
                else:
                    self._out.popleft()
        except BlockingIOError:
            pass
        except OSError as exc:
            self._out.clear()
            if not self.up:  # its last words may wait to be read
                return
            raise Lost(f"the connection to the daemon broke: {exc.strerror or exc}") from exc

    def close(self) -> None:
        """Release everything; idempotent."""
        if self._sock is not None:
            self._sock.close()
            self._sock = None
        if self._starter is not None:
            self._starter.close()
            self._starter = None
        self.up = False
        self.deadline = None


class Starter:
    """Starts the daemon beside this process: `proxy.start` waits, and a terminal must not."""

    def __init__(self, path: str) -> None:
        """`path`: where the daemon is to listen."""
        read, write = os.pipe()
        signal.pthread_sigmask(signal.SIG_BLOCK, _BLOCKED)  # a signal of ours must not run our handlers in the child
        try:
            self._pid = os.fork()
            if self._pid == 0:
                _start_and_exit(path, write)
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _BLOCKED)
            os.close(write)
        self.fd = read  # readable once it has ended

    def ended(self) -> None:
        """Collect how it went. Raises Failure when the daemon could not be started."""
        text = b""
        while len(text) < STATEMENT_MAX and (data := os.read(self.fd, STATEMENT_MAX)):
            text += data
        self.close()
        if text:
            kind, message, hint = (*text.decode("utf-8", "replace").split("\0"), "", "")[:3]
            raise Failure(kind, message, hint)

    def close(self) -> None:
        """Wait for it no longer; idempotent. It ends by itself."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
            os.waitpid(self._pid, os.WNOHANG)


def _start_and_exit(path: str, statement: int) -> None:
    """In the child: start the daemon, write down why if that fails, and end."""
    try:
        signal.set_wakeup_fd(-1)  # it is the parent's
        for number in _BLOCKED:
            signal.signal(number, _nothing)  # a ^C is for the parent; ignored signals would be inherited by the daemon
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _BLOCKED)
        proxy.start(path).close()
    except Failure as exc:
        os.write(statement, "\0".join((exc.kind, exc.message, exc.hint)).encode("utf-8", "replace")[:STATEMENT_MAX])
    except OSError as exc:
        os.write(statement, f"{api.ErrorKind.UNAVAILABLE}\0cannot start the daemon: {exc.strerror or exc}".encode())
    finally:
        os._exit(0)


def _nothing(number: int, frame: object) -> None:
    """A signal that is somebody else's."""

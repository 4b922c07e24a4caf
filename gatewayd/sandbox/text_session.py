"""A program carried by ``/execute/ws``, for images that cannot run the guest: text only, and no signals but by keys and KILL."""

from __future__ import annotations

import asyncio
import contextlib
import shlex
from collections import deque
from collections.abc import Mapping

from gatewayd.api import ErrorKind
from gatewayd.errors import GatewayError, StreamClosed
from gatewayd.sandbox.accounts import Account
from gatewayd.sandbox.boxes import Directory, Notice
from gatewayd.sandbox.exec_ws import Check, ExecSession, ExecSpec, Exit, InputDecoder
from gatewayd.sandbox.session import STDERR, STDOUT, ExitStatus, ProcessSpec
from gatewayd.tasks import TaskOwner

BUFFER_MAX = 1 << 20  # bytes of output that nobody has read above which the service is not read
DEADLY = frozenset({"KILL", "TERM", "HUP", "QUIT", "ABRT", "INT"})  # become KILL, the only signal there is
KEYS: Mapping[str, str] = {"INT": "\x03", "QUIT": "\x1c", "TSTP": "\x1a"}  # what a terminal makes signals of


async def start_text_session(
    account: Account,
    directory: Directory,
    sandbox: str,
    spec: ProcessSpec,
    notice: Notice | None = None,
    check: Check | None = None,
) -> TextSession:
    """Run a program; `check` as in `ExecSession`. Raises GatewayError: kind unsupported for what this carrier cannot do."""
    if spec.user:
        raise GatewayError(
            f"cannot run as {spec.user!r} in sandbox {sandbox!r}: its image has no Python, so there is no guest to change users",
            kind=ErrorKind.UNSUPPORTED,
        )
    env = {**spec.env, "TERM": spec.term} if spec.pty and spec.term else dict(spec.env)
    exec_spec = ExecSpec(
        command=shlex.join(spec.argv) if spec.argv else spec.command or ("" if spec.pty else "exec ${SHELL:-/bin/sh} -l"),
        env=env,
        cwd=spec.cwd,
        shell="/bin/sh" if spec.argv or not (spec.command or spec.pty) else "",
        pty=spec.pty,
        cols=spec.cols,
        rows=spec.rows,
    )
    session = ExecSession(account, directory, sandbox, exec_spec, check)
    try:
        await session.start(notice)
    except BaseException:
        await session.aclose()
        raise
    return TextSession(session, sandbox)


class TextSession:
    """Implements `sandbox.session.Session`. One task receives, one sends."""

    def __init__(self, session: ExecSession, sandbox: str) -> None:
        """`session` has been started, and is closed by `aclose`."""
        self.pid = session.pid
        loop = asyncio.get_running_loop()
        self.input_stopped: asyncio.Future[None] = loop.create_future()
        self._session = session
        self._sandbox = sandbox
        self._decoder = InputDecoder()
        self._streams = (STDOUT,) if session.pty else (STDOUT, STDERR)
        self._chunks: dict[int, deque[bytes]] = {stream: deque() for stream in (STDOUT, STDERR)}  # received, not read
        self._buffered = 0  # bytes in them
        self._ready = {stream: asyncio.Event() for stream in (STDOUT, STDERR)}  # something for read() to look at
        self._stopped: set[int] = set()  # streams that nobody reads any more
        self._room = asyncio.Event()  # the receiver may go on
        self._exit: asyncio.Future[ExitStatus] = loop.create_future()
        self._error: GatewayError | None = None  # why the session was lost
        self._ended = False  # no more output comes
        self._eof = False  # write_eof was called
        self._size: tuple[int, int] | None = None  # a terminal size to be told
        self._orders: deque[str] = deque()  # "eof", "kill", "size", or input made of signals, for the sender
        self._work = asyncio.Event()  # there are orders
        self._closing = False  # aclose was called
        self._tasks = TaskOwner(f"text session in {sandbox}")
        self._tasks.start(self._receive(), "receive")
        self._tasks.start(self._send(), "send")

    async def read(self, stream: int = STDOUT, limit: int = 262144) -> bytes:
        """As in `Session`."""
        chunks = self._chunks[stream]
        while not chunks:
            if self._error is not None:
                raise GatewayError(self._error.message, kind=self._error.kind, hint=self._error.hint)
            if self._ended or stream in self._stopped or stream not in self._streams:
                return b""
            self._ready[stream].clear()
            await self._ready[stream].wait()
        data = chunks.popleft()
        if len(data) > limit:
            chunks.appendleft(data[limit:])
            data = data[:limit]
        self._buffered -= len(data)
        self._room.set()
        return data

    async def write(self, data: bytes) -> None:
        """As in `Session`; kind unsupported for input that is not UTF-8."""
        if self._eof or self._closing:
            raise StreamClosed(f"cannot write to a session in sandbox {self._sandbox!r}: its input is ended")
        if self._error is not None:
            raise GatewayError(self._error.message, kind=self._error.kind, hint=self._error.hint)
        if self._ended:
            return
        if text := self._decoder.decode(data):
            await self._session.send_input(text)

    def write_eof(self) -> None:
        """As in `Session`. On a terminal it is the key that says so."""
        if not self._eof:
            self._eof = True
            self._order("\x04" if self._session.pty else "eof")

    def resize(self, cols: int, rows: int, xpixel: int = 0, ypixel: int = 0) -> None:
        """As in `Session`; sizes in pixels are not carried."""
        if self._session.pty:
            if self._size is None:
                self._order("size")
            self._size = (cols, rows)

    def signal(self, name: str) -> None:
        """As in `Session`: keys on a terminal, otherwise KILL for what would end a program anyway."""
        if self._session.pty and name in KEYS:
            self._order(KEYS[name])
        elif name in DEADLY:
            self._order("kill")
        else:
            raise GatewayError(
                f"cannot send {name[:20]!r} in sandbox {self._sandbox!r}: its image has no Python, so there is KILL alone",
                kind=ErrorKind.UNSUPPORTED,
            )

    def stop_output(self, stream: int) -> None:
        """As in `Session`; the program does not learn of it."""
        self._stopped.add(stream)
        self._buffered -= sum(map(len, self._chunks[stream]))
        self._chunks[stream].clear()
        self._ready[stream].set()
        self._room.set()

    async def wait(self) -> ExitStatus:
        """As in `Session`; a signal is told as the exit code that shells use, 128 and its number."""
        return await asyncio.shield(self._exit)

    async def aclose(self) -> None:
        """As in `Session`: KILL at once."""
        self._closing = True
        self._finish(GatewayError(f"the session in sandbox {self._sandbox!r} is over", kind=ErrorKind.UNAVAILABLE))
        await self._session.aclose()
        await self._tasks.aclose()

    def _order(self, what: str) -> None:
        if not self._ended and len(self._orders) < 1024:
            self._orders.append(what)
            self._work.set()

    async def _send(self) -> None:
        """Carry out orders in their sequence; a failure is the receiver's to tell."""
        with contextlib.suppress(GatewayError, OSError):
            while True:
                while self._orders:
                    order = self._orders.popleft()
                    if order == "eof":
                        if text := self._decoder.decode(b"", final=True):
                            await self._session.send_input(text)
                        await self._session.close_stdin()
                    elif order == "kill":
                        await self._session.kill()
                    elif order == "size":
                        size, self._size = self._size, None
                        if size is not None:
                            await self._session.resize(*size)
                    else:
                        await self._session.send_input(order)
                self._work.clear()
                await self._work.wait()

    async def _receive(self) -> None:
        try:
            while True:
                while self._buffered > BUFFER_MAX:
                    self._room.clear()
                    await self._room.wait()
                event = await self._session.receive()
                if isinstance(event, Exit):
                    break
                stream = STDERR if event.stderr else STDOUT
                if stream not in self._stopped:
                    self._chunks[stream].append(event.data)
                    self._buffered += len(event.data)
                    self._ready[stream].set()
            if not self._exit.done():
                self._exit.set_result(ExitStatus(event.code & 0xFF))
            self._finish(None)
        except GatewayError as exc:
            self._finish(exc)

    def _finish(self, error: GatewayError | None) -> None:
        """No more output comes; the first call counts."""
        if not self._ended:
            self._ended = True
            self._error = error
        if not self._exit.done() and error is not None:
            self._exit.set_exception(GatewayError(error.message, kind=error.kind, hint=error.hint))
            self._exit.exception()  # seen: nobody has to wait for it
        if not self.input_stopped.done():
            self.input_stopped.set_result(None)
        for ready in self._ready.values():
            ready.set()

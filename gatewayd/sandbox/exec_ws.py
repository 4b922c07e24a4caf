"""A command in a sandbox over ``/execute/ws``: text in, text out, and reattached by offset when the connection breaks."""

from __future__ import annotations

import asyncio
import codecs
import contextlib
import json
import logging
import uuid
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from websockets.asyncio.client import ClientConnection
from websockets.exceptions import ConnectionClosed
from websockets.protocol import State

from gatewayd.api import ErrorKind
from gatewayd.errors import GatewayError, ServiceRefused, printable
from gatewayd.sandbox.accounts import Account
from gatewayd.sandbox.boxes import Directory, Notice
from gatewayd.sandbox.failures import TRANSIENT
from gatewayd.sandbox.link import Target, open_websocket
from gatewayd.sandbox.rest_client import backoff
from gatewayd.tasks import TaskOwner

log = logging.getLogger(__name__)

TRIES = 5  # connections in a row that may fail
BACKOFF_BASE, BACKOFF_MAX = 0.25, 5.0  # seconds between them
ANSWER_TIMEOUT = 30.0  # seconds for "started"
PING_INTERVAL = 20.0  # seconds; the WebSocket's own pings keep this connection alive
MESSAGE_MAX = 16 << 20  # bytes of one message: JSON may escape every character of a chunk
IDLE_TIMEOUT = 60  # seconds the service lets the command live while we are not attached
TTL = 120  # seconds a finished command can be reattached
GOING_AWAY = 1001  # close code of a service that reloads: reconnect at once
LOST_CHARACTER = "\ufffd"  # stands for a byte that was no UTF-8: three bytes where there was one


@dataclass(frozen=True)
class ExecSpec:
    """What to run; None and empty mean the service's default."""

    command: str = ""  # "" with pty: a login shell
    env: Mapping[str, str] = field(default_factory=dict)
    cwd: str = ""
    shell: str = ""
    timeout: int = 0  # seconds, 0: none
    pty: bool = False
    cols: int = 0  # of the terminal; 0: not told
    rows: int = 0
    close_stdin: bool = False  # the command starts with its input at the end


@dataclass(frozen=True)
class Output:
    """Bytes the command wrote."""

    stderr: bool
    data: bytes


@dataclass(frozen=True)
class Exit:
    """The command has ended."""

    code: int


Check = Callable[[], Awaitable[None]]  # raises GatewayError unless the sandbox runs, and starts nothing


class _Stream:
    """How far one output stream has been received."""

    def __init__(self) -> None:
        self.offset = 0  # byte offset to reattach at
        self.overlap = ""  # text that a reattachment at `offset` sends again
        self.skip = ""  # what of it is still to come
        self.check = False  # the next chunk is the first one after a reattachment

    def take(self, offset: int, text: str) -> str:
        """The new part of a chunk. Raises GatewayError when bytes are missing before it."""
        if self.check and offset > self.offset:
            missing = offset - self.offset
            raise GatewayError(f"the connection was lost and {missing} bytes of output with it", kind=ErrorKind.UNAVAILABLE)
        self.check = False
        if LOST_CHARACTER in text:  # its length in bytes is unknown: ask for it again, and leave it out then
            self.offset, self.overlap = offset, text
        else:
            self.offset, self.overlap = offset + len(text.encode("utf-8", "replace")), ""
        if self.skip:
            size = min(len(self.skip), len(text))
            if text[:size] == self.skip[:size]:
                self.skip, text = self.skip[size:], text[size:]
            else:
                self.skip = ""
        return text

    def reattach(self) -> None:
        self.skip, self.check = self.overlap, True


class ExecSession:
    """One command, from start to exit. One task receives, one sends; close it with `aclose`."""

    def __init__(self, account: Account, directory: Directory, sandbox: str, spec: ExecSpec, check: Check | None = None) -> None:
        """`check` is asked before every connection, which would start a stopped sandbox; None: it may."""
        self.command_id = uuid.uuid4().hex  # chosen here: a repeated execute attaches instead of running twice
        self.pid = 0  # inside the sandbox, once started
        self.pty = spec.pty  # whether it runs on a terminal
        self._account = account
        self._directory = directory
        self._sandbox = sandbox
        self._spec = spec
        self._check = check
        self._websocket: ClientConnection | None = None  # None while not attached
        self._attached = asyncio.Event()  # set while `_websocket` can be used, and at the end for ever
        self._over = False  # exit or a final error was received, or aclose was called
        self._streams = {"stdout": _Stream(), "stderr": _Stream()}
        self._size: tuple[int, int] | None = (spec.cols, spec.rows) if spec.cols and spec.rows else None  # last terminal size
        self._eof = spec.close_stdin  # close_stdin was sent or is to be sent
        self._sent = 0  # characters of input given to the WebSocket
        self._confirmed = 0  # of them, how many a pong has confirmed
        self._pinging = False  # a ping that will confirm input is on its way
        self._tasks = TaskOwner(f"exec {sandbox}")

    async def start(self, notice: Notice | None = None) -> None:
        """Run the command. Raises GatewayError."""
        spec = self._spec
        request: dict[str, Any] = {
            "type": "execute",
            "command_id": self.command_id,
            "timeout_seconds": spec.timeout,
            "idle_timeout_seconds": IDLE_TIMEOUT,
            "ttl_seconds": TTL,
            "kill_on_disconnect": False,  # or a broken connection could not be resumed
        }
        optional = {
            "command": spec.command,
            "shell": spec.shell,
            "cwd": spec.cwd,
            "env": dict(spec.env),
            "pty": spec.pty,
            "close_stdin": spec.close_stdin,
        }
        request |= {name: value for name, value in optional.items() if value}
        await self._attach(request, f"run a command in sandbox {self._sandbox!r}", immediately=True, notice=notice)

    async def receive(self) -> Output | Exit:
        """The next thing that happened; reattaches when the connection breaks. After Exit there is nothing more.

        Raises:
            GatewayError: the command could not go on, or nobody knows how it went.
        """
        while True:
            websocket = self._websocket
            if websocket is None:
                raise GatewayError("the command is over", kind=ErrorKind.INTERNAL)
            try:
                message = _message(await websocket.recv())
            except ConnectionClosed as exc:
                await self._reattach(exc)
                continue
            kind = message.get("type")
            if kind in ("stdout", "stderr"):
                text, offset = message.get("data"), message.get("offset", 0)
                if not isinstance(text, str) or not isinstance(offset, int) or offset < 0:
                    raise _nonsense()
                if fresh := self._streams[kind].take(offset, text):
                    return Output(kind == "stderr", fresh.encode("utf-8", "replace"))
            elif kind == "exit":
                code = message.get("exit_code")
                self._finish()
                if not isinstance(code, int):
                    raise _nonsense()
                return Exit(code)
            elif kind == "error":
                self._finish()
                raise self._error(message)

    # --- sending ------------------------------------------------------------------------------------------------------

    async def send_input(self, text: str) -> None:
        """Input for the command; waits while the connection is slow or being replaced. Nothing after the end."""
        websocket = await self._usable()
        if websocket is None:
            return
        self._sent += len(text)
        try:
            await websocket.send(json.dumps({"type": "input", "data": text}))
        except ConnectionClosed:  # some of it may have left: `_reattach` decides, nothing is sent twice
            return
        if not self._pinging:
            self._pinging = True
            self._tasks.start(self._confirm(), "confirm")

    async def close_stdin(self) -> None:
        """The end of the input; idempotent."""
        if not self._eof:
            self._eof = True
            await self._send({"type": "close_stdin"})

    async def resize(self, cols: int, rows: int) -> None:
        """The terminal's size has changed."""
        self._size = (cols, rows)
        await self._send({"type": "resize", "cols": cols, "rows": rows})

    async def kill(self) -> None:
        """SIGKILL to the whole process group; its exit is still received."""
        await self._send({"type": "kill"})

    async def _usable(self) -> ClientConnection | None:
        """The open connection; waits for one while it is being replaced. None at the end."""
        while True:
            await self._attached.wait()
            websocket = self._websocket
            if self._over or websocket is None:
                return None
            if websocket.state is State.OPEN:
                return websocket
            self._attached.clear()  # `receive` notices too, and replaces it

    async def _send(self, message: Mapping[str, Any]) -> None:
        """Send what may be sent twice."""
        while (websocket := await self._usable()) is not None:
            try:
                await websocket.send(json.dumps(message))
            except ConnectionClosed:
                continue
            return

    async def _confirm(self) -> None:
        """A pong confirms all input before its ping: what it confirmed is not lost when the connection breaks."""
        try:
            while (websocket := self._websocket) is not None and self._confirmed < self._sent:
                sent = self._sent
                pong = await websocket.ping()
                await pong
                self._confirmed = sent
        except ConnectionClosed:
            pass
        finally:
            self._pinging = False

    # --- attaching ----------------------------------------------------------------------------------------------------

    async def _reattach(self, lost: ConnectionClosed) -> None:
        self._attached.clear()
        log.info("exec %s in %s: %s; reattaching", self.command_id[:8], self._sandbox, lost)
        if not self._spec.pty and self._confirmed < self._sent:
            self._finish()
            raise GatewayError(
                f"the connection to sandbox {self._sandbox!r} was lost while input was on its way: up to "
                f"{self._sent - self._confirmed} characters may not have arrived",
                kind=ErrorKind.UNAVAILABLE,
            )
        self._confirmed = self._sent  # a terminal: what was typed into a broken connection is typed again by its user
        for stream in self._streams.values():
            stream.reattach()
        request = {
            "type": "reconnect",
            "command_id": self.command_id,
            "stdout_offset": self._streams["stdout"].offset,
            "stderr_offset": self._streams["stderr"].offset,
        }
        at_once = lost.rcvd is not None and lost.rcvd.code == GOING_AWAY
        try:
            await self._attach(request, f"reattach to the command in sandbox {self._sandbox!r}", immediately=at_once)
        except GatewayError:
            self._finish()
            raise

    async def _attach(self, request: Mapping[str, Any], what: str, *, immediately: bool, notice: Notice | None = None) -> None:
        """Open a connection, send `request` and wait for "started"; a few times if that may help."""
        moved = False  # whether a remembered address has failed us already
        attempt = 0
        while True:
            if not immediately:
                await asyncio.sleep(backoff(attempt, BACKOFF_BASE, BACKOFF_MAX))
            immediately = False
            if self._check is not None:
                await self._check()
            place, remembered = await self._directory.locate(self._account, self._sandbox, notice)
            target = Target(place.websocket("/execute/ws"), place.profile, self._sandbox, what, self._account.proxies)
            try:
                websocket = await open_websocket(target, ping_interval=PING_INTERVAL, max_size=MESSAGE_MAX, close_timeout=0.5)
            except GatewayError as exc:
                self._directory.forget(self._account, self._sandbox)
                if remembered and not moved:
                    moved = immediately = True
                    continue
                attempt += 1
                if attempt >= TRIES or not _transient(exc):
                    raise
                log.info("%s; trying again", exc.message)
                continue
            try:
                started = await self._begin(websocket, request)
            except (ConnectionClosed, TimeoutError) as exc:
                await websocket.close()
                attempt += 1
                if attempt >= TRIES:
                    raise GatewayError(f"cannot {what}: the connection was lost", kind=ErrorKind.UNAVAILABLE) from exc
                continue
            except BaseException:
                with contextlib.suppress(ConnectionClosed):  # it may run by now, and nobody wants it any more
                    await websocket.send(json.dumps({"type": "kill"}))
                await websocket.close()
                raise
            pid = started.get("pid")
            self.pid = pid if isinstance(pid, int) else 0
            self._websocket = websocket
            self._attached.set()
            return

    async def _begin(self, websocket: ClientConnection, request: Mapping[str, Any]) -> dict[str, Any]:
        """Raises ConnectionClosed, TimeoutError or GatewayError."""
        await websocket.send(json.dumps(request))
        async with asyncio.timeout(ANSWER_TIMEOUT):
            while True:
                answer = _message(await websocket.recv())
                if answer.get("type") == "started":
                    break
                if answer.get("type") == "error":
                    raise self._error(answer)
        if self._size is not None:
            await websocket.send(json.dumps({"type": "resize", "cols": self._size[0], "rows": self._size[1]}))
        if self._eof and request["type"] == "reconnect":
            await websocket.send(json.dumps({"type": "close_stdin"}))
        return answer

    def _error(self, message: Mapping[str, Any]) -> GatewayError:
        error_type = printable(message.get("error_type") or "CommandError", 64)
        text = printable(message.get("error") or "the service gives no reason")
        if error_type == "CommandTimeout":
            return GatewayError(f"the command took too long: {text}", kind=ErrorKind.TIMEOUT)
        if error_type in ("CommandNotFound", "SessionExpired"):
            return GatewayError(
                f"the command in sandbox {self._sandbox!r} is gone ({error_type}): {text}", kind=ErrorKind.UNAVAILABLE
            )
        return GatewayError(f"cannot run the command in sandbox {self._sandbox!r}: {text}", kind=ErrorKind.FAILED)

    # --- the end ------------------------------------------------------------------------------------------------------

    def _finish(self) -> None:
        self._over = True
        self._attached.set()

    async def aclose(self) -> None:
        """Kill the command if it still runs, close the connection; idempotent."""
        websocket, self._websocket = self._websocket, None
        running = not self._over
        self._finish()
        try:
            if websocket is not None and running:
                async with asyncio.timeout(2.0):
                    await websocket.send(json.dumps({"type": "kill"}))
        except (ConnectionClosed, TimeoutError):
            log.info("exec %s in %s: the service ends it within %d s", self.command_id[:8], self._sandbox, IDLE_TIMEOUT)
        finally:
            if websocket is not None:
                await websocket.close()
            await self._tasks.aclose()


class InputDecoder:
    """Bytes to the text that the protocol can carry; a character cut in two waits for its rest."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("strict")
        self._taken = 0  # bytes before the current chunk

    def decode(self, data: bytes, *, final: bool = False) -> str:
        """Raises GatewayError, kind unsupported, naming the offset of the first byte that is no UTF-8."""
        held = len(self._decoder.getstate()[0])
        try:
            text = self._decoder.decode(data, final)
        except UnicodeDecodeError as exc:
            offset = self._taken - held + exc.start
            raise GatewayError(
                f"input is not UTF-8 at byte {offset}: this connection carries text only",
                kind=ErrorKind.UNSUPPORTED,
                hint="encode it, with base64 for example, or use an image with python3",
            ) from exc
        self._taken += len(data)
        return text


def _message(raw: str | bytes) -> dict[str, Any]:
    try:
        message = json.loads(raw)
    except (ValueError, RecursionError) as exc:
        raise _nonsense() from exc
    if not isinstance(message, dict):
        raise _nonsense()
    return message


def _nonsense() -> GatewayError:
    return GatewayError("the service sent something that is no message of /execute/ws", kind=ErrorKind.UNAVAILABLE)


def _transient(exc: GatewayError) -> bool:
    if isinstance(exc, ServiceRefused):
        return exc.status in TRANSIENT
    return exc.kind == ErrorKind.UNAVAILABLE

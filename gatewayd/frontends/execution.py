"""The `exec` operation of connect.sock: frames on one side, a command's session on the other."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import math
import shlex
from typing import Any

from gatewayd import api
from gatewayd.api import ErrorKind, Frame
from gatewayd.errors import GatewayError, printable
from gatewayd.frontends.fields import Fields
from gatewayd.frontends.peer import CancelOnHangup, Client
from gatewayd.sandbox.accounts import Account
from gatewayd.sandbox.boxes import Directory, Notice
from gatewayd.sandbox.exec_ws import Check, ExecSession, ExecSpec, Exit, InputDecoder
from gatewayd.tasks import TaskOwner

log = logging.getLogger(__name__)

TIMEOUT_MAX = 7 * 86400  # seconds a command may be given
INPUT_CHUNK = 65536  # characters of input in one message
CONTROL = {"INT": "\x03", "QUIT": "\x1c"}  # what a terminal sends instead of a signal
SIGNALS = frozenset({"KILL", "TERM", "HUP", "INT", "QUIT"})


def exec_spec(request: Fields) -> ExecSpec:
    """What a request asks to run. Raises GatewayError (usage)."""
    argv = request.texts("argv")
    command = request.text("command", "")
    pty = request.flag("pty")
    if argv is not None and "command" in request:
        raise GatewayError("command and argv exclude each other", kind=ErrorKind.USAGE)
    if argv is not None:
        if not argv:
            raise GatewayError("argv is empty", kind=ErrorKind.USAGE)
        command = shlex.join(argv)
    if not command and not pty:
        raise GatewayError("command or argv is missing", kind=ErrorKind.USAGE)
    return ExecSpec(
        command=command,
        env=request.mapping("env"),
        cwd=request.text("cwd", ""),
        shell=request.text("shell", ""),
        timeout=math.ceil(request.number("timeout", 0, most=TIMEOUT_MAX)),
        pty=pty,
        cols=request.whole("cols", 0, most=65535),
        rows=request.whole("rows", 0, most=65535),
        close_stdin=request.flag("close_stdin"),
    )


async def serve_exec(
    client: Client,
    account: Account,
    directory: Directory,
    sandbox: str,
    request: Fields,
    notice: Notice,
    check: Check | None = None,
) -> None:
    """Run a command until it has ended or the client has gone: that kills it. `check`: as in `ExecSession`.

    Raises:
        GatewayError: before the reply; afterwards failures are told in an ERROR frame.
    """
    session = ExecSession(account, directory, sandbox, exec_spec(request), check)
    tasks = TaskOwner(f"exec {sandbox}")
    async with contextlib.AsyncExitStack() as stack:  # all of it is closed, even if one of the steps is cancelled
        stack.push_async_callback(session.aclose)
        with CancelOnHangup(client.sock):
            await session.start(notice)
        stack.callback(client.close)  # before the session: its close may have to wait for the service
        stack.push_async_callback(tasks.aclose)
        await client.send({"ok": {"pid": session.pid, "command_id": session.command_id}})
        log.info("exec %s in %s opened", session.command_id[:8], sandbox)
        ways = {tasks.start(_outward(session, client), "out"), tasks.start(_inward(client, session), "in")}
        done, _ = await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        how = "; ".join(sorted(task.result() for task in done))
        log.info("exec %s in %s closed: %s", session.command_id[:8], sandbox, how)


async def _outward(session: ExecSession, client: Client) -> str:
    """Output, exit and failure to the client; how it ended."""
    try:
        while True:
            try:
                event = await session.receive()
            except GatewayError as exc:
                await client.write(error_frame(exc))
                return printable(exc.message, 200)
            if isinstance(event, Exit):
                await client.write(api.encode_json_frame(Frame.EXIT, {"exit_code": event.code}))
                return f"exit code {event.code}"
            kind = Frame.STDERR if event.stderr else Frame.STDOUT
            for start in range(0, len(event.data), api.FRAME_MAX):
                await client.write(api.encode_frame(kind, event.data[start : start + api.FRAME_MAX]))
    except OSError:
        return "the client is gone"


async def _inward(client: Client, session: ExecSession) -> str:
    """The client's frames to the command; returns when the client is gone or has sent nonsense."""
    decoder = api.FrameDecoder()
    text = InputDecoder()
    ended = False  # STDIN_EOF has been seen
    try:
        while data := await client.read():
            for kind, payload in decoder.feed(data):
                if kind == Frame.STDIN and not ended:
                    await _input(session, text.decode(payload))
                elif kind == Frame.STDIN_EOF and not ended:
                    ended = True
                    await _input(session, text.decode(b"", final=True))
                    await session.close_stdin()
                elif kind == Frame.RESIZE:
                    size = Fields(_object(payload))
                    await session.resize(size.whole("cols", least=1, most=65535), size.whole("rows", least=1, most=65535))
                elif kind == Frame.SIGNAL:
                    await _signal(session, Fields(_object(payload)).text("signal"), ended)
                elif kind != Frame.STDIN_EOF:
                    raise GatewayError(f"frame type {kind} does not go to the daemon", kind=ErrorKind.USAGE)
        if not ended:  # a client that ends its direction has ended the input
            await _input(session, text.decode(b"", final=True))
            await session.close_stdin()
        await client.gone()
    except (api.FrameError, GatewayError) as exc:
        error = exc if isinstance(exc, GatewayError) else GatewayError(str(exc), kind=ErrorKind.USAGE)
        with contextlib.suppress(OSError):
            await client.write(error_frame(error))
        return printable(error.message, 200)
    except OSError:
        pass
    return "the client is gone"


async def _input(session: ExecSession, text: str) -> None:
    for start in range(0, len(text), INPUT_CHUNK):
        await session.send_input(text[start : start + INPUT_CHUNK])


async def _signal(session: ExecSession, name: str, ended: bool) -> None:
    """A terminal gets the control character; otherwise the service knows one way to end a command, and that is SIGKILL."""
    name = name.removeprefix("SIG")
    if name not in SIGNALS:
        raise GatewayError(f"signal {printable(name, 16)} cannot be sent to a command", kind=ErrorKind.UNSUPPORTED)
    if session.pty and name in CONTROL and not ended:
        await session.send_input(CONTROL[name])
    else:
        await session.kill()


def error_frame(exc: GatewayError) -> bytes:
    """An ERROR frame."""
    return api.encode_json_frame(Frame.ERROR, api.error_body(exc.kind, exc.message, exc.hint)["error"])


def _object(payload: bytes) -> dict[str, Any]:
    try:
        data = json.loads(payload)
    except (ValueError, RecursionError):
        data = None
    if not isinstance(data, dict):
        raise GatewayError("the payload is not a JSON object", kind=ErrorKind.USAGE)
    return data

"""WS /execute/ws: a command's input and output as JSON messages, with reattachment (protocol section 2)."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import Mapping
from typing import Any

from fastapi import APIRouter, WebSocket
from pydantic import ValidationError
from starlette.websockets import WebSocketDisconnect, WebSocketState

from gatewayd.local.agentforward import AgentClient, AgentForward
from gatewayd.local.attachment import Attachment
from gatewayd.local.boxes import Boxes
from gatewayd.local.commands import CommandSession, TooManyClients
from gatewayd.local.envelope import ServiceError, error_response, printable
from gatewayd.local.execution import options_of, spawn, spawn_failure
from gatewayd.local.models import ExecuteMessage, ReconnectMessage
from gatewayd.local.registry import ExpiredCommand, TooManyCommands, UnknownCommand
from gatewayd.local.runtime.base import RuntimeFailure
from gatewayd.local.sandbox import Run, Sandbox
from gatewayd.tasks import TaskOwner

log = logging.getLogger(__name__)

FIRST_MESSAGE_DEADLINE = 10.0  # seconds for the client to say what it wants
LAST_MESSAGES_DEADLINE = 1.0  # seconds to read what a client sent before it went: a kill, for instance
GONE = "gone"  # key of the scope's state: an event, set when the connection is gone even if messages are left to receive
MAX_SIDE = 10000  # columns or rows of a terminal

router = APIRouter()


class CommandFailure(Exception):
    """The client is told with an ``error`` message, and the connection ends."""

    def __init__(self, error_type: str, message: str) -> None:
        super().__init__(message)
        self.error_type = error_type
        self.message = printable(message)


@router.websocket("/dataplane/{box_id}/execute/ws")
async def execute_ws(ws: WebSocket, box_id: str) -> None:
    """One client of one command."""
    boxes: Boxes = ws.app.state.boxes
    try:
        sandbox = boxes.by_id(box_id)
        with sandbox.in_use():
            run = await boxes.running(sandbox)
            await ws.accept()
            with contextlib.suppress(WebSocketDisconnect):
                await _serve(ws, sandbox, run)
    except ServiceError as exc:
        if ws.application_state is WebSocketState.CONNECTING:
            await ws.send_denial_response(error_response(exc, f"WS {ws.url.path}"))
        else:
            raise


async def _serve(ws: WebSocket, sandbox: Sandbox, run: Run) -> None:
    try:
        attachment, session = await _begin(await _first_message(ws), sandbox, run)
    except CommandFailure as exc:
        log.info("sandbox %s: exec refused: %s: %s", sandbox.record.name, exc.error_type, exc.message)
        await _send(ws, {"type": "error", "error_type": exc.error_type, "error": exc.message})
        await ws.close()
        return
    log.info("sandbox %s: command %s: client attached", sandbox.record.name, printable(session.command_id))
    try:
        await _attached(ws, session, attachment)
    finally:
        attachment.close()
        state = "it runs on" if session.outcome is None else session.outcome.error_type or f"exit {session.outcome.exit_code}"
        log.info("sandbox %s: command %s: client gone (%s)", sandbox.record.name, printable(session.command_id), state)


async def _first_message(ws: WebSocket) -> Mapping[str, Any]:
    try:
        async with asyncio.timeout(FIRST_MESSAGE_DEADLINE):
            return _message(await ws.receive_text())
    except TimeoutError as exc:
        raise CommandFailure("CommandError", f"no message within {FIRST_MESSAGE_DEADLINE:g} s") from exc
    except KeyError as exc:
        raise CommandFailure("CommandError", "messages are text") from exc


def _message(text: str) -> Mapping[str, Any]:
    try:
        message = json.loads(text)
    except (ValueError, RecursionError) as exc:
        raise CommandFailure("CommandError", f"a message is not JSON: {exc}") from exc
    if not isinstance(message, dict):
        raise CommandFailure("CommandError", "a message is a JSON object")
    return message


async def _begin(message: Mapping[str, Any], sandbox: Sandbox, run: Run) -> tuple[Attachment, CommandSession]:
    """Start or take up the command that the first message asks for, and attach."""
    kind = message.get("type")
    try:
        if kind == "execute":
            wanted = ExecuteMessage.model_validate(message)
            options = options_of(wanted, kill_on_disconnect=wanted.kill_on_disconnect)
            agent = AgentForward() if wanted.ssh_agent_forward else None
            session = await run.commands.get_or_start(
                wanted.command_id, options, lambda: spawn(run.box, sandbox.record, wanted, pty=wanted.pty, agent=agent), agent
            )
            if wanted.close_stdin:
                session.close_stdin()
            return session.attach(agent=wanted.ssh_agent_forward), session
        if kind == "reconnect":
            again = ReconnectMessage.model_validate(message)
            session = run.commands.get(again.command_id)
            return session.attach(again.stdout_offset, again.stderr_offset, agent=True), session
    except ValidationError as exc:
        raise CommandFailure("CommandError", _describe(exc)) from exc
    except ExpiredCommand as exc:
        raise CommandFailure("SessionExpired", f"the session of command {exc} has expired") from exc
    except UnknownCommand as exc:
        raise CommandFailure("CommandNotFound", f"there is no command {exc}") from exc
    except (TooManyCommands, TooManyClients) as exc:
        raise CommandFailure("CommandError", str(exc)) from exc
    except (OSError, RuntimeFailure) as exc:
        raise CommandFailure("CommandError", spawn_failure(exc)) from exc
    raise CommandFailure("CommandError", f"the first message is execute or reconnect, not {str(kind)[:40]!r}")


def _describe(exc: ValidationError) -> str:
    problems = []
    for error in exc.errors()[:5]:
        place = ".".join(map(str, error["loc"])) or "message"
        problems.append(f"{place}: {error['msg'].removeprefix('Value error, ')}")
    return "; ".join(problems)


async def _attached(ws: WebSocket, session: CommandSession, attachment: Attachment) -> None:
    """Carry messages both ways until the command has ended or the client has gone."""
    owner = TaskOwner(f"exec {session.command_id}")
    started = asyncio.Event()  # the client knows that it is attached: what follows may come in any order
    sending = owner.start(_send_output(ws, session, attachment, started), "send")
    receiving = owner.start(_receive_input(ws, session, attachment), "receive")
    if attachment.agent is not None:
        owner.start(_send_agent(ws, attachment.agent, started), "agent")
    gone = owner.start(ws.scope["state"][GONE].wait(), "watch")
    try:
        await asyncio.wait({sending, receiving, gone}, return_when=asyncio.FIRST_COMPLETED)
        if gone.done() or (sending.done() and not sending.result()):
            # what the client sent before it went may still be there to be read, unless the command does not take its input
            await asyncio.wait({receiving}, timeout=LAST_MESSAGES_DEADLINE)
    finally:
        await owner.aclose()


async def _send_output(ws: WebSocket, session: CommandSession, attachment: Attachment, started: asyncio.Event) -> bool:
    """Send everything up to the end of the command; False when the client has gone before that."""
    try:
        await _send(ws, {"type": "started", "command_id": session.command_id, "pid": session.process.pid})
        started.set()
        while chunks := await attachment.read():
            for chunk in chunks:
                await _send(ws, {"type": chunk.stream, "data": chunk.text, "offset": chunk.offset})
        outcome = session.outcome
        if outcome is not None and outcome.error_type:
            await _send(ws, {"type": "error", "error_type": outcome.error_type, "error": outcome.error})
        elif outcome is not None:
            await _send(ws, {"type": "exit", "exit_code": outcome.exit_code})
        await ws.close()
    except (WebSocketDisconnect, RuntimeError):  # RuntimeError: a send after the close
        return False
    return True


async def _send_agent(ws: WebSocket, agent: AgentClient, started: asyncio.Event) -> None:
    """Pass on what processes inside ask the client's SSH agent."""
    with contextlib.suppress(WebSocketDisconnect, RuntimeError):
        await started.wait()
        while True:
            message = await agent.next()
            await _send(ws, message.fields())
            agent.sent(message)


async def _receive_input(ws: WebSocket, session: CommandSession, attachment: Attachment) -> None:
    """Act on the client's messages until it goes. Unknown ones are ignored: later clients may send more."""
    with contextlib.suppress(WebSocketDisconnect, RuntimeError):
        while True:
            received = await ws.receive()
            if received["type"] == "websocket.disconnect":
                return
            try:
                await _act(_message(received.get("text") or ""), session, attachment)
            except CommandFailure as exc:
                log.info("command %s: message ignored: %s", printable(session.command_id), exc.message)


async def _act(message: Mapping[str, Any], session: CommandSession, attachment: Attachment) -> None:
    """Do what a message says. Raises CommandFailure where its sender should know better."""
    kind = message.get("type")
    if kind == "input" and isinstance(data := message.get("data"), str):
        await session.send_input(data.encode("utf-8", "replace"))
    elif kind == "close_stdin":
        session.close_stdin()
    elif kind == "kill":
        await session.kill()
    elif kind == "resize":
        cols, rows = message.get("cols"), message.get("rows")
        if isinstance(cols, int) and isinstance(rows, int) and 0 < cols <= MAX_SIDE and 0 < rows <= MAX_SIDE:
            await session.resize(cols, rows)
    elif kind in ("ssh_agent_data", "ssh_agent_close"):
        problem = attachment.agent.receive(message) if attachment.agent is not None else None
        if problem is not None:
            raise CommandFailure("CommandError", problem)


async def _send(ws: WebSocket, message: Mapping[str, Any]) -> None:
    await ws.send_text(json.dumps(message, ensure_ascii=False, separators=(",", ":")))

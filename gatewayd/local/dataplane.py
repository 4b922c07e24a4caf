"""POST /execute: run a command and answer when it has ended (protocol section 2)."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter, Request

from gatewayd.local.attachment import Attachment
from gatewayd.local.commands import CommandOptions, CommandSession
from gatewayd.local.envelope import ServiceError
from gatewayd.local.exec_sse import gone
from gatewayd.local.execution import spawn, spawn_failure
from gatewayd.local.models import ExecuteBody
from gatewayd.local.registry import TooManyCommands
from gatewayd.local.rest_server import boxes_of
from gatewayd.local.runtime.base import RuntimeFailure
from gatewayd.tasks import TaskOwner

MAX_OUTPUT = 16 * 1024 * 1024  # bytes of each stream in one answer; /execute/ws has no such limit

router = APIRouter()


@router.post("/dataplane/{box_id}/execute")
async def execute(request: Request, box_id: str, body: ExecuteBody) -> dict[str, Any]:
    """Run a command with an empty stdin; its output as text. It is killed when the client goes away."""
    boxes = boxes_of(request)
    sandbox = boxes.by_id(box_id)
    if not body.command:
        raise ServiceError(400, "CommandError", "a command is needed")
    with sandbox.in_use():
        run = await boxes.running(sandbox)
        options = CommandOptions(timeout=body.timeout or None, idle_timeout=60.0, ttl=0.0, kill_on_disconnect=True)
        try:
            session = await run.commands.get_or_start(None, options, lambda: spawn(run.box, sandbox.record, body))
        except (OSError, RuntimeFailure, TooManyCommands) as exc:
            raise ServiceError(400, "CommandError", spawn_failure(exc)) from exc
        attachment = session.attach()
        try:
            session.close_stdin()
            output = await _collect(request, attachment)
        finally:
            attachment.close()
    return _answer(session, output)


def _answer(session: CommandSession, output: dict[str, str] | None) -> dict[str, Any]:
    outcome = session.outcome
    if output is None or outcome is None:
        message = f"the command wrote more than {MAX_OUTPUT} bytes and was killed; /execute/ws has no such limit"
        raise ServiceError(400, "CommandError", message)
    if outcome.error_type:
        raise ServiceError(408, "CommandError", outcome.error)
    return {**output, "exit_code": outcome.exit_code}


async def _collect(request: Request, attachment: Attachment) -> dict[str, str] | None:
    """All output until the end of the command, or of the client; None when there is too much."""
    owner = TaskOwner("execute")
    leaving = owner.start(gone(request.receive), "watch client")
    reading = owner.start(_read_all(attachment), "read output")
    try:
        await asyncio.wait({leaving, reading}, return_when=asyncio.FIRST_COMPLETED)
        if not reading.done():
            raise ServiceError(400, "CommandError", "the client went away; the command was killed")
        output: dict[str, str] | None = reading.result()
        return output
    finally:
        await owner.aclose()


async def _read_all(attachment: Attachment) -> dict[str, str] | None:
    parts: dict[str, list[str]] = {"stdout": [], "stderr": []}
    sizes = {"stdout": 0, "stderr": 0}
    while chunks := await attachment.read():
        for chunk in chunks:
            parts[chunk.stream].append(chunk.text)
            sizes[chunk.stream] += chunk.size
            if sizes[chunk.stream] > MAX_OUTPUT:
                return None
    return {name: "".join(texts) for name, texts in parts.items()}

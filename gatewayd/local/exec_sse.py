"""POST /execute/stream/start and /resume: a command's output as Server-Sent Events, byte for byte (protocol section 2).

The stream runs one way, so the client cannot say what it has got while it reads. Output is kept until a resume acknowledges it;
when the ring is full of what was sent, ``ack_required`` ends the response, and the offsets of the next resume make room.
"""

from __future__ import annotations

import asyncio
import base64
import json
import logging
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from gatewayd.local.attachment import Attachment, Piece
from gatewayd.local.boxes import Boxes
from gatewayd.local.commands import CommandSession, TooManyClients
from gatewayd.local.envelope import ServiceError, printable
from gatewayd.local.execution import options_of, spawn, spawn_failure
from gatewayd.local.models import ReconnectMessage, StreamBody
from gatewayd.local.registry import ExpiredCommand, TooManyCommands, UnknownCommand
from gatewayd.local.rest_server import boxes_of
from gatewayd.local.runtime.base import RuntimeFailure
from gatewayd.local.sandbox import Sandbox
from gatewayd.tasks import TaskOwner

log = logging.getLogger(__name__)

HEARTBEAT = 15.0  # seconds of silence after which a comment says that the connection lives
MEDIA_TYPE = "text/event-stream"
HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}

router = APIRouter()


@router.post("/dataplane/{box_id}/execute/stream/start", response_class=Response)
async def start_stream(request: Request, box_id: str, body: StreamBody) -> Response:
    """Start a command with an empty stdin, or find the one with that command_id, and stream its output."""
    boxes = boxes_of(request)
    sandbox = boxes.by_id(box_id)
    with sandbox.in_use():
        run = await boxes.running(sandbox)
        try:
            session = await run.commands.get_or_start(
                body.command_id, options_of(body), lambda: spawn(run.box, sandbox.record, body)
            )
        except ExpiredCommand as exc:
            return _expired(exc)
        except (OSError, RuntimeFailure, TooManyCommands) as exc:
            raise ServiceError(400, "CommandError", spawn_failure(exc)) from exc
        session.close_stdin()
        return _stream(boxes, sandbox, session, 0, 0)


@router.post("/dataplane/{box_id}/execute/stream/resume", response_class=Response)
async def resume_stream(request: Request, box_id: str, body: ReconnectMessage) -> Response:
    """Stream a command's output from these offsets on. What is before them is acknowledged and may be forgotten."""
    boxes = boxes_of(request)
    sandbox = boxes.by_id(box_id)
    with sandbox.in_use():
        run = await boxes.running(sandbox)
        try:
            session = run.commands.get(body.command_id)
        except ExpiredCommand as exc:
            return _expired(exc)
        except UnknownCommand as exc:
            raise ServiceError(404, "CommandNotFound", f"there is no command {body.command_id}") from exc
        return _stream(boxes, sandbox, session, body.stdout_offset, body.stderr_offset)


async def gone(receive: Receive) -> None:
    """Return when the client has gone away; the request's body was read before."""
    while (await receive())["type"] != "http.disconnect":
        pass


def event(name: str, **data: Any) -> bytes:
    """One event in its wire form."""
    return b"event: %s\ndata: %s\n\n" % (name.encode(), json.dumps(data, separators=(",", ":")).encode())


def output_event(piece: Piece) -> bytes:
    """A piece of output in its wire form."""
    line = b'event: %s\ndata: {"offset":%d,"data":"%s"}\n\n'
    return line % (piece.stream.encode(), piece.offset, base64.b64encode(piece.data))


def _expired(exc: ExpiredCommand) -> Response:
    message = f"the session of command {exc} has expired"
    return Response(event("error", error_type="SessionExpired", error=message), headers=HEADERS, media_type=MEDIA_TYPE)


def _stream(boxes: Boxes, sandbox: Sandbox, session: CommandSession, stdout_offset: int, stderr_offset: int) -> Response:
    try:
        attachment = session.attach(stdout_offset, stderr_offset, acknowledges=True)
    except TooManyClients as exc:
        raise ServiceError(400, "CommandError", str(exc)) from exc
    log.info("sandbox %s: command %s: stream attached", sandbox.record.name, printable(session.command_id))
    return _EventStream(boxes, sandbox, session, attachment)


class _EventStream(Response):
    """Sends a session's output until it ends, an acknowledgement is needed, the client goes or the service ends."""

    media_type = MEDIA_TYPE

    def __init__(self, boxes: Boxes, sandbox: Sandbox, session: CommandSession, attachment: Attachment) -> None:
        super().__init__(headers=HEADERS)
        del self.headers["content-length"]
        self._boxes = boxes
        self._sandbox = sandbox  # in use as long as the response lasts
        self._session = session
        self._attachment = attachment  # closed at the end of the response

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        owner = TaskOwner(f"stream {self._session.command_id}")
        try:
            with self._sandbox.in_use():
                await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
                leaving = owner.start(gone(receive), "watch client")
                sending = owner.start(self._send_all(send), "send")
                ending = owner.start(self._boxes.ending.wait(), "watch service")
                await asyncio.wait({leaving, sending, ending}, return_when=asyncio.FIRST_COMPLETED)
                left = leaving.done()
                await owner.aclose()
                if left:
                    return
                if sending.cancelled() or not sending.result():
                    message = "the service is ending"
                    await self._send(send, event("error", error_type="ServerShuttingDown", error=message))
                await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            await owner.aclose()
            self._attachment.close()
            log.info("sandbox %s: command %s: stream ended", self._sandbox.record.name, printable(self._session.command_id))

    @staticmethod
    async def _send(send: Send, data: bytes) -> None:
        await send({"type": "http.response.body", "body": data, "more_body": True})

    async def _send_all(self, send: Send) -> bool:
        """Send everything up to the event that ends the response; False when the service ends before that."""
        session, attachment = self._session, self._attachment
        await self._send(send, event("started", command_id=session.command_id, pid=session.process.pid))
        ended: set[str] = set()  # streams whose end was told
        while not self._boxes.ending.is_set():
            attachment.wake.clear()
            outcome = session.outcome
            if pieces := attachment.take_bytes():
                for piece in pieces:
                    await self._send(send, output_event(piece))
                continue
            blocked = session.blocked
            for cursor in attachment.cursors:
                if cursor.name not in ended and cursor.pipe.eof:
                    ended.add(cursor.name)
                    await self._send(send, event("stream_end", stream=cursor.name, offset=cursor.offset))
            if outcome is not None and outcome.error_type:
                await self._send(send, event("error", error_type=outcome.error_type, error=outcome.error))
                return True
            if outcome is not None:
                await self._send(send, event("exit", exit_code=outcome.exit_code))
                return True
            if blocked:
                offsets = {f"{cursor.name}_offset": cursor.offset for cursor in attachment.cursors}
                await self._send(send, event("ack_required", **{"stdout_offset": 0, "stderr_offset": 0, **offsets}))
                return True
            await self._wait(send)
        return False

    async def _wait(self, send: Send) -> None:
        """Until there may be something new, with a heartbeat when that takes long."""
        try:
            async with asyncio.timeout(HEARTBEAT):
                await self._attachment.wake.wait()
        except TimeoutError:
            await self._send(send, b": heartbeat\n\n")

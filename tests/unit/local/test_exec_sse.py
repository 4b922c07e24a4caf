"""One response of events over a session on pipes: its order, its heartbeat, its acknowledgements, its end."""

from __future__ import annotations

import asyncio
import base64
import json
import os
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest

from gatewayd.local import commands, exec_sse
from gatewayd.local.boxes import Boxes
from gatewayd.local.commands import CommandSession
from gatewayd.local.sandbox import Sandbox
from gatewayd.local.store import Record, now
from gatewayd.tasks import TaskOwner

if TYPE_CHECKING:
    from tests.unit.local.conftest import MakeSession


class Client:
    """The other side of one response."""

    def __init__(self) -> None:
        self.ending = asyncio.Event()  # the service ends
        self.leave = asyncio.Event()  # the client hangs up
        self.body = b""
        self.changed = asyncio.Event()  # body grew
        self.complete = False
        self.sandbox = Sandbox(Record("id", "name", "ready", now(), now(), 60, 0))
        self._tasks = TaskOwner("client")

    def open(self, session: CommandSession, *offsets: int) -> asyncio.Task[None]:
        """Ask for the events of a session."""
        boxes = cast("Boxes", SimpleNamespace(ending=self.ending))
        stdout, stderr = offsets or (0, 0)
        response = exec_sse._stream(boxes, self.sandbox, session, stdout, stderr)
        return self._tasks.start(response({"type": "http"}, self._receive, self._send), "response")

    async def _receive(self) -> Any:
        await self.leave.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Any) -> None:
        if message["type"] == "http.response.body":
            self.body += message["body"]
            self.complete = not message["more_body"]
            self.changed.set()

    async def until(self, text: bytes) -> None:
        """Wait until the body has it."""
        async with asyncio.timeout(5):
            while text not in self.body:
                self.changed.clear()
                await self.changed.wait()

    @property
    def events(self) -> list[tuple[str, dict[str, Any]]]:
        """What came, comments aside."""
        found = []
        for block in self.body.decode().split("\n\n"):
            name, _, data = block.partition("\n")
            if name.startswith("event: "):
                found.append((name.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
        return found


async def test_order_of_events(make_session: MakeSession) -> None:
    session, process = make_session()
    client = Client()
    response = client.open(session)
    os.write(process.their_stdout, b"\xff\x00\n")
    await client.until(b"event: stdout")
    process.close(process.their_stderr)
    await client.until(b"stream_end")
    process.end(3)
    await asyncio.wait_for(response, 5)
    assert client.complete
    assert client.events == [
        ("started", {"command_id": session.command_id, "pid": 4242}),
        ("stdout", {"offset": 0, "data": base64.b64encode(b"\xff\x00\n").decode()}),
        ("stream_end", {"stream": "stderr", "offset": 0}),
        ("stream_end", {"stream": "stdout", "offset": 3}),
        ("exit", {"exit_code": 3}),
    ]


async def test_silence_is_broken_by_a_comment(make_session: MakeSession, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exec_sse, "HEARTBEAT", 0.01)
    session, process = make_session()
    client = Client()
    response = client.open(session)
    await client.until(b": heartbeat\n\n: heartbeat\n\n")
    process.end(0)
    await asyncio.wait_for(response, 5)
    assert client.events[-1] == ("exit", {"exit_code": 0})


async def test_a_full_ring_asks_for_an_acknowledgement(make_session: MakeSession) -> None:
    session, process = make_session(capacity=1000)
    os.write(process.their_stdout, b"x" * 2500)
    received = 0
    for _ in range(2):
        client = Client()
        await asyncio.wait_for(client.open(session, received, 0), 5)
        assert client.events[-1] == ("ack_required", {"stdout_offset": received + 1000, "stderr_offset": 0})
        received += 1000
        await asyncio.sleep(0.02)
        assert session.stdout.ring.end == received  # nobody reads on, though nobody is attached
    process.end(0)
    client = Client()
    await asyncio.wait_for(client.open(session, received, 0), 5)
    assert client.events[1] == ("stdout", {"offset": 2000, "data": base64.b64encode(b"x" * 500).decode()})
    assert client.events[-1] == ("exit", {"exit_code": 0})


async def test_a_client_that_stays_away_frees_the_command(make_session: MakeSession, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands, "HOLD", 0.05)
    session, process = make_session(capacity=1000)
    os.write(process.their_stdout, b"x" * 2500)
    await asyncio.wait_for(Client().open(session), 5)
    process.end(0)
    await asyncio.wait_for(session.finished.wait(), 5)
    assert (session.stdout.ring.start, session.stdout.ring.end) == (1500, 2500)


async def test_a_client_of_the_other_kind_takes_the_command_over(make_session: MakeSession) -> None:
    session, process = make_session(capacity=1000)
    os.write(process.their_stdout, b"x" * 2500)
    await asyncio.wait_for(Client().open(session), 5)
    attachment = session.attach(1000, 0)
    assert (await asyncio.wait_for(attachment.read(), 5))[0].offset == 1000
    process.end(0)
    async with asyncio.timeout(5):
        while await attachment.read():
            pass
    attachment.close()


async def test_a_client_that_goes_leaves_the_command_alone(make_session: MakeSession) -> None:
    session, process = make_session()
    client = Client()
    response = client.open(session)
    await client.until(b"started")
    assert session.attached == 1
    client.leave.set()
    await asyncio.wait_for(response, 5)
    assert (session.attached, process.signals, session.outcome) == (0, [], None)


async def test_the_end_of_the_service_is_told(make_session: MakeSession) -> None:
    session, _ = make_session()
    client = Client()
    response = client.open(session)
    await client.until(b"started")
    client.ending.set()
    await asyncio.wait_for(response, 5)
    assert client.complete
    assert [(name, data.get("error_type")) for name, data in client.events[1:]] == [("error", "ServerShuttingDown")]


async def test_bytes_are_read_to_the_end(make_session: MakeSession) -> None:
    session, process = make_session()
    attachment = session.attach()
    os.write(process.their_stdout, b"\xe2\x82")
    [piece] = await asyncio.wait_for(attachment.read_bytes(), 5)
    assert (piece.stream, piece.offset, piece.data) == ("stdout", 0, b"\xe2\x82")
    process.end(0)
    assert await asyncio.wait_for(attachment.read_bytes(), 5) == []
    attachment.close()

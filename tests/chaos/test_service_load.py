"""Much at once: on one sandbox, of sandboxes, and one after the other. What comes out is right; what was used is given back."""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from typing import TYPE_CHECKING, Any

import httpx2
import pytest
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

from gatewayd.yamux.aio import Mux, MuxStream
from tests.chaos.load import BOXES
from tests.chaos.remains import Footprint, footprint

if TYPE_CHECKING:
    from tests.chaos.conftest import Start
    from tests.sdk.conftest import Service

PORT = 7000
DEADLINE = 100.0  # seconds for everything that happens at once
SETTLE_DEADLINE = 20.0  # seconds
MOST_DATABASE = 6 << 20  # bytes of the state file and its log, which SQLite lets grow to 1,000 pages before it starts again

# Answers every connection, when it has ended sending, with what it sent and the hash of that.
SERVER = f"""
import asyncio, hashlib

async def serve(reader, writer):
    data = await reader.read()
    while chunk := await reader.read():
        data += chunk
    writer.write(data + hashlib.sha256(data).digest())
    await writer.drain()
    writer.close()

async def main():
    async with await asyncio.start_server(serve, "127.0.0.1", {PORT}, backlog=2048) as server:
        print("listening", flush=True)
        await server.serve_forever()

asyncio.run(main())
"""


class Wire:
    """`MessageTransport` over a WebSocket."""

    def __init__(self, ws: ClientConnection) -> None:
        self._ws = ws

    async def send(self, data: bytes) -> None:
        await self._ws.send(data)

    async def recv(self) -> bytes:
        try:
            message = await self._ws.recv()
        except ConnectionClosed as exc:
            raise EOFError from exc
        assert isinstance(message, bytes)
        return message

    async def close(self) -> None:
        await self._ws.close()


def http_of(service: Service) -> httpx2.AsyncClient:
    """A client that asks many things at the same time."""
    limits = httpx2.Limits(max_connections=200)
    return httpx2.AsyncClient(base_url=service.endpoint, headers={"X-Api-Key": service.key}, timeout=DEADLINE, limits=limits)


def socket_of(service: Service, box: str, path: str) -> connect:
    """A WebSocket of a sandbox's data plane."""
    url = f"{service.endpoint.replace('http', 'ws', 1)}/dataplane/{box}/{path}"
    return connect(url, additional_headers={"X-Api-Key": service.key}, compression=None, max_size=None)


def numbers(first: int, last: int) -> str:
    """What `seq` prints."""
    return "".join(f"{number}\n" for number in range(first, last + 1))


async def many_commands(service: Service, box: str, count: int) -> None:
    """Commands at the same time, each with its own output, exit code and environment."""
    async with http_of(service) as http:

        async def one(index: int) -> None:
            body = {"command": "seq $I 3000; echo $I >&2; exit $((I % 7))", "env": {"I": str(index)}, "timeout": DEADLINE}
            answer = (await http.post(f"/dataplane/{box}/execute", json=body)).json()
            assert answer == {"stdout": numbers(index, 3000), "stderr": f"{index}\n", "exit_code": index % 7}

        await asyncio.gather(*(one(index) for index in range(count)))


async def many_streams(service: Service, box: str, count: int) -> None:
    """Streams of one tunnel, all open before the first of them sends."""
    async with socket_of(service, box, "tunnel") as ws:
        mux = Mux(Wire(ws), client=True, name="load")
        running = asyncio.ensure_future(mux.run())

        async def dial() -> MuxStream:
            stream = await mux.open_stream()
            await stream.write(bytes((1, *PORT.to_bytes(2, "big"))))
            assert await stream.read(1) == b"\0"
            return stream

        async def talk(index: int, stream: MuxStream) -> None:
            sent = hashlib.sha256(str(index).encode()).digest() * (index % 512)
            await stream.write(sent)
            await stream.write_eof()
            got = b""
            while chunk := await stream.read():
                got += chunk
            assert got == sent + hashlib.sha256(sent).digest()
            await stream.aclose()

        streams = await asyncio.gather(*(dial() for _ in range(count)))
        assert len({stream.id for stream in streams}) == count
        await asyncio.gather(*(talk(index, stream) for index, stream in enumerate(streams)))
        await mux.aclose()
        await running


async def bulk_by_websocket(service: Service, box: str, last: int) -> None:
    """One command's output of many megabytes: no byte is missing, none twice, and the offsets say so."""
    digest, size = hashlib.sha256(), 0
    async with socket_of(service, box, "execute/ws") as ws:
        await ws.send(json.dumps({"type": "execute", "command": f"seq {last}"}))
        while (message := json.loads(await ws.recv()))["type"] != "exit":
            if message["type"] == "stdout":
                assert message["offset"] == size
                digest.update(data := message["data"].encode())
                size += len(data)
    assert message["exit_code"] == 0
    assert digest.hexdigest() == hashlib.sha256(numbers(1, last).encode()).hexdigest()


async def bulk_by_events(made: Any, last: int) -> None:
    """The same as Server-Sent Events, by the SDK, which acknowledges and resumes."""
    result = await asyncio.to_thread(made.run, f"seq {last}", timeout=int(DEADLINE))
    assert result.exit_code == 0
    assert hashlib.sha256(result.stdout.encode()).digest() == hashlib.sha256(numbers(1, last).encode()).digest()


@pytest.mark.parametrize(
    ("commands", "streams", "last"), [(100, 1000, 700_000), pytest.param(100, 1000, 5_000_000, marks=pytest.mark.slow)]
)
async def test_one_sandbox_under_everything_at_once(
    start: Start, monkeypatch: pytest.MonkeyPatch, commands: int, streams: int, last: int
) -> None:
    service = start()
    monkeypatch.setenv("LANGSMITH_EXPERIMENTAL_FEATURES", "sandbox_sse_exec")
    with service.client() as client, client.sandbox() as made:
        before = footprint(service.process.pid, service.state_dir)
        made.write("/srv/server.py", SERVER)
        made.run("python3 /srv/server.py >/srv/log 2>&1 </dev/null & until grep -qs listening /srv/log; do sleep 0.02; done")
        async with asyncio.timeout(DEADLINE), asyncio.TaskGroup() as group:
            group.create_task(many_commands(service, made.id, commands))
            group.create_task(many_streams(service, made.id, streams))
            group.create_task(bulk_by_websocket(service, made.id, last))
            group.create_task(bulk_by_events(made, last))
        made.run("pkill -f server.py")
        as_before(service, before)


def as_before(service: Service, before: Footprint) -> None:
    """Wait for what the service does after it has answered: it must come to occupy no more than it did."""
    end = time.monotonic() + SETTLE_DEADLINE
    while (excess := footprint(service.process.pid, service.state_dir).beyond(before)) and time.monotonic() < end:
        time.sleep(0.05)
    assert excess == {}


async def test_many_sandboxes_at_once(start: Start) -> None:
    service, count = start(), 50
    before = footprint(service.process.pid, service.state_dir)
    async with http_of(service) as http:

        async def one(index: int) -> str:
            body = {"name": f"box-{index}", "wait_for_ready": True, "timeout": DEADLINE}
            answer = await http.post(BOXES, json=body)
            assert answer.status_code == 200, answer.text
            box: str = answer.json()["id"]
            command = {"command": "hostname; echo $$ > /srv/mine; ls /srv"}
            ran = (await http.post(f"/dataplane/{box}/execute", json=command)).json()
            assert ran == {"stdout": f"box-{index}\nmine\n", "stderr": "", "exit_code": 0}
            return box

        async with asyncio.timeout(DEADLINE):
            boxes = await asyncio.gather(*(one(index) for index in range(count)))
            assert len(set(boxes)) == count
            statuses = [box["status"] for box in (await http.get(BOXES)).json()["sandboxes"]]
            assert statuses == ["ready"] * count
            answers = await asyncio.gather(*(http.delete(f"{BOXES}/{box}") for box in boxes))
        assert [answer.status_code for answer in answers] == [204] * count
    as_before(service, before)


def sizes(service: Service) -> tuple[int, int]:
    """Bytes of the state folder: the database's, and all else."""
    found = [(path.name.startswith("state.db"), path.lstat().st_size) for path in service.state_dir.rglob("*")]
    return sum(size for mine, size in found if mine), sum(size for mine, size in found if not mine)


@pytest.mark.parametrize("cycles", [10, pytest.param(200, marks=[pytest.mark.slow, pytest.mark.timeout(600)])])
def test_creating_and_deleting_leaves_nothing(start: Start, cycles: int) -> None:
    service = start()
    before, (_, size) = footprint(service.process.pid, service.state_dir), sizes(service)
    with service.client() as client:
        for _ in range(cycles):
            with client.sandbox() as made:
                made.write("/srv/file", b"x" * 100_000)
                assert made.run("cat /srv/file | wc -c; sleep 1000 >/dev/null 2>&1 </dev/null &").stdout == "100000\n"
        assert client.list_sandboxes() == []
    as_before(service, before)
    database, rest = sizes(service)
    assert database < MOST_DATABASE
    assert rest == size

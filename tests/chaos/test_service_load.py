"""Much at once: on one sandbox, of sandboxes, and one after the other. What comes out is right; what was used is given back."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

import pytest

from tests.chaos.crowd import DEADLINE, bulk_by_websocket, http_of, many_commands, many_streams, prepare
from tests.chaos.load import BOXES
from tests.chaos.paced import BLOCK, PRODUCER, PROGRAM, RATE, STOP, Reader
from tests.chaos.remains import Footprint, footprint

if TYPE_CHECKING:
    from tests.chaos.conftest import Start
    from tests.sdk.conftest import Service

SETTLE_DEADLINE = 20.0  # seconds
MOST_DATABASE = 6 << 20  # bytes of the state file and its log, which SQLite lets grow to 1,000 pages before it starts again


@pytest.mark.parametrize(
    ("commands", "streams", "last", "seconds"),
    [(100, 1000, 700_000, 5.0), pytest.param(100, 1000, 5_000_000, 20.0, marks=pytest.mark.slow)],
)
async def test_one_sandbox_under_everything_at_once(start: Start, commands: int, streams: int, last: int, seconds: float) -> None:
    """Output flows, at 20 MB/s by the clock of the program that makes it, before all else begins and until all else has ended."""
    service = start()
    with service.client() as client, client.sandbox() as made:
        before = footprint(service.process.pid, service.state_dir)
        prepare(made)
        made.write(PROGRAM, PRODUCER)
        async with asyncio.timeout(DEADLINE), Reader(service.endpoint, service.key, made.id, seconds=seconds) as reader:
            async with asyncio.TaskGroup() as group:
                group.create_task(many_commands(service, made.id, commands))
                group.create_task(many_streams(service, made.id, streams))
                group.create_task(bulk_by_websocket(service, made.id, last))
            await asyncio.to_thread(made.write, STOP, b"")
            report = await reader.report()
        print(report)
        assert report.exit_code == 0
        assert report.blocks == report.said_blocks
        assert report.blocks * BLOCK >= RATE * seconds
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
    """Bytes of the state folder: the database's, and all else but bases; packages installed meanwhile make another base."""
    paths = [path for path in service.state_dir.rglob("*") if "bases" not in path.relative_to(service.state_dir).parts]
    found = [(path.name.startswith("state.db"), path.lstat().st_size) for path in paths]
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

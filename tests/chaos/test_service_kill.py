"""`kill -9` of a busy service at random moments: what it promised holds after the next start, and nothing is left behind."""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import secrets
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from tests.chaos.load import BOXES, Ledger, Load
from tests.chaos.remains import Footprint, disks, footprint, groups, loops, mounts, orphans, rows, trash
from tests.sdk.conftest import wait_until

if TYPE_CHECKING:
    from tests.chaos.conftest import Start
    from tests.sdk.conftest import Service

SEED = "GATEWAYD_CHAOS_SEED"  # in the environment: repeat a run
MOST_ANSWERS = 40  # the service is killed after at most that many answers
LATEST = 3.0  # seconds of load after which it is killed at the latest
ROUND_DEADLINE = 60.0  # seconds


@pytest.mark.parametrize("rounds", [5, pytest.param(50, marks=[pytest.mark.slow, pytest.mark.timeout(900)])])
async def test_a_service_killed_at_random_moments_keeps_its_promises(start: Start, rounds: int) -> None:
    seed = int(os.environ.get(SEED) or secrets.randbits(32))
    rng, names, ledger = random.Random(seed), itertools.count(1), Ledger()  # noqa: S311 - repeatable, not secret
    print(f"{SEED}={seed}")
    service = start()
    idle = footprint(service.process.pid, service.state_dir)
    for number in range(1, rounds + 1):
        answers = rng.randrange(MOST_ANSWERS)
        print(f"round {number}: killed after {answers} answers")
        await killed_under_load(service, answers, Load(service.endpoint, service.key, ledger, rng, names))
        service.log.rename(service.log.with_suffix(f".{number}.log"))
        key, service = service.key, start()
        assert service.key == key
        check_books(service, ledger)
        check_nothing_is_left(service, idle)
        check_files(service, ledger, rng.sample(ledger.living, min(2, len(ledger.living))))
    check_files(service, ledger, ledger.living)
    print(ledger.counts)
    with service.client() as client:
        for box in ledger.living:
            client.delete_sandbox(box)
    assert rows(service.state_dir) == {}
    assert disks(service.state_dir) == set()
    check_nothing_is_left(service, idle)


@pytest.mark.parametrize("sandboxes", [0, 3])
def test_a_killed_service_that_does_not_come_back_leaves_nothing(start: Start, sandboxes: int) -> None:
    service = start()
    with service.client() as client:
        for _ in range(sandboxes):
            client.create_sandbox().run("sleep 1000 >/dev/null 2>&1 </dev/null &")
    service.kill()
    wait_until(lambda: not orphans(), "no process is left")
    assert groups(service.state_dir) == set()
    assert loops(service.state_dir) == mounts(service.state_dir) == []


async def killed_under_load(service: Service, answers: int, load: Load) -> None:
    """Kill the service after that many answers, in the midst of others; returns when every client has noticed."""
    async with asyncio.timeout(ROUND_DEADLINE), load, asyncio.TaskGroup() as group:
        group.create_task(load.run())
        await load.answered(answers, LATEST)
        service.kill()


def check_nothing_is_left(service: Service, idle: Footprint) -> None:
    """Only the service itself is there: no process of a killed one, and no more of anything than at the very first start."""
    wait_until(lambda: not orphans(service.process.pid), "no process is left of the killed service")
    wait_until(lambda: not trash(service.state_dir), "no disk is left half deleted")

    def excess() -> dict[str, int]:
        # its disk is what the sandboxes need that are there
        return replace(footprint(service.process.pid, service.state_dir), disks=idle.disks).beyond(idle)

    # a connection that is just being closed still counts: what stays is a leak
    wait_until(lambda: not excess(), f"the service is back at rest: {excess()}")


def check_books(service: Service, ledger: Ledger) -> None:
    """Compare what the restarted service has with what the killed one promised; then take over what was left open."""
    with service.http() as http:
        listed = {box["id"]: box for box in http.get(BOXES).json()["sandboxes"]}
    assert {box: row["status"] for box, row in listed.items()} == rows(service.state_dir)
    assert set(ledger.living) <= set(listed), "a sandbox is lost"
    assert not ledger.gone & set(listed), "a deleted sandbox is back"
    for box, row in listed.items():
        assert row["name"] in ledger.asked
        assert ledger.made.get(box, row["name"]) == row["name"]
        assert row["status"] == "stopped", row
        assert box not in ledger.labels or row["labels"].get("number") in ledger.labels[box]
        ledger.made[box] = row["name"]
        ledger.labels[box] = {row["labels"].get("number")}
    assert disks(service.state_dir) <= set(listed), "a disk belongs to no sandbox"
    ledger.gone |= set(ledger.made) - set(listed)  # asked for, not answered, and done
    ledger.going = set(ledger.gone)
    ledger.made = {box: name for box, name in ledger.made.items() if box in listed}


def check_files(service: Service, ledger: Ledger, boxes: list[str]) -> None:
    """Every upload that was answered is there, whole; the sandbox is woken by being asked."""
    with service.http() as http:
        for box in boxes:
            for path, content in ledger.files.get(box, {}).items():
                answer = http.get(f"/dataplane/{box}/download", params={"path": path})
                assert answer.status_code == 200, answer.text
                assert answer.content == content

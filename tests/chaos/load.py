"""Clients that keep a service busy until it goes away, and the ledger of what it has promised them."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import httpx2
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidStatus, WebSocketException

BOXES = "/v2/sandboxes/boxes"
MOST_BOXES = 6  # running at a time
EXPECTED = {200, 204, 400, 404, 409, 422}  # 400 and 409: another client stopped or is deleting the same sandbox
SYN_TO_NOWHERE = bytes.fromhex("000100010000000100000000000000000000000100000003010001")  # yamux: a stream to port 1


@dataclass
class Ledger:
    """What was asked for and what was answered. Only an answer is a promise."""

    asked: set[str] = field(default_factory=set)  # names of sandboxes whose creation was asked for
    made: dict[str, str] = field(default_factory=dict)  # id → name, creation was answered
    going: set[str] = field(default_factory=set)  # ids whose deletion was asked for
    gone: set[str] = field(default_factory=set)  # ids whose deletion was answered
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)  # id → path → content whose upload was answered
    labels: dict[str, set[str | None]] = field(
        default_factory=dict
    )  # id → values the label may have: the last answered, any asked for since
    counts: dict[str, int] = field(default_factory=dict)  # what was answered, by kind
    progress: asyncio.Event = field(default_factory=asyncio.Event)  # set at every answer

    def count(self, kind: str) -> None:
        """One more of a kind was answered."""
        self.counts[kind] = self.counts.get(kind, 0) + 1
        self.progress.set()

    @property
    def living(self) -> list[str]:
        """Sandboxes that are there for certain."""
        return [box for box in self.made if box not in self.going]


class Load:
    """The clients of one round."""

    def __init__(self, endpoint: str, key: str, ledger: Ledger, rng: random.Random, names: itertools.count[int]) -> None:
        self._http = httpx2.AsyncClient(base_url=endpoint, headers={"X-Api-Key": key}, timeout=30)
        self._endpoint = endpoint
        self._key = key
        self._ledger = ledger
        self._rng = rng
        self._names = names
        self._stopped = asyncio.Event()  # set when a client found the service gone

    async def __aenter__(self) -> Load:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()

    async def run(self) -> None:
        """Keep the service busy until it does not answer any more."""
        clients = [self._create, self._create, self._delete, self._upload, self._upload, self._command, self._command]
        clients += [self._stream, self._tunnel, self._change, self._cycle]
        async with asyncio.TaskGroup() as group:
            for client in clients:
                group.create_task(self._for_ever(client))

    async def answered(self, number: int, seconds: float) -> None:
        """Wait until that many more requests were answered, but no longer than that many seconds."""
        end = sum(self._ledger.counts.values()) + number
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while sum(self._ledger.counts.values()) < end:
                    self._ledger.progress.clear()
                    await self._ledger.progress.wait()

    async def _for_ever(self, client: Callable[[], Awaitable[None]]) -> None:
        while not self._stopped.is_set():
            try:
                await client()
            except (httpx2.TransportError, WebSocketException, OSError, EOFError):
                self._stopped.set()  # the service is gone

    async def _ask(self, method: str, path: str, **options: Any) -> httpx2.Response:
        answer = await self._http.request(method, path, **options)
        assert answer.status_code in EXPECTED, f"{method} {path}: {answer.status_code} {answer.text}"
        return answer

    def _some_box(self) -> str | None:
        living = self._ledger.living
        return self._rng.choice(living) if living else None

    async def _create(self) -> None:
        if len(self._ledger.living) >= MOST_BOXES:
            await asyncio.sleep(0.01)
            return
        name = f"box-{next(self._names)}"
        self._ledger.asked.add(name)
        body = {"name": name, "wait_for_ready": self._rng.random() < 0.5, "idle_ttl_seconds": 0}
        answer = await self._ask("POST", BOXES, json=body)
        assert answer.status_code == 200, answer.text
        box = answer.json()["id"]
        self._ledger.made[box] = name
        self._ledger.labels[box] = {None}
        self._ledger.count("created")

    async def _delete(self) -> None:
        box = self._some_box()
        if box is None or len(self._ledger.living) < 3:
            await asyncio.sleep(0.01)
            return
        self._ledger.going.add(box)
        answer = await self._ask("DELETE", f"{BOXES}/{box}")
        assert answer.status_code == 204, answer.text
        self._ledger.gone.add(box)
        self._ledger.count("deleted")

    async def _upload(self) -> None:
        if (box := self._some_box()) is None:
            await asyncio.sleep(0.01)
            return
        path, content = f"/srv/files/{next(self._names)}", self._rng.randbytes(self._rng.choice((0, 10, 5_000, 300_000)))
        answer = await self._ask("POST", f"/dataplane/{box}/upload", params={"path": path}, files={"file": ("f", content)})
        if answer.status_code == 200:
            self._ledger.files.setdefault(box, {})[path] = content
            self._ledger.count("uploaded")

    async def _command(self) -> None:
        if (box := self._some_box()) is None:
            await asyncio.sleep(0.01)
            return
        command = self._rng.choice(
            ("echo x", "sleep 1000 >/dev/null 2>&1 </dev/null & echo x", "setsid sleep 1000 >/dev/null 2>&1 & echo x")
        )
        answer = await self._ask("POST", f"/dataplane/{box}/execute", json={"command": command, "timeout": 10})
        if answer.status_code == 200 and answer.json()["exit_code"] == 0:
            assert answer.json()["stdout"] == "x\n"
            self._ledger.count("ran")

    def _socket(self, box: str, path: str) -> connect:
        url = f"{self._endpoint.replace('http', 'ws', 1)}/dataplane/{box}/{path}"
        return connect(url, additional_headers={"X-Api-Key": self._key}, compression=None, close_timeout=1)

    async def _stream(self) -> None:
        if (box := self._some_box()) is None:
            await asyncio.sleep(0.01)
            return
        with contextlib.suppress(InvalidStatus):  # the sandbox was deleted
            async with self._socket(box, "execute/ws") as ws:
                await ws.send(json.dumps({"type": "execute", "command": "seq 100000; sleep 1000"}))
                for _ in range(self._rng.randrange(1, 20)):
                    if json.loads(await ws.recv())["type"] not in ("started", "stdout"):
                        return
                self._ledger.count("streamed")

    async def _tunnel(self) -> None:
        if (box := self._some_box()) is None:
            await asyncio.sleep(0.01)
            return
        with contextlib.suppress(InvalidStatus):
            async with self._socket(box, "tunnel") as ws:
                await ws.send(SYN_TO_NOWHERE)
                await ws.recv()
                self._ledger.count("tunnelled")

    async def _change(self) -> None:
        if (box := self._some_box()) is None:
            await asyncio.sleep(0.01)
            return
        value = str(next(self._names))
        self._ledger.labels[box].add(value)
        answer = await self._ask("PATCH", f"{BOXES}/{box}", json={"labels": {"number": value}})
        if answer.status_code == 200:
            self._ledger.labels[box] = {value}
            self._ledger.count("changed")
        await asyncio.sleep(0.05)  # it is answered much faster than all else, and would be half of it

    async def _cycle(self) -> None:
        if (box := self._some_box()) is None:
            await asyncio.sleep(0.01)
            return
        await self._ask("POST", f"{BOXES}/{box}/stop", json={})
        await self._ask("POST", f"{BOXES}/{box}/start", json={})
        self._ledger.count("cycled")

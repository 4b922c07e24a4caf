"""Output that flows at a pace: a program in a sandbox that writes by its own clock, and its reader over Server-Sent Events.

The reader is a process of its own, so that a test's other clients do not slow it down. Nothing here asserts how fast it was: a
report says so.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import httpx2

BLOCK = 65536  # bytes that are written at once
HEADER = (
    16  # bytes of a block: its number, and when it was written (nanoseconds of the clock that this machine and sandboxes share)
)
RATE = 20_000_000  # bytes per second
LONGEST = 90.0  # seconds after which the program ends, stopped or not
STOP = "/tmp/stop"  # a file in the sandbox that ends it, once it has run its time
READ_DEADLINE = 30.0  # seconds without a byte from the service; its heartbeat is every 15
FLOWING = 5_000_000  # bytes after which the reader says so

# argv: bytes per second, seconds at least. Ends with one line of JSON on stderr.
PRODUCER = f"""
import hashlib, json, os, sys, time

rate, least = float(sys.argv[1]), float(sys.argv[2])
start, number, latest = time.monotonic(), 0, 0.0
while True:
    due, now = start + number * {BLOCK} / rate, time.monotonic()
    if now - start > {LONGEST} or (due - start > least and os.path.exists({STOP!r})):
        break
    if now < due:
        time.sleep(due - now)
    latest = max(latest, time.monotonic() - due)
    content = hashlib.sha256(number.to_bytes(8, "big")).digest() * {BLOCK // 32}
    block = number.to_bytes(8, "big") + time.monotonic_ns().to_bytes(8, "big") + content[{HEADER}:]
    while block:
        block = block[os.write(1, block):]
    number += 1
print(json.dumps({{"blocks": number, "seconds": time.monotonic() - start, "latest": latest}}), file=sys.stderr)
"""
PROGRAM = "/srv/producer.py"


@dataclass
class Report:
    """What the reader saw; with what the program said of itself at its end."""

    blocks: int  # read, each of them whole and in its place
    said_blocks: int  # written, as the program says
    seconds: float  # that the program ran
    latest: float  # seconds that it was behind its own clock at most: how long it was kept from writing
    lag: float  # seconds from writing a block to having read it, at most
    typical_lag: float  # the median of it
    responses: int  # it took, since what was read is acknowledged by the next request
    exit_code: int

    @property
    def rate(self) -> float:
        """Megabytes (10^6) per second that came through."""
        return self.blocks * BLOCK / self.seconds / 1e6

    def __str__(self) -> str:
        return (
            f"{self.rate:.1f} MB/s for {self.seconds:.1f} s as Server-Sent Events, {self.responses} responses; the program was "
            f"{self.latest:.2f} s late at most, a block took {self.typical_lag:.3f} s (median), {self.lag:.2f} s (most)"
        )


class Checker:
    """Takes the output in pieces and requires every block of it in its place."""

    def __init__(self) -> None:
        self.blocks = 0  # seen whole
        self.lags: list[float] = []  # seconds, one for each block
        self._rest = bytearray()  # of the block that is not whole yet

    def add(self, data: bytes) -> None:
        """The next piece."""
        self._rest += data
        while len(self._rest) >= BLOCK:
            block = bytes(self._rest[:BLOCK])
            del self._rest[:BLOCK]
            number = self.blocks.to_bytes(8, "big")
            assert block[:8] == number, f"block {self.blocks}: {block[:8].hex()}"
            assert block[HEADER:] == (hashlib.sha256(number).digest() * (BLOCK // 32))[HEADER:], f"block {self.blocks}"
            self.lags.append((time.monotonic_ns() - int.from_bytes(block[8:HEADER], "big")) / 1e9)
            self.blocks += 1

    def finish(self) -> None:
        """No more comes."""
        assert not self._rest


def events(answer: httpx2.Response) -> Iterator[tuple[str, dict[str, Any]]]:
    """The events of a response, as they come."""
    rest = b""
    for chunk in answer.iter_raw():
        *whole, rest = (rest + chunk).split(b"\n\n")
        for text in whole:
            if not text.startswith(b":"):
                name, _, data = text.partition(b"\n")
                yield name.removeprefix(b"event: ").decode(), json.loads(data.removeprefix(b"data: "))
    assert not rest


def read(endpoint: str, key: str, box: str, rate: float, seconds: float, out: IO[str]) -> Report:
    """Start the program and read it to its end; writes a line when it flows."""
    checker, offsets, said, responses = Checker(), {"stdout": 0, "stderr": 0}, b"", 0
    body: dict[str, Any] = {"command": f"exec python3 {PROGRAM} {rate} {seconds}", "command_id": "paced"}
    path, told = "start", False
    with httpx2.Client(base_url=endpoint, headers={"X-Api-Key": key}, timeout=READ_DEADLINE) as http:
        while True:
            responses += 1
            with http.stream("POST", f"/dataplane/{box}/execute/stream/{path}", json=body) as answer:
                for name, data in events(answer):
                    if name in offsets:
                        assert data["offset"] == offsets[name]
                        content = base64.b64decode(data["data"], validate=True)
                        offsets[name] += len(content)
                        if name == "stdout":
                            checker.add(content)
                        else:
                            said += content
                    if not told and offsets["stdout"] > FLOWING:
                        told = True
                        print("flowing", file=out, flush=True)
            if name == "exit":
                break
            assert name == "ack_required", (name, data)
            body = {"command_id": "paced", "stdout_offset": offsets["stdout"], "stderr_offset": offsets["stderr"]}
            path = "resume"
    checker.finish()
    own, lags = json.loads(said), sorted(checker.lags)
    return Report(
        checker.blocks, own["blocks"], own["seconds"], own["latest"], lags[-1], lags[len(lags) // 2], responses, data["exit_code"]
    )


class Reader:
    """The reader in a process of its own. Use as a context manager; it is running and the output flows when that is entered."""

    def __init__(self, endpoint: str, key: str, box: str, *, rate: float = RATE, seconds: float = 5.0) -> None:
        self._wanted = {"endpoint": endpoint, "key": key, "box": box, "rate": rate, "seconds": seconds}
        self._process: asyncio.subprocess.Process  # set when entered

    async def __aenter__(self) -> Reader:
        command = [sys.executable, "-m", "tests.chaos.paced"]
        pipe, here = asyncio.subprocess.PIPE, Path(__file__).resolve().parents[2]
        self._process = await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe, cwd=here)
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(self._wanted).encode())
        self._process.stdin.write_eof()
        assert await self._line() == "flowing"
        return self

    async def _line(self) -> str:
        assert self._process.stdout is not None
        line = (await self._process.stdout.readline()).decode().rstrip()
        assert line, "the reader failed: its standard error says how"
        return line

    async def report(self) -> Report:
        """Wait for the program's end; somebody must have made STOP."""
        return Report(**json.loads(await self._line()))

    async def __aexit__(self, *_: object) -> None:
        if self._process.returncode is None:
            self._process.terminate()
        await self._process.wait()


if __name__ == "__main__":
    print(json.dumps(asdict(read(**json.load(sys.stdin), out=sys.stdout))))

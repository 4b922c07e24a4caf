"""Boxes for the runtime's tests: real namespaces, real files."""

from __future__ import annotations

import asyncio
import os
import shutil
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from gatewayd.local.runtime.base import BoxSpec, SpawnSpec
from gatewayd.local.runtime.native import NativeRuntime
from gatewayd.local.runtime.nativebox import NativeBox

needs_bubblewrap = pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap is not installed")


async def read_all(fd: int) -> bytes:
    """Everything until end of file (a pty's EIO included); closes the descriptor."""

    def read() -> bytes:
        os.set_blocking(fd, True)
        data = b""
        try:
            while chunk := os.read(fd, 65536):
                data += chunk
        except OSError:
            pass
        finally:
            os.close(fd)
        return data

    return await asyncio.to_thread(read)


class Ran:
    """What a finished process left."""

    def __init__(self, code: int, out: bytes, err: bytes) -> None:
        self.code = code
        self.out = out.decode()
        self.err = err.decode()


async def run(box: NativeBox, *argv: str, stdin: bytes = b"", **options: Any) -> Ran:
    """Run to the end with three pipes."""
    process = await box.spawn(SpawnSpec(argv, **options))
    assert process.stderr is not None
    os.set_blocking(process.stdin, True)
    os.write(process.stdin, stdin)
    os.close(process.stdin)
    out, err, code = await asyncio.gather(read_all(process.stdout), read_all(process.stderr), process.exited)
    return Ran(code, out, err)


async def sh(box: NativeBox, script: str, **options: Any) -> str:
    """Output of a shell script that must succeed."""
    ran = await run(box, "/bin/sh", "-c", script, **options)
    assert ran.code == 0, ran.err
    return ran.out


@pytest.fixture
async def runtime(tmp_path: Path) -> AsyncIterator[NativeRuntime]:
    state = tmp_path / "state"
    state.mkdir(mode=0o700)
    runtime = NativeRuntime(state)
    await runtime.recover()
    yield runtime
    for box_id in await runtime.disks():
        await runtime.remove(box_id)
    await runtime.aclose()


Start = Callable[..., Awaitable[NativeBox]]


@pytest.fixture
async def start(runtime: NativeRuntime) -> AsyncIterator[Start]:
    """Start boxes that are stopped at the end."""
    boxes: list[NativeBox] = []

    async def start(**fields: Any) -> NativeBox:
        fields.setdefault("id", uuid.uuid4().hex[:8])
        box = await runtime.start(BoxSpec(hostname="boxy", **fields))
        boxes.append(box)
        return box

    yield start
    for box in boxes:
        await box.stop(grace=0.1)


@pytest.fixture
async def box(start: Start) -> NativeBox:
    return await start()

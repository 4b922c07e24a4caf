"""The Docker runtime on the event loop that the service runs on."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import uvloop

from gatewayd.local.runtime.base import BoxSpec
from gatewayd.local.runtime.docker import DockerRuntime

from .conftest import clear, converse, run, sh


def test_it_works_on_uvloop(docker_socket: Path, tmp_path: Path) -> None:
    async def live() -> None:
        runtime = DockerRuntime(tmp_path, docker_socket)
        await runtime.recover()
        box = await runtime.start(BoxSpec("fast", "boxy"))
        assert await run(box, "/bin/sh", "-c", "cat; exit 3", stdin=bytes(500_000)) == (3, bytes(500_000), b"")
        writer = await box.open_write("file")
        os.write(writer.fd, b"content")
        await writer.commit()
        assert await sh(box, "cat /root/file") == "content"
        await converse(box)
        if box._namespace is not None:
            box._namespace.close()
            box._namespace = None
        await converse(box)
        await box.stop(grace=0.1)
        await clear(runtime)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(live())

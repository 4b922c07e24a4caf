"""A native runtime in a process of its own, told what to do line by line: so one suite judges it as root and as a plain user.

Standard library, gatewayd.local.runtime and what needs no more: the plain user's Python may have nothing else. One JSON object a
line on stdin and one a line on stdout; text carries bytes as surrogate escapes.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from gatewayd.local.egress.addresses import Reach
from gatewayd.local.runtime.base import BoxSpec, PortRefused, RuntimeFailure, SpawnSpec
from gatewayd.local.runtime.native import NativeRuntime
from gatewayd.local.runtime.nativebox import NativeBox, NativeProcess
from gatewayd.local.runtime.nativelistener import NativeListener

_RUN_DEADLINE = 40.0  # seconds for one command inside
_MAX_OUTPUT = 1 << 20


async def read_all(fd: int) -> bytes:
    """Until end of file or _MAX_OUTPUT; closes the descriptor."""
    loop = asyncio.get_running_loop()
    data = b""
    try:
        while len(data) < _MAX_OUTPUT:
            readable = asyncio.Event()
            loop.add_reader(fd, readable.set)
            try:
                await readable.wait()
            finally:
                loop.remove_reader(fd)
            with contextlib.suppress(BlockingIOError):
                chunk = os.read(fd, 65536)
                if not chunk:
                    break
                data += chunk
    except OSError:  # a terminal's end
        pass
    finally:
        os.close(fd)
    return data


class Driver:
    """The operations, each a method; what they return goes out as JSON."""

    def __init__(self, state: Path) -> None:
        self.runtime = NativeRuntime(state)
        self._network = Reach().network()  # as the service has it; what is let out ends at sockets that nobody accepts on
        self.boxes: dict[str, NativeBox] = {}
        self.listeners: dict[str, NativeListener] = {}  # by path inside
        self._answering: set[asyncio.Task[None]] = set()  # connections to them

    async def start(self, box: str, **spec: Any) -> dict[str, Any]:
        self.boxes[box] = started = await self.runtime.start(BoxSpec(id=box, hostname=box, network=self._network, **spec))
        return {"note": started.limits_note}

    async def _spawn(self, box: str, argv: list[str], options: dict[str, Any]) -> NativeProcess:
        return await self.boxes[box].spawn(SpawnSpec(argv, **options))

    async def run(self, box: str, argv: list[str], **options: Any) -> dict[str, Any]:
        """To the end, with nothing on stdin."""
        process = await self._spawn(box, argv, options)
        if process.stderr is None:
            out, err = await read_all(process.stdout), b""
        else:
            os.close(process.stdin)
            out, err = await asyncio.gather(read_all(process.stdout), read_all(process.stderr))
        return {"code": await process.exited, "out": os.fsdecode(out), "err": os.fsdecode(err)}

    async def launch(self, box: str, argv: list[str], **options: Any) -> dict[str, Any]:
        """In the background; returns the first line of its output."""
        process = await self._spawn(box, argv, options)
        first = b""
        while not first.endswith(b"\n"):
            with contextlib.suppress(BlockingIOError):
                chunk = os.read(process.stdout, 1)
                if not chunk:
                    break
                first += chunk
            await asyncio.sleep(0.001)
        for fd in {process.stdin, process.stdout, process.stderr} - {None}:
            os.close(fd)  # type: ignore[arg-type]  # None is taken out above
        return {"line": os.fsdecode(first)}

    async def read(self, box: str, path: str, user: str | None = None) -> dict[str, Any]:
        fd, info = await self.boxes[box].open_read(path, user)
        with os.fdopen(fd, "rb") as file:
            return {"data": os.fsdecode(file.read(_MAX_OUTPUT)), "size": info.st_size}

    async def write(self, box: str, path: str, data: str, user: str | None = None) -> dict[str, Any]:
        writer = await self.boxes[box].open_write(path, user)
        os.write(writer.fd, os.fsencode(data))
        await writer.commit()
        return {}

    async def race(self, box: str, path: str, user: str | None, times: int, *, reading: bool) -> dict[str, Any]:
        """Write or read the same path again and again; counts the outcomes by errno."""
        counts: dict[str, int] = {}
        seen: set[str] = set()
        for _ in range(times):
            try:
                if reading:
                    seen.add((await self.read(box, path, user))["data"])
                else:
                    await self.write(box, path, "WRITTEN", user)
                outcome = "fine"
            except OSError as exc:
                outcome = str(exc.errno)
            counts[outcome] = counts.get(outcome, 0) + 1
        return {"counts": counts, "seen": sorted(seen)}

    async def listen(self, box: str, user: str | None = None) -> dict[str, Any]:
        """Answer on a Unix socket inside, to each connection what it sent in capitals; until `unlisten`."""

        async def answer(sock: socket.socket) -> None:
            with sock:
                said = b""
                while data := await loop.sock_recv(sock, 65536):
                    said += data
                await loop.sock_sendall(sock, said.upper())

        def accepted(sock: socket.socket) -> None:
            answering = loop.create_task(answer(sock))
            self._answering.add(answering)
            answering.add_done_callback(self._answering.discard)

        loop = asyncio.get_running_loop()
        listener = await self.boxes[box].listen_unix(user, accepted)
        self.listeners[listener.path] = listener
        return {"path": listener.path}

    async def unlisten(self, path: str) -> dict[str, Any]:
        listener = self.listeners.pop(path)
        listener.close()
        await listener.removed()
        return {}

    async def race_listen(self, box: str, user: str | None, times: int) -> dict[str, Any]:
        """Make sockets and remove them again and again; counts the outcomes by errno."""
        counts: dict[str, int] = {}
        for _ in range(times):
            try:
                await self.unlisten((await self.listen(box, user))["path"])
                outcome = "fine"
            except OSError as exc:
                outcome = str(exc.errno)
            counts[outcome] = counts.get(outcome, 0) + 1
        return {"counts": counts}

    async def connect(self, box: str, port: int) -> dict[str, Any]:
        (await self.boxes[box].connect(port)).close()
        return {}

    async def ended(self, box: str) -> dict[str, Any]:
        """Wait until a sandbox has ended by itself."""
        return {"reason": await self.boxes.pop(box).ended}

    async def stop(self, box: str, grace: float = 0.1) -> dict[str, Any]:
        if (running := self.boxes.pop(box, None)) is not None:
            await running.stop(grace)
        return {}

    async def remove(self, box: str) -> dict[str, Any]:
        await self.runtime.remove(box)
        return {"disks": sorted(await self.runtime.disks())}

    async def cycles(self, count: int, abreast: int, **spec: Any) -> dict[str, Any]:
        """Whole lives of sandboxes, a few at a time."""

        async def lives(worker: int) -> None:
            for number in range(count // abreast):
                box = f"w{worker}-{number % 2}"
                await self.start(box, **spec)
                await self.run(box, ["/bin/true"])
                await self.stop(box, 0.0)
                await self.remove(box)

        await asyncio.gather(*(lives(worker) for worker in range(abreast)))
        return {}

    async def serve(self) -> None:
        """Until end of file."""
        loop = asyncio.get_running_loop()
        await self.runtime.recover()
        try:
            while line := await loop.run_in_executor(None, sys.stdin.readline):
                request = json.loads(line)
                try:
                    async with asyncio.timeout(request.pop("deadline", _RUN_DEADLINE)):
                        answer = await getattr(self, request.pop("op"))(**request)
                except (OSError, RuntimeFailure, PortRefused) as exc:
                    answer = {"failed": type(exc).__name__, "errno": getattr(exc, "errno", None), "message": str(exc)}
                print(json.dumps(answer), flush=True)
        finally:
            for box in list(self.boxes.values()):
                await box.stop(0.0)
            for disk in await self.runtime.disks():
                await self.runtime.remove(disk)
            await self.runtime.aclose()


if __name__ == "__main__":
    asyncio.run(Driver(Path(sys.argv[1])).serve())

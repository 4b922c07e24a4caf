"""A client of connect.sock."""

from __future__ import annotations

import asyncio
import json
import socket
from pathlib import Path
from typing import Any


class Caller:
    """One connection."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.setblocking(False)
        self.loop = asyncio.get_running_loop()
        self.buffer = b""

    async def dial(self) -> None:
        await self.loop.sock_connect(self.sock, str(self.path))

    async def ask(self, behind: bytes = b"", **request: Any) -> None:
        await self.loop.sock_sendall(self.sock, json.dumps(request).encode() + b"\n" + behind)

    async def line(self) -> dict[str, Any]:
        while b"\n" not in self.buffer:
            data = await self.read_some()
            assert data, f"the connection ended after {self.buffer!r}"
            self.buffer += data
        line, _, self.buffer = self.buffer.partition(b"\n")
        message = json.loads(line)
        assert isinstance(message, dict)
        return message

    async def read_some(self) -> bytes:
        async with asyncio.timeout(10):
            return await self.loop.sock_recv(self.sock, 65536)

    async def read(self, size: int) -> bytes:
        while len(self.buffer) < size:
            data = await self.read_some()
            assert data, f"the connection ended after {self.buffer!r}"
            self.buffer += data
        data, self.buffer = self.buffer[:size], self.buffer[size:]
        return data

    async def read_all(self) -> bytes:
        while data := await self.read_some():
            self.buffer += data
        return self.buffer

    async def write(self, data: bytes) -> None:
        await self.loop.sock_sendall(self.sock, data)

    def close(self) -> None:
        self.sock.close()

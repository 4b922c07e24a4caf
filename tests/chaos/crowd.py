"""Much at the same time on one sandbox: commands, streams of a tunnel, bulk output. Each checks what it gets."""

from __future__ import annotations

import asyncio
import hashlib
import json
from typing import TYPE_CHECKING, Any

import httpx2
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

from gatewayd.yamux.aio import Mux, MuxStream

if TYPE_CHECKING:
    from tests.sdk.conftest import Service

PORT = 7000
DEADLINE = 100.0  # seconds for everything that happens at once

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


def prepare(made: Any) -> None:
    """Put into a sandbox what `many_streams` talks to."""
    made.write("/srv/server.py", SERVER)
    made.run("python3 /srv/server.py >/srv/log 2>&1 </dev/null & until grep -qs listening /srv/log; do sleep 0.02; done")


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

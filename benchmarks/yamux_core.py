"""Throughput of the yamux core in memory, and of a Mux pair over a loopback socket beside a plain socket in the same run.

    python benchmarks/yamux_core.py [--mib 256] [--rounds 5] [--window 1048576] [--loop uvloop|asyncio]

Prints medians in MB/s (10^6 bytes) and, for the sockets, the ratio of Mux to plain. Sender and receiver of the socket
figures are two processes; the in-memory figures are one thread doing both sides' work.
"""

from __future__ import annotations

import argparse
import asyncio
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine
from typing import Any

import uvloop

from gatewayd.relay import SocketStream
from gatewayd.tasks import TaskOwner
from gatewayd.yamux.aio import Mux, MuxStream, SessionConfig
from gatewayd.yamux.events import DataReceived, StreamOpened
from gatewayd.yamux.session import Session

BLOCK = bytes(256 * 1024)
DEADLINE = 300.0  # seconds for one round


def in_memory(mib: int, streams: int, config: SessionConfig) -> float:
    """MB/s of one session's output fed into another, `streams` at a time, everything consumed at once."""
    client, server = Session(client=True, config=config), Session(client=False, config=config)
    left = {client.open_stream(0.0).id: (mib << 20) // streams for _ in range(streams)}
    total = sum(left.values())
    begin = time.perf_counter()
    received = 0
    while received < total:
        for sid, size in left.items():
            left[sid] -= client.send(sid, memoryview(BLOCK)[:size])
        while out := client.data_to_send():
            for event in server.receive_data(out, 0.0):
                if isinstance(event, DataReceived):
                    received += len(event.data)
                    server.consume(event.stream_id, len(event.data))
                elif isinstance(event, StreamOpened):
                    server.accept(event.stream_id)
        client.receive_data(server.data_to_send(), 0.0)
    return total / (time.perf_counter() - begin) / 1e6


class SocketTransport:
    """The thinnest transport: yamux on a bare socket."""

    def __init__(self, stream: SocketStream) -> None:
        self._stream = stream

    async def send(self, data: bytes) -> None:
        await self._stream.write(data)

    async def recv(self) -> bytes:
        data = await self._stream.read()
        if not data:
            raise EOFError
        return data

    async def close(self) -> None:
        await self._stream.aclose()


async def drain(stream: MuxStream | SocketStream) -> None:
    """Read to the end, then answer with our own end."""
    while await stream.read():
        pass
    await stream.write_eof()


async def fill(stream: MuxStream | SocketStream, size: int) -> None:
    """Write `size` bytes and our end, and wait for the peer's."""
    while size > 0:
        await stream.write(BLOCK[:size])
        size -= len(BLOCK)
    await stream.write_eof()
    while await stream.read():
        pass


async def receiver(port: int, kind: str, config: SessionConfig) -> None:
    """The child process."""
    stream = SocketStream.from_socket(socket.create_connection(("127.0.0.1", port)))
    if kind == "plain":
        await drain(stream)
        await stream.aclose()
    else:
        await Mux(SocketTransport(stream), client=False, name="receiver", config=config, on_stream=drain).run()


async def sender(sock: socket.socket, kind: str, streams: int, mib: int, config: SessionConfig) -> float:
    """MB/s from the first write until the receiver has confirmed the last byte."""
    owner = TaskOwner("sender")
    stream = SocketStream.from_socket(sock)
    size = mib << 20
    if kind == "plain":
        begin = time.perf_counter()
        await fill(stream, size)
        elapsed = time.perf_counter() - begin
        await stream.aclose()
    else:
        mux = Mux(SocketTransport(stream), client=True, name="sender", config=config)
        owner.start(mux.run(), "mux")
        await mux.ping()
        begin = time.perf_counter()
        await asyncio.gather(*[fill(await mux.open_stream(), size // streams) for _ in range(streams)])
        elapsed = time.perf_counter() - begin
        await mux.aclose()
    await owner.aclose()
    return size / elapsed / 1e6


def over_socket(kind: str, streams: int, arguments: argparse.Namespace, config: SessionConfig, run: Run) -> float:
    """One round with a fresh child process."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        child = subprocess.Popen(
            [
                sys.executable,
                __file__,
                *("--receiver", kind, "--port", str(server.getsockname()[1])),
                *("--window", str(arguments.window), "--frame", str(arguments.frame), "--loop", arguments.loop),
            ]
        )
        server.settimeout(20)
        sock, _ = server.accept()
    try:
        return run(sender(sock, kind, streams, arguments.mib, config))
    finally:
        child.wait(10)


Run = Callable[[Coroutine[Any, Any, float]], float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=256, help="transferred in each round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--window", type=int, default=SessionConfig.max_stream_window)
    parser.add_argument("--frame", type=int, default=SessionConfig.max_frame)
    parser.add_argument("--loop", choices=["uvloop", "asyncio"], default="uvloop")
    parser.add_argument("--receiver", help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    config = SessionConfig(max_stream_window=arguments.window, max_frame=arguments.frame)
    factory = uvloop.new_event_loop if arguments.loop == "uvloop" else asyncio.new_event_loop

    def run(work: Coroutine[Any, Any, Any]) -> Any:
        with asyncio.Runner(loop_factory=factory) as runner:
            return runner.run(asyncio.wait_for(work, DEADLINE))

    if arguments.receiver:
        run(receiver(arguments.port, arguments.receiver, config))
        return

    figures: dict[str, list[float]] = {}
    for _ in range(arguments.rounds):
        for streams in (1, 8):
            figures.setdefault(f"in memory, {streams} stream(s)", []).append(in_memory(arguments.mib, streams, config))
        for name, kind, streams in (("plain socket", "plain", 1), ("mux, 1 stream", "mux", 1), ("mux, 8 streams", "mux", 8)):
            figures.setdefault(name, []).append(over_socket(kind, streams, arguments, config, run))
    plain = statistics.median(figures["plain socket"])
    for name, values in figures.items():
        median = statistics.median(values)
        ratio = "" if name.startswith("in memory") else f"   × {median / plain:.2f}"
        print(f"{name:24}{median:9.0f} MB/s   (min {min(values):.0f}, max {max(values):.0f}){ratio}")


if __name__ == "__main__":
    main()

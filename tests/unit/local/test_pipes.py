"""Input that waits for its reader, and pipes that are kept open for those left behind."""

from __future__ import annotations

import asyncio
import fcntl
import os

from gatewayd.local.pipes import BULK_PIPE, READ_SIZE, Drains, InputPipe, OutputPipe
from gatewayd.local.ring import Ring


async def read_exactly(fd: int, size: int) -> bytes:
    data = b""
    while len(data) < size:
        data += await asyncio.to_thread(os.read, fd, size - len(data))
    return data


async def test_input_waits_for_the_reader() -> None:
    theirs, ours = os.pipe()
    os.set_blocking(ours, False)
    closed: list[bool] = []
    pipe = InputPipe(ours, lambda: closed.append(True), limit=1000)
    data = bytes(range(256)) * 1200  # four times what a pipe holds
    feeding = asyncio.ensure_future(pipe.feed(data))
    await asyncio.sleep(0)
    assert not feeding.done()
    assert await read_exactly(theirs, len(data)) == data
    async with asyncio.timeout(5):
        await feeding
    pipe.end()
    pipe.end()
    assert closed == [True]
    await pipe.feed(b"after the end")  # dropped
    os.close(ours)
    assert os.read(theirs, 1) == b""
    os.close(theirs)


async def test_the_end_comes_after_what_is_queued() -> None:
    theirs, ours = os.pipe()
    os.set_blocking(ours, False)
    closed = asyncio.Event()
    pipe = InputPipe(ours, closed.set)
    data = b"x" * 200000
    await pipe.feed(data)
    pipe.end()
    assert not closed.is_set()
    assert await read_exactly(theirs, len(data)) == data
    async with asyncio.timeout(5):
        await closed.wait()
    os.close(ours)
    os.close(theirs)


async def test_a_reader_that_goes_frees_the_feeder() -> None:
    theirs, ours = os.pipe()
    os.set_blocking(ours, False)
    closed = asyncio.Event()
    pipe = InputPipe(ours, closed.set, limit=10)
    feeding = asyncio.ensure_future(pipe.feed(b"x" * 200000))
    await asyncio.sleep(0)
    os.close(theirs)
    async with asyncio.timeout(5):
        await feeding
        await closed.wait()
    os.close(ours)


async def test_drains_read_and_forget() -> None:
    drains = Drains(limit=2)
    pipes = [os.pipe() for _ in range(3)]
    for ours, _ in pipes:
        os.set_blocking(ours, False)
        drains.add(ours)
    assert len(drains) == 2  # the first was closed for the third
    writers = [theirs for _, theirs in pipes]
    os.set_blocking(writers[1], False)
    loop = asyncio.get_running_loop()
    for _ in range(10):  # more than a pipe holds, without ever blocking for good
        await asyncio.wait_for(writable(loop, writers[1]), 5)
        os.write(writers[1], b"x" * 30000)
    os.close(writers[1])
    async with asyncio.timeout(5):
        while len(drains) > 1:  # noqa: ASYNC110 - the drain tells nobody
            await asyncio.sleep(0.001)
    drains.close()
    drains.close()
    os.close(writers[0])
    os.close(writers[2])


async def writable(loop: asyncio.AbstractEventLoop, fd: int) -> None:
    ready = loop.create_future()
    loop.add_writer(fd, ready.set_result, None)
    try:
        await ready
    finally:
        loop.remove_writer(fd)


async def test_a_pipe_that_was_full_is_made_wider_and_no_other() -> None:
    for size, wide in ((READ_SIZE, True), (READ_SIZE - 1, False)):
        theirs, ours = os.pipe()
        os.set_blocking(theirs, False)
        os.write(ours, b"x" * size)
        os.close(ours)
        changed = asyncio.Event()
        pipe = OutputPipe(theirs, Ring(), changed.set)
        while not pipe.eof:
            changed.clear()
            async with asyncio.timeout(5):
                await changed.wait()
        assert pipe.ring.read(0, 2 * size) == b"x" * size
        assert (fcntl.fcntl(theirs, fcntl.F_GETPIPE_SZ) >= BULK_PIPE) == wide
        os.close(theirs)

"""What a client sends ahead is bounded, and nothing of it is lost or doubled."""

from __future__ import annotations

import asyncio

from gatewayd.frontends.ssh.inbox import HIGH, LOW, Inbox


class Channel:
    """Counts what it is told."""

    def __init__(self) -> None:
        self.paused: bool = False

    def pause_reading(self) -> None:
        assert not self.paused
        self.paused = True

    def resume_reading(self) -> None:
        assert self.paused
        self.paused = False


async def test_order_and_end() -> None:
    inbox = Inbox()
    inbox.put(b"one")
    inbox.put(b"two")
    inbox.end()
    assert await inbox.get(4) == b"one"
    assert await inbox.get(2) == b"tw"
    assert await inbox.get(2) == b"o"
    assert await inbox.get(2) == b""
    assert inbox.ended


async def test_small_packets_go_on_together() -> None:
    inbox = Inbox()
    for number in range(100):
        inbox.put(b"%02d" % number)
    assert await inbox.get(1000) == b"".join(b"%02d" % number for number in range(100))


async def test_the_channel_waits_and_goes_on() -> None:
    inbox, channel = Inbox(), Channel()
    inbox.attach(channel)
    for _ in range(HIGH // 1000 + 1):
        inbox.put(bytes(1000))
    assert channel.paused
    left = (HIGH // 1000 + 1) * 1000
    while left > LOW:
        assert channel.paused
        left -= len(await inbox.get(10_000))
    assert not channel.paused


async def test_a_reader_waits() -> None:
    inbox = Inbox()
    reader = asyncio.ensure_future(inbox.get(10))
    await asyncio.sleep(0)
    assert not reader.done()
    inbox.put(b"x")
    assert await reader == b"x"


async def test_a_channel_that_is_gone_leaves_what_it_brought() -> None:
    inbox = Inbox()
    inbox.put(b"rest")
    inbox.cut()
    assert await inbox.get(10) == b"rest"
    assert await inbox.get(10) == b""
    assert not inbox.ended


async def test_closing_drops_everything_and_lets_the_channel_go_on() -> None:
    inbox, channel = Inbox(), Channel()
    inbox.attach(channel)
    inbox.put(bytes(HIGH + 1))
    inbox.close()
    inbox.put(bytes(HIGH + 1))
    assert not channel.paused
    assert await inbox.get(10) == b""

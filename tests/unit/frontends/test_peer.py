from __future__ import annotations

import asyncio
import json
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gatewayd.errors import GatewayError
from gatewayd.frontends.fields import Fields
from gatewayd.frontends.peer import BACKLOG_MAX, CancelOnHangup, Client, HungUp, peer_is_self
from gatewayd.frontends.portowner import port_owner


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        theirs.setblocking(False)
        yield ours, theirs


def test_our_own_processes_are_ourselves(pair: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch) -> None:
    assert peer_is_self(pair[0])
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    assert not peer_is_self(pair[0])
    monkeypatch.undo()
    with socket.create_server(("127.0.0.1", 0)) as tcp:
        assert not peer_is_self(tcp)


async def test_a_hangup_cancels(pair: tuple[socket.socket, socket.socket]) -> None:
    asyncio.get_running_loop().call_later(0.02, pair[1].close)
    with pytest.raises(HungUp), CancelOnHangup(pair[0]):
        await asyncio.sleep(3600)
    await asyncio.sleep(0)  # the task itself goes on


async def test_a_half_close_and_data_do_not(pair: tuple[socket.socket, socket.socket]) -> None:
    pair[1].send(b"data")
    pair[1].shutdown(socket.SHUT_WR)
    with CancelOnHangup(pair[0]):
        await asyncio.sleep(0.05)


async def test_a_real_cancellation_stays_one(pair: tuple[socket.socket, socket.socket]) -> None:
    async def wait() -> None:
        with CancelOnHangup(pair[0]):
            await asyncio.sleep(3600)

    task = asyncio.ensure_future(wait())
    await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_nothing_is_left_open(pair: tuple[socket.socket, socket.socket]) -> None:
    before = set(Path("/proc/self/fd").iterdir())
    with CancelOnHangup(pair[0]):
        pass
    assert set(Path("/proc/self/fd").iterdir()) == before


def drain(sock: socket.socket) -> bytes:
    """What has arrived."""
    received = b""
    while True:
        try:
            received += sock.recv(65536)
        except BlockingIOError:
            return received


async def test_a_client_that_does_not_read_loses_lines_not_parts_of_them(pair: tuple[socket.socket, socket.socket]) -> None:
    client = Client(pair[0])
    for number in range(30000):
        client.post({"number": number, "padding": "x" * 50})
    assert len(client._unsent) < 2 * BACKLOG_MAX
    received = drain(pair[1])
    client.post({"last": True})  # takes the rest along
    assert client._unsent == b""
    received += drain(pair[1])
    lines = received.split(b"\n")
    assert lines.pop() == b""
    numbers = [json.loads(line).get("number", -1) for line in lines]
    assert numbers[-1] == -1
    assert numbers[:-1] == sorted(set(numbers[:-1]))
    assert len(numbers) < 30000


async def test_gone(pair: tuple[socket.socket, socket.socket]) -> None:
    client = Client(pair[0])
    waiting = asyncio.ensure_future(client.gone())
    pair[1].shutdown(socket.SHUT_WR)
    await asyncio.sleep(0.02)
    assert not waiting.done()
    pair[1].close()
    async with asyncio.timeout(5):
        await waiting


def test_who_holds_a_port() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        assert port_owner(server.getsockname()[1]).endswith(f"(pid {os.getpid()})")
    with socket.create_server(("::1", 0), family=socket.AF_INET6) as server:
        assert port_owner(server.getsockname()[1]).endswith(f"(pid {os.getpid()})")
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        assert port_owner(sock.getsockname()[1]) == ""


def test_a_proc_that_tells_nothing(tmp_path: Path) -> None:
    assert port_owner(80, tmp_path) == ""
    (tmp_path / "net").mkdir()
    (tmp_path / "net/tcp").write_text("head\n   0: 0100007F:0050 00000000:0000 0A 0 0 0 0 0 4242 1\nshort\n")
    (tmp_path / "17/fd").mkdir(parents=True)
    (tmp_path / "17/fd/3").symlink_to("socket:[4242]")
    (tmp_path / "self").mkdir()
    assert port_owner(80, tmp_path) == "a process (pid 17)"
    (tmp_path / "17/comm").write_text("ng\x1bnx\n")
    assert port_owner(80, tmp_path) == "ng nx (pid 17)"


def test_fields() -> None:
    fields = Fields({"a": "x", "n": 5, "f": 1.5, "t": True, "none": None, "l": ["x"], "m": {"k": "v"}})
    assert (fields.text("a"), fields.text("none", "d"), fields.whole("n"), fields.number("f", 0), fields.flag("t")) == (
        "x",
        "d",
        5,
        1.5,
        True,
    )
    assert (fields.texts("l"), fields.texts("none"), fields.mapping("m"), fields.mapping("none")) == (["x"], None, {"k": "v"}, {})
    assert fields.some("a", "none", "gone") == {"a": "x"}
    assert ("a" in fields, "none" in fields) == (True, False)
    fields.only("a", "n", "f", "t", "none", "l", "m")
    wrong: list[Callable[[], object]] = [
        lambda: fields.only("a"),
        lambda: fields.text("n"),
        lambda: fields.text("gone"),
        lambda: fields.whole("a"),
        lambda: fields.whole("t"),
        lambda: fields.whole("gone"),
        lambda: fields.whole("n", least=6),
        lambda: fields.number("t", 0),
        lambda: fields.number("f", 0, most=1),
        lambda: fields.flag("n"),
        lambda: fields.texts("a"),
        lambda: fields.mapping("l"),
        lambda: Fields({"a": "x" * 70000}).text("a"),
    ]
    for each in wrong:
        with pytest.raises(GatewayError) as caught:
            each()
        assert caught.value.kind == "usage"

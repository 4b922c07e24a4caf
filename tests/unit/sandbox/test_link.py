from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator

import pytest

from gatewayd.config import Profile, Proxies
from gatewayd.errors import DialRefused, GatewayError, MuxClosed, ServiceRefused
from gatewayd.sandbox import link as link_module
from gatewayd.sandbox.link import Link, Target, open_websocket
from gatewayd.yamux.aio import SessionConfig
from tests.unit.fakeservice import KEY, FakeService, echo, upper_at_eof


def target(service: FakeService, **changes: str) -> Target:
    url = service.ws_origin.replace("http", "ws", 1) + "/dp/id-x/tunnel"
    return Target(changes.get("url", url), Profile("env", service.endpoint, changes.get("key", KEY)), "x", "open the tunnel")


@contextlib.asynccontextmanager
async def answering(answer: bytes) -> AsyncIterator[int]:
    """A server that says the same to everybody; its port."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.write(answer)
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    yield server.sockets[0].getsockname()[1]
    server.close()
    await server.wait_closed()


@pytest.fixture
async def link(service: FakeService) -> AsyncIterator[Link]:
    link = await Link.open(target(service))
    yield link
    await link.aclose()


async def test_streams_share_one_connection(service: FakeService, link: Link) -> None:
    service.ports = {7: echo, 8: upper_at_eof}
    first, second = await link.dial(7), await link.dial(8)
    await first.write(b"ping")
    assert await first.read() == b"ping"
    await second.write(b"half ")
    await second.write(b"close")
    await second.write_eof()
    assert await second.read() == b"HALF CLOSE"
    assert await second.read() == b""
    await first.write_eof()
    assert await first.read() == b""
    assert len(service.upgrades) == 1
    assert link.connected_at > 0


async def test_what_the_upgrade_says(service: FakeService, link: Link) -> None:
    headers = service.upgrades[0].headers
    assert headers["X-Api-Key"] == KEY
    assert "permessage-deflate" not in headers.get("Sec-WebSocket-Extensions", "")
    assert not link.closed


async def test_nothing_listens(link: Link) -> None:
    with pytest.raises(DialRefused, match="cannot connect to port 5432 of sandbox 'x': nothing listens") as caught:
        await link.dial(5432)
    assert caught.value.kind == "refused"
    assert not link.closed


@pytest.mark.parametrize(
    ("status", "kind", "text"),
    [(1, "refused", "does not allow"), (3, "unsupported", "another tunnel version"), (77, "unavailable", "status 77")],
)
async def test_other_statuses(service: FakeService, link: Link, status: int, kind: str, text: str) -> None:
    service.statuses[9] = status
    with pytest.raises(GatewayError, match=text) as caught:
        await link.dial(9)
    assert caught.value.kind == kind
    assert not isinstance(caught.value, DialRefused)


async def test_no_status_in_time(service: FakeService, link: Link, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link_module, "DIAL_TIMEOUT", 0.05)
    service.silent_ports.add(9)
    with pytest.raises(GatewayError, match="no answer within") as caught:
        await link.dial(9)
    assert caught.value.kind == "timeout"
    assert not link.closed


async def test_the_service_goes_away(service: FakeService, link: Link) -> None:
    service.ports[7] = echo
    stream = await link.dial(7)
    await service.stop_ws()
    async with asyncio.timeout(5):
        await link.wait_closed()
    assert link.closed
    with pytest.raises(MuxClosed):
        await stream.read()
    with pytest.raises(MuxClosed):
        await link.dial(7)


async def test_text_on_a_tunnel_ends_it(service: FakeService, link: Link) -> None:
    service.ports[7] = echo
    await link.dial(7)
    await service.connections[0].send("hello")
    async with asyncio.timeout(5):
        await link.wait_closed()
    assert "text" in str(link.mux.error)


@pytest.mark.parametrize(
    ("status", "kind", "text"),
    [
        (401, "auth", "refuses the API key"),
        (403, "auth", "refuses the API key"),
        (404, "not_found", "no sandbox named 'x'"),
        (429, "unavailable", "limits the rate"),
        (502, "unavailable", "HTTP 502"),
        (302, "config", "redirects to"),
    ],
)
async def test_a_refused_upgrade(service: FakeService, status: int, kind: str, text: str) -> None:
    service.rejections.append((status, b""))
    with pytest.raises(ServiceRefused, match=text) as caught:
        await Link.open(target(service))
    assert (caught.value.status, caught.value.kind) == (status, kind)
    assert len(service.upgrades) == 1


async def test_the_reason_of_the_service_is_passed_on(service: FakeService) -> None:
    service.rejections.append((503, json.dumps({"detail": {"error": "NotReady", "message": "still starting\x07"}}).encode()))
    with pytest.raises(ServiceRefused, match="still starting ") as caught:
        await Link.open(target(service))
    assert caught.value.message.isprintable()


async def test_nobody_listens(service: FakeService) -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        with pytest.raises(GatewayError, match="refuses connections") as caught:
            await Link.open(target(service, url=f"ws://127.0.0.1:{sock.getsockname()[1]}/tunnel"))
    assert caught.value.kind == "unavailable"


async def test_an_unknown_host(service: FakeService) -> None:
    with pytest.raises(GatewayError, match=r"unknown host nowhere.invalid"):
        await Link.open(target(service, url="ws://nowhere.invalid/tunnel"))


async def test_tls_where_there_is_none(service: FakeService) -> None:
    async with answering(b"HTTP/1.1 400 Bad Request\r\n\r\n") as port:
        with pytest.raises(GatewayError, match="does not speak TLS") as caught:
            await Link.open(target(service, url=f"wss://127.0.0.1:{port}/tunnel"))
    assert caught.value.kind == "unavailable"


async def test_a_server_that_is_no_websocket(service: FakeService) -> None:
    async with answering(b"SSH-2.0-OpenSSH\r\n") as port:
        with pytest.raises(GatewayError, match="does not answer with a WebSocket"):
            await Link.open(target(service, url=f"ws://127.0.0.1:{port}/tunnel"))


async def test_a_blackholed_peer_is_noticed_by_the_keepalive(service: FakeService) -> None:
    """The connection stays open and nothing comes back: the ping's deadline ends the link and its streams."""
    service.ports[7] = echo
    link = await Link.open(target(service), SessionConfig(keepalive_interval=0.05, keepalive_timeout=0.1))
    stream = await link.dial(7)
    service.connections[0].transport.pause_reading()
    async with asyncio.timeout(10):
        await link.wait_closed()
    assert link.mux.error is not None
    with pytest.raises(MuxClosed):
        await stream.read()
    service.connections[0].transport.abort()
    await link.aclose()


async def test_a_silent_peer_is_given_up(service: FakeService, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link_module, "OPEN_TIMEOUT", 0.1)
    service.upgrade_gate.clear()
    with pytest.raises(GatewayError, match="does not answer in time") as caught:
        await Link.open(target(service))
    assert caught.value.kind == "timeout"
    service.upgrade_gate.set()


async def test_through_an_http_proxy(service: FakeService) -> None:
    """CONNECT to a proxy that asks for nothing and copies bytes."""
    asked: list[bytes] = []

    async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            writer.write(data)
        writer.close()

    async def proxy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append(await reader.readuntil(b"\r\n\r\n"))
        port = int(service.ws_origin.rpartition(":")[2])
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        async with asyncio.TaskGroup() as group:
            group.create_task(copy(reader, far_writer))
            group.create_task(copy(far_reader, writer))

    server = await asyncio.start_server(proxy, "127.0.0.1", 0)
    proxies = Proxies(http=f"http://user:pw@127.0.0.1:{server.sockets[0].getsockname()[1]}")
    profile = Profile("env", service.endpoint, KEY)
    link = await Link.open(Target("ws://sandbox.invalid/dp/id-x/tunnel", profile, "x", "open the tunnel", proxies))
    service.ports[7] = echo
    stream = await link.dial(7)
    await stream.write(b"x")
    assert await stream.read() == b"x"
    assert asked[0].startswith(b"CONNECT sandbox.invalid:80 ")
    assert KEY.encode() not in asked[0]
    await link.aclose()
    server.close()


@pytest.mark.parametrize("answer", [b"HTTP/1.1 407 Proxy Authentication Required\r\n\r\n", b"nonsense\r\n\r\n"])
async def test_a_proxy_that_refuses(answer: bytes) -> None:
    async with answering(answer) as port:
        proxies = Proxies(http=f"http://user:pw@127.0.0.1:{port}")
        with pytest.raises(GatewayError, match="HTTP proxy") as caught:
            await open_websocket(Target("ws://sandbox.invalid/", Profile("env", "http://e", KEY), "x", "open it", proxies))
    assert caught.value.kind == "unavailable"
    assert "pw" not in caught.value.message


async def test_closing_twice(link: Link) -> None:
    await link.aclose()
    await link.aclose()
    assert link.closed

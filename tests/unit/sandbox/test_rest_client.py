from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator

import pytest

from gatewayd.config import Profile, Proxies
from gatewayd.errors import GatewayError, ServiceRefused
from gatewayd.sandbox import rest_client
from gatewayd.sandbox.accounts import Account
from gatewayd.sandbox.rest_client import FixedAccess, RestClient, backoff, box_path
from tests.unit.fakeservice import KEY, Answer, FakeService, until


@pytest.fixture(autouse=True)
def fast_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rest_client, "BACKOFF_BASE", 0.001)
    monkeypatch.setattr(rest_client, "BACKOFF_MAX", 0.002)
    monkeypatch.setattr(rest_client, "backoff", lambda attempt: 0.001)


@pytest.fixture
async def closed_port() -> AsyncIterator[int]:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))  # bound and not listening: connections are refused, nobody else gets the port
        yield sock.getsockname()[1]


async def test_a_box_and_what_goes_over_the_wire(service: FakeService, account: Account) -> None:
    service.add_box("a b/ü")
    assert (await account.rest.get("a b/ü"))["id"] == "id-a b/ü"
    seen = service.seen[-1]
    assert seen.path == "/v2/sandboxes/boxes/a%20b%2F%C3%BC"
    assert seen.headers["x-api-key"] == KEY
    assert "x-tenant-id" not in seen.headers
    assert seen.headers["user-agent"].startswith("gatewayd/")


async def test_every_operation(service: FakeService, account: Account) -> None:
    rest = account.rest
    assert (await rest.create({"name": "x"}))["name"] == "x"
    assert (await rest.status("x"))["status"] == "ready"
    assert [box["name"] for box in (await rest.list({"limit": 5}))["sandboxes"]] == ["x"]
    assert (await rest.update("x", {"name": "y"}))["name"] == "y"
    await rest.stop("y")
    assert (await rest.status("y"))["status"] == "stopped"
    await rest.start("y")
    await rest.delete("y")
    with pytest.raises(GatewayError, match="no sandbox named 'y'") as caught:
        await rest.get("y")
    assert caught.value.kind == "not_found"
    assert [(seen.method, seen.body) for seen in service.seen if seen.path.endswith(("start", "stop"))] == [
        ("POST", {}),
        ("POST", {}),
    ]


async def test_the_workspace_header(service: FakeService) -> None:
    client = RestClient(FixedAccess(Profile("w", service.endpoint, KEY, "ws-1")), Proxies())
    await client.list({})
    assert service.seen[-1].headers["x-tenant-id"] == "ws-1"
    await client.aclose()


@pytest.mark.parametrize("status", [502, 503, 504])
async def test_a_passing_failure_is_retried(service: FakeService, account: Account, status: int) -> None:
    service.add_box("x")
    service.answers.extend([Answer(status), Answer(status), Answer(status)])
    assert (await account.rest.get("x"))["name"] == "x"
    assert len(service.seen) == 4


async def test_a_lasting_failure_is_told(service: FakeService, account: Account) -> None:
    service.answers.extend([Answer(502)] * 10)
    with pytest.raises(ServiceRefused, match="HTTP 502") as caught:
        await account.rest.get("x")
    assert caught.value.kind == "unavailable"
    assert len(service.seen) == 4


async def test_create_is_never_sent_twice(service: FakeService, account: Account) -> None:
    service.answers.append(Answer(503, {"detail": {"error": "Unschedulable", "message": "no room"}}))
    with pytest.raises(ServiceRefused, match="no room"):
        await account.rest.create({"name": "x"})
    assert len(service.seen) == 1


async def test_429_waits_as_told(service: FakeService, account: Account) -> None:
    service.add_box("x")
    service.answers.append(Answer(429, {}, {"Retry-After": "0.05"}))
    loop = asyncio.get_running_loop()
    begin = loop.time()
    await account.rest.create({"name": "y"})
    assert loop.time() - begin >= 0.05
    assert len(service.seen) == 2


async def test_429_that_asks_for_too_long(service: FakeService, account: Account) -> None:
    service.answers.append(Answer(429, {"detail": {"error": "Quota", "message": "10 sandboxes"}}, {"Retry-After": "3600"}))
    with pytest.raises(ServiceRefused, match="10 sandboxes") as caught:
        await account.rest.create({"name": "y"})
    assert caught.value.retry_after == 3600
    assert len(service.seen) == 1


async def test_a_repeated_delete_that_finds_nothing_has_succeeded(service: FakeService, account: Account) -> None:
    service.answers.append(Answer(502))
    await account.rest.delete("gone")
    assert [seen.method for seen in service.seen] == ["DELETE", "DELETE"]
    with pytest.raises(GatewayError, match="no sandbox named"):
        await account.rest.delete("gone")


async def test_the_wrong_key(service: FakeService) -> None:
    client = RestClient(FixedAccess(Profile("env", service.endpoint, "wrong-key")), Proxies())
    with pytest.raises(ServiceRefused, match="refuses the API key") as caught:
        await client.get("x")
    assert caught.value.kind == "auth"
    assert "wrong-key" not in caught.value.message + caught.value.hint + repr(caught.value)
    await client.aclose()


async def test_a_redirect_is_not_followed(service: FakeService, account: Account) -> None:
    service.answers.append(Answer(301, b"", {"Location": "http://127.0.0.1:1/evil"}))
    with pytest.raises(ServiceRefused, match=r"redirects to http://127.0.0.1:1/evil"):
        await account.rest.get("x")
    assert len(service.seen) == 1


async def test_nobody_listens(closed_port: int) -> None:
    client = RestClient(FixedAccess(Profile("local", f"http://127.0.0.1:{closed_port}", KEY)), Proxies())
    with pytest.raises(GatewayError, match="refuses connections") as caught:
        await client.get("x")
    assert caught.value.kind == "unavailable"
    assert "local.log" in caught.value.hint
    await client.aclose()


async def test_the_service_comes_up_elsewhere_between_attempts(service: FakeService, closed_port: int) -> None:
    """The embedded service was restarted: each attempt asks where it is."""

    class Moving:
        name = "local"
        asked = 0

        async def current(self) -> Profile:
            self.asked += 1
            return Profile("local", service.endpoint if self.asked > 1 else f"http://127.0.0.1:{closed_port}", KEY)

    service.add_box("x")
    access = Moving()
    client = RestClient(access, Proxies())
    assert (await client.get("x"))["name"] == "x"
    assert access.asked == 2
    await client.aclose()


async def test_an_unknown_host() -> None:
    client = RestClient(FixedAccess(Profile("env", "http://no-such-host.invalid", KEY)), Proxies(), retries=0)
    with pytest.raises(GatewayError, match=r"unknown host no-such-host.invalid"):
        await client.get("x")
    await client.aclose()


async def test_the_deadline_covers_everything(service: FakeService, account: Account) -> None:
    service.answers.append(Answer(200, {}, delay=30))
    with pytest.raises(GatewayError, match="does not answer in time") as caught:
        await account.rest.call("GET", "/v2/sandboxes/boxes", action="list", deadline=0.1)
    assert caught.value.kind == "timeout"


async def test_cancelling_a_request(service: FakeService, account: Account) -> None:
    service.answers.append(Answer(200, {}, delay=30))
    request = asyncio.ensure_future(account.rest.get("x"))
    await until(lambda: service.seen, "a request")
    request.cancel()
    with pytest.raises(asyncio.CancelledError):
        await request
    service.add_box("x")
    assert await account.rest.get("x")


@pytest.mark.parametrize("content", [b"not json", b"[1]", b'"text"', b"[" * 100000])
async def test_answers_that_make_no_sense(service: FakeService, account: Account, content: bytes) -> None:
    service.answers.append(Answer(200, content))
    with pytest.raises(GatewayError, match="not what a sandbox service sends") as caught:
        await account.rest.get("x")
    assert caught.value.kind == "unavailable"


async def test_an_answer_without_end(service: FakeService, account: Account, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rest_client, "ANSWER_MAX", 1000)
    service.answers.append(Answer(200, b"x" * 5000))
    with pytest.raises(GatewayError, match="the answer is larger"):
        await account.rest.get("x")


async def test_through_a_proxy(service: FakeService) -> None:
    """Plain http goes to the proxy as a whole URL; loopback never does."""
    asked: list[bytes] = []

    async def proxy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 17\r\nConnection: close\r\n\r\n" + b'{"sandboxes": []}')
        writer.close()
        await writer.wait_closed()

    server = await asyncio.start_server(proxy, "127.0.0.1", 0)
    proxies = Proxies(http=f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
    client = RestClient(FixedAccess(Profile("env", "http://service.invalid", KEY)), proxies, retries=0)
    assert await client.list({}) == {"sandboxes": []}
    assert asked[0].startswith(b"GET http://service.invalid/v2/sandboxes/boxes HTTP/1.1")
    await client.aclose()
    server.close()
    await server.wait_closed()
    service.add_box("x")
    direct = RestClient(FixedAccess(service.profile()), Proxies(http="http://127.0.0.1:1"), retries=0)
    assert (await direct.get("x"))["name"] == "x"
    await direct.aclose()


async def test_connections_stay_warm(service: FakeService, account: Account) -> None:
    service.add_box("x")
    for _ in range(5):
        await account.rest.get("x")
    assert len(service.rest_connections) == 1


async def test_a_warm_connection_that_has_died_unnoticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As after this machine slept: bytes are taken, and nothing comes back. Another request on its way is left alone."""
    monkeypatch.setattr(rest_client, "PATIENCE", 0.2)
    connections, release = 0, asyncio.Event()
    ok = b'HTTP/1.1 200 OK\r\nContent-Length: 20\r\n\r\n{"status": "ready" }'

    async def answer_once(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        with contextlib.suppress(asyncio.IncompleteReadError):
            request = await reader.readuntil(b"\r\n\r\n")
            if b"/slow" in request:
                await release.wait()
            writer.write(ok)
            await reader.read()
        writer.close()
        await writer.wait_closed()
        ended.append(writer)

    ended: list[asyncio.StreamWriter] = []
    server = await asyncio.start_server(answer_once, "127.0.0.1", 0)
    endpoint = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    client = RestClient(FixedAccess(Profile("x", endpoint, KEY)), Proxies())
    slow = asyncio.create_task(client.call("GET", "/slow", action="wait"))
    await until(lambda: connections == 1, "the slow request is there")
    assert await client.status("x") == {"status": "ready"}
    assert connections == 2
    assert await client.status("x") == {"status": "ready"}
    assert connections == 3
    release.set()
    assert await slow == {"status": "ready"}
    await client.aclose()
    await until(lambda: len(ended) == 3, "all connections are closed")
    server.close()
    await server.wait_closed()


async def test_what_is_sent_once_goes_on_a_fresh_connection(
    service: FakeService, account: Account, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr(rest_client, "_boot_time", lambda: now)
    await account.rest.create({"name": "a"})
    warm = dict(account.rest._clients)
    await account.rest.create({"name": "b"})
    assert account.rest._clients == warm
    now += rest_client.KEPT_FOR_ONCE + 1
    await account.rest.list({"limit": 5})
    assert account.rest._clients == warm
    now += rest_client.KEPT_FOR_ONCE + 1  # the service may be silent because the connection is dead
    await account.rest.create({"name": "c"})
    assert account.rest._clients.keys() == warm.keys()
    assert account.rest._clients != warm
    assert {name for box in (await account.rest.list({"limit": 5}))["sandboxes"] if (name := box["name"])} == {"a", "b", "c"}


def test_names_that_cannot_be_one() -> None:
    assert box_path("a/b?c", "status") == "/v2/sandboxes/boxes/a%2Fb%3Fc/status"
    for wrong in ("", ".", "..", "x" * 300):
        with pytest.raises(GatewayError, match="no sandbox name"):
            box_path(wrong)


def test_backoff_is_bounded() -> None:
    for attempt in (0, 1, 5, 100):
        assert 0 < backoff(attempt, 0.5, 4.0) <= 4.0
    assert 0.25 <= backoff(0, 0.5, 4.0) <= 0.5

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from gatewayd import api, control
from gatewayd.config import Caller
from gatewayd.control import ControlServer
from gatewayd.frontends.routes import ROUTES, Services
from tests.unit.fakeservice import KEY, Answer, FakeService, until
from tests.unit.parts import Parts


class Control:
    """A client of control.sock."""

    def __init__(self, path: Path, stops: list[bool]) -> None:
        self.path = path
        self.stops = stops  # what POST /shutdown asked for
        self.carriers: dict[tuple[str, str], str] = {}  # profile and sandbox → what Services.carrier says
        self.http = httpx2.AsyncClient(transport=httpx2.AsyncHTTPTransport(uds=str(path)), base_url="http://gatewayd")

    async def ask(self, verb: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
        response = await self.http.request(
            verb, path, json=body, headers={name.replace("_", "-"): value for name, value in headers.items()}
        )
        return response.status_code, response.json() if response.content else None


@pytest.fixture
async def sock(parts: Parts, tmp_path: Path) -> AsyncIterator[Control]:
    stops: list[bool] = []
    services = Services(
        parts.settings, parts.accounts, parts.directory, parts.pool, parts.forwards, parts.embedded, stop=stops.append
    )
    path = tmp_path / "control.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(path))
        listener.listen()
        server = ControlServer(services)
        await server.start(listener)
        client = Control(path, stops)
        services.carrier = lambda account, sandbox: client.carriers.get((account.name, sandbox), "")
        yield client
        await client.http.aclose()
        await server.aclose()
        await server.aclose()


def error(answer: tuple[int, Any]) -> tuple[int, str, str]:
    status, body = answer
    assert set(body) == {"error"}
    return status, body["error"]["kind"], body["error"]["message"]


async def test_status(sock: Control, service: FakeService, tmp_path: Path) -> None:
    status, body = await sock.ask("GET", "/v1/status")
    assert status == 200
    assert body["version"] == api.VERSION
    assert (body["profile"], body["endpoint"]) == ("env", service.endpoint)
    assert body["log_file"] == str(tmp_path / ".local/state/gatewayd/daemon.log")
    assert (body["links"], body["forwards"], body["local"]["state"]) == ([], [], "stopped")
    assert KEY not in json.dumps(body)


async def test_a_sandbox_from_beginning_to_end(sock: Control, service: FakeService) -> None:
    status, box = await sock.ask("POST", "/v1/sandboxes", {"name": "new", "vcpus": 2, "labels": {"a": "b"}, "wait": True})
    assert (status, box["name"], box["status"]) == (201, "new", "ready")
    assert service.seen[-1].body == {"name": "new", "vcpus": 2, "labels": {"a": "b"}, "wait_for_ready": False}
    assert (await sock.ask("GET", "/v1/sandboxes/new"))[1]["id"] == "id-new"
    assert (await sock.ask("GET", "/v1/sandboxes/new/status"))[1] == {
        "status": "ready",
        "status_message": None,
        "ssh": None,
        "link": None,
    }
    status, body = await sock.ask("GET", "/v1/sandboxes?limit=1&offset=1&name_contains=n&label=a%3Db")
    assert [box["name"] for box in body["sandboxes"]] == ["new"]
    assert service.seen[-1].query == "name_contains=n&label=a%3Db&limit=1&offset=1"
    status, box = await sock.ask("POST", "/v1/sandboxes/new/stop", {"wait": True, "timeout": 5})
    assert (status, box["status"]) == (200, "stopped")
    assert (await sock.ask("POST", "/v1/sandboxes/new/wait", {"for": "stopped", "timeout": 1}))[1]["status"] == "stopped"
    assert (await sock.ask("POST", "/v1/sandboxes/new/start"))[1]["status"] == "ready"
    assert (await sock.ask("PATCH", "/v1/sandboxes/new", {"name": "renamed"}))[1]["name"] == "renamed"
    assert await sock.ask("DELETE", "/v1/sandboxes/renamed") == (204, None)
    assert error(await sock.ask("GET", "/v1/sandboxes/renamed"))[:2] == (404, "not_found")


async def test_a_sandbox_that_takes_its_time(sock: Control, service: FakeService) -> None:
    service.answers.append(Answer(200, {"name": "slow", "status": "provisioning"}))
    service.add_box("slow", status="provisioning")
    status, kind, message = error(await sock.ask("POST", "/v1/sandboxes", {"name": "slow", "wait": True, "timeout": 0.2}))
    assert (status, kind) == (504, "timeout")
    assert "sandbox 'slow' is still provisioning" in message


async def test_names_travel_encoded(sock: Control, service: FakeService) -> None:
    service.add_box("a b?c")
    assert (await sock.ask("GET", "/v1/sandboxes/a%20b%3Fc"))[1]["name"] == "a b?c"


async def test_links_are_ended_with_their_sandbox(sock: Control, service: FakeService, parts: Parts) -> None:
    for path, verb, body in (("/stop", "POST", {}), ("", "PATCH", {"name": "y"}), ("", "DELETE", None)):
        name = "x" if verb != "DELETE" else "y"
        await parts.pool.warm(parts.accounts.select(Caller()), name)
        assert (await sock.ask(verb, f"/v1/sandboxes/{name}{path}", body))[0] in (200, 204)
        await until(lambda: all(link["state"] == "down" for link in parts.pool.status()), "the link is down")


async def test_the_status_tells_how_a_sandbox_is_reached(sock: Control, service: FakeService, parts: Parts) -> None:
    account = parts.accounts.select(Caller())
    await parts.pool.warm(account, "x")
    sock.carriers[account.name, "x"] = "guest"
    _, body = await sock.ask("GET", "/v1/sandboxes/x/status")
    assert (body["ssh"], body["link"]["state"], body["link"]["sandbox"]) == ("guest", "up", "x")
    service.add_box("idle", status="stopped")
    asked = len(service.seen)
    _, body = await sock.ask("GET", "/v1/sandboxes/idle/status")
    assert body == {"status": "stopped", "status_message": None, "ssh": None, "link": None}
    assert len(service.seen) == asked + 1  # one question, which starts nothing


async def test_the_host_key_stays_the_same(sock: Control, tmp_path: Path) -> None:
    (tmp_path / ".local/state/gatewayd").mkdir(parents=True)  # as the daemon does when it starts
    status, body = await sock.ask("GET", "/v1/ssh")
    assert status == 200
    assert body["host_key"].startswith("ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAI")
    assert (await sock.ask("GET", "/v1/ssh"))[1] == body
    key = tmp_path / ".local/state/gatewayd/ssh_host_ed25519_key"
    assert key.stat().st_mode & 0o777 == 0o600
    key.chmod(0o644)
    assert error(await sock.ask("GET", "/v1/ssh"))[:2] == (500, "config")


@pytest.mark.parametrize(
    ("verb", "path", "body", "text"),
    [
        ("POST", "/v1/sandboxes", {"nmae": "x"}, "nmae is no field of this request"),
        ("POST", "/v1/sandboxes", {"wait": "yes"}, "wait must be true or false"),
        ("POST", "/v1/sandboxes", {"timeout": -1}, "timeout must be a number"),
        ("POST", "/v1/sandboxes", [1], "not a JSON object"),
        ("PATCH", "/v1/sandboxes/x", {"status": "ready"}, "status is no field"),
        ("GET", "/v1/sandboxes?limit=many", None, "limit must be a whole number"),
        ("GET", "/v1/sandboxes?limt=1", None, "limt is no field"),
        ("GET", "/v1/sandboxes?limit=1&limit=2", None, "limit is given twice"),
        ("POST", "/v1/sandboxes/x/wait", {"for": "godot"}, "for must be ready or stopped"),
        ("POST", "/v1/sandboxes/x/ssh-setup", {"public_keys": []}, "public_keys must be a list of lines"),
        ("POST", "/v1/sandboxes/x/ssh-setup", {"public_keys": ["x"]}, "is no public key line"),
        ("GET", "/v1/nothing", None, "no such route: GET /v1/nothing"),
        ("GET", "/v1/sandboxes/", None, "no such route"),
    ],
)
async def test_requests_that_make_no_sense(sock: Control, verb: str, path: str, body: Any, text: str) -> None:
    status, kind, message = error(await sock.ask(verb, path, body))
    assert (status, kind) == (400, "usage")
    assert text in message


async def test_bodies_that_are_none(sock: Control) -> None:
    for content, text in ((b"{", "not JSON"), (b"[" * 100000, "not JSON"), (b'"' + b"x" * (2 << 20) + b'"', "larger than")):
        response = await sock.http.post("/v1/sandboxes", content=content)
        assert response.status_code == 400
        assert text in response.json()["error"]["message"]


async def test_the_wrong_verb(sock: Control) -> None:
    assert error(await sock.ask("DELETE", "/v1/status"))[:2] == (405, "usage")


async def test_profiles_and_credentials(sock: Control, service: FakeService) -> None:
    assert error(await sock.ask("GET", "/v1/sandboxes", X_Gatewayd_Profile="nope"))[:2] == (500, "config")
    status, kind, message = error(
        await sock.ask("GET", "/v1/sandboxes", X_Gatewayd_Api_Key="wrong-key", X_Gatewayd_Endpoint=service.endpoint)
    )
    assert (status, kind) == (403, "auth")
    assert "wrong-key" not in message
    answer = await sock.ask(
        "GET", "/v1/sandboxes", X_Gatewayd_Api_Key=KEY, X_Gatewayd_Endpoint=service.endpoint, X_Gatewayd_Workspace="w"
    )
    assert answer[0] == 200
    assert service.seen[-1].headers["x-tenant-id"] == "w"


async def test_errors_of_the_service_are_passed_on(sock: Control, service: FakeService) -> None:
    service.answers.append(Answer(422, {"detail": [{"loc": ["body", "vcpus"], "msg": "at most 8"}]}))
    assert error(await sock.ask("POST", "/v1/sandboxes", {"vcpus": 99})) == (
        422,
        "invalid",
        "cannot create a sandbox: vcpus: at most 8",
    )
    service.answers.append(Answer(409, {"detail": {"error": "Conflict", "message": "the name x is taken"}}))
    assert error(await sock.ask("POST", "/v1/sandboxes", {"name": "x"}))[:2] == (409, "conflict")


async def test_a_defect_is_one_line(
    sock: Control, service: FakeService, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def broken(*_: object) -> None:
        raise ValueError("boom")

    monkeypatch.setattr("gatewayd.frontends.routes.list_boxes", broken)
    status, kind, message = error(await sock.ask("GET", "/v1/sandboxes"))
    assert (status, kind, message) == (500, "internal", "internal error, see the daemon's log")
    assert "boom" in caplog.text


async def test_shutdown(sock: Control) -> None:
    assert await sock.ask("POST", "/v1/shutdown", {"keep_local": True}) == (202, {})
    assert await sock.ask("POST", "/v1/shutdown") == (202, {})
    assert sock.stops == [True, False]


async def test_ssh_keys(sock: Control, service: FakeService) -> None:
    blob = (11).to_bytes(4, "big") + b"ssh-ed25519" + (32).to_bytes(4, "big") + bytes(32)
    key = f"ssh-ed25519 {base64.b64encode(blob).decode()} me"
    service.boxes["x"]["dataplane_url"] = f"{service.endpoint}/dp/x"
    service.execute = lambda body: {
        "stdout": f"USER root\nHOSTKEY {key}\nADDED {key}\nREMOVED {key}\n",
        "stderr": "",
        "exit_code": 0,
    }
    status, body = await sock.ask("POST", "/v1/sandboxes/x/ssh-setup", {"public_keys": [key, key]})
    assert (status, body) == (200, {"user": "root", "host_keys": [key], "added": [key]})
    assert await sock.ask("DELETE", "/v1/sandboxes/x/ssh-setup", {"public_keys": [key]}) == (200, {"removed": [key]})


async def test_a_client_that_leaves_cancels_its_work(sock: Control, service: FakeService) -> None:
    service.add_box("slow", status="provisioning")
    with pytest.raises(httpx2.ReadTimeout):
        await sock.http.post("/v1/sandboxes/slow/wait", json={"timeout": 60}, timeout=0.2)
    await asyncio.sleep(0.1)
    polls = len(service.seen)
    await asyncio.sleep(0.5)
    assert len(service.seen) == polls


async def test_openapi_is_the_table(sock: Control) -> None:
    status, document = await sock.ask("GET", "/openapi.json")
    assert status == 200
    found = {(verb.upper(), path) for path, verbs in document["paths"].items() for verb in verbs}
    assert found == {(route.verb, f"/v1{route.path}".replace(":path", "")) for route in ROUTES}
    assert document["paths"]["/v1/sandboxes"]["post"]["requestBody"]["content"]["application/json"]["schema"][
        "properties"
    ].keys() >= {"wait"}


async def test_another_user_gets_nothing(sock: Control, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "peer_is_self", lambda peer: False)
    reader, writer = await asyncio.open_unix_connection(str(sock.path))
    writer.write(b"GET /v1/status HTTP/1.1\r\nHost: x\r\n\r\n")
    with contextlib.suppress(ConnectionError):
        assert await reader.read() == b""
    writer.close()


async def test_garbage_instead_of_http(sock: Control) -> None:
    reader, writer = await asyncio.open_unix_connection(str(sock.path))
    writer.write(b"\x16\x03\x01 no http\r\n\r\n")
    assert (await reader.read()).startswith(b"HTTP/1.1 400 ")
    writer.close()
    assert (await sock.ask("GET", "/v1/status"))[0] == 200

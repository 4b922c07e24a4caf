"""Commands over Server-Sent Events: the unmodified SDK with its switch set, and what is on the wire."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import httpx2
import pytest
from langsmith.sandbox import CommandTimeoutError, SandboxClient, SandboxOperationError

from tests.sdk.cutter import Cutter

if TYPE_CHECKING:
    from tests.sdk.conftest import Service

MIB = 1 << 20


@pytest.fixture(autouse=True)
def _sse(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LANGSMITH_EXPERIMENTAL_FEATURES", "sandbox_sse_exec")


@pytest.fixture
def cutter(service: Service) -> Iterator[Cutter]:
    """A way to the service that breaks connections."""
    with Cutter(urlsplit(service.endpoint).port or 0) as made:
        yield made


def events(answer: httpx2.Response) -> Iterator[tuple[str, dict[str, Any]]]:
    """The events of a response, as they come; a heartbeat is called "comment"."""
    name = ""
    for line in answer.iter_lines():
        if line.startswith("event: "):
            name = line.removeprefix("event: ")
        elif line.startswith("data: "):
            yield name, json.loads(line.removeprefix("data: "))
        elif line.startswith(":"):
            yield "comment", {}


class Collector:
    """Puts the pieces of a stream together and checks that none is missing."""

    def __init__(self) -> None:
        self.digest = hashlib.sha256()
        self.end = 0

    def add(self, data: dict[str, Any]) -> None:
        """The next piece."""
        assert data["offset"] == self.end
        content = base64.b64decode(data["data"], validate=True)
        self.digest.update(content)
        self.end += len(content)


def test_output_and_exit_code(sandbox: Any) -> None:
    result = sandbox.run("echo out; echo err >&2; cat; exit 7")
    assert (result.stdout, result.stderr, result.exit_code) == ("out\n", "err\n", 7)
    assert sandbox.run("pwd; echo $A", cwd="/srv", env={"A": "1"}).stdout == "/srv\n1\n"
    assert sandbox.run("id -un", run_config={"user": "nobody"}).stdout == "nobody\n"
    assert sandbox.run("kill -KILL $$").exit_code == 137


def test_it_is_streamed(sandbox: Any) -> None:
    handle = sandbox.run("echo first; until [ -e /tmp/go ]; do sleep 0.02; done; echo second", wait=False)
    chunks = iter(handle)
    assert next(chunks).data == "first\n"
    sandbox.write("/tmp/go", "")
    assert next(chunks).data == "second\n"
    assert handle.result.exit_code == 0


def test_failures(sandbox: Any) -> None:
    with pytest.raises(SandboxOperationError, match="cannot run"):
        sandbox.run("true", cwd="/nowhere")
    with pytest.raises(CommandTimeoutError, match="1 second"):
        sandbox.run("sleep 60", timeout=1)
    with pytest.raises(SandboxOperationError, match="not found: nosuchcommand"):
        _ = sandbox.reconnect("nosuchcommand").result
    handle = sandbox.run("echo x", ttl_seconds=0, wait=False)
    assert handle.result.stdout == "x\n"
    with pytest.raises(SandboxOperationError, match="expired"):
        _ = sandbox.reconnect(handle.command_id).result


def test_much_output_needs_acknowledgements(sandbox: Any) -> None:
    command = "head -c 15728640 /dev/zero | tr '\\0' x; seq 1 700000 >&2"  # 15 MiB and 5 MiB: several rings full
    result = sandbox.run(command, timeout=60)
    assert len(result.stdout) == 15 * MIB
    assert result.stdout.strip("x") == ""
    assert result.stderr == "".join(f"{number}\n" for number in range(1, 700001))


async def test_async_much_output_and_reconnect(service: Service, name: str) -> None:
    async with service.async_client() as client, await client.sandbox(name=name) as made:
        results = await asyncio.gather(*(made.run(f"seq {n}00001 {n + 1}00000; exit {n}") for n in range(3)))
        for n, result in enumerate(results):
            assert result.exit_code == n
            assert result.stdout == "".join(f"{number}\n" for number in range(n * 100000 + 1, (n + 1) * 100000 + 1))
        handle = await made.run("printf 0123456789; printf abcdef >&2", wait=False)
        await handle.result
        again = await made.reconnect(handle.command_id, stdout_offset=4, stderr_offset=6)
        result = await again.result
        assert (result.stdout, result.stderr) == ("456789", "")


def test_resuming_at_an_offset(sandbox: Any) -> None:
    handle = sandbox.run("printf grüße; printf oh >&2", wait=False)
    assert handle.result.exit_code == 0
    again = sandbox.reconnect(handle.command_id, stdout_offset=2, stderr_offset=1)
    assert (again.result.stdout, again.result.stderr) == ("üße", "h")


def test_a_cut_connection_loses_and_repeats_nothing(service: Service, sandbox: Any, cutter: Cutter) -> None:
    with SandboxClient(api_endpoint=f"http://127.0.0.1:{cutter.port}/v2/sandboxes", api_key=service.key) as client:
        through = client.get_sandbox(sandbox.name)
        handle = through.run("seq 1 1000000; echo end >&2", wait=False, timeout=60)
        cutter.after = MIB
        seen = []
        for number, chunk in enumerate(handle):
            seen.append(chunk.data)
            if number == 30:
                cutter.after = 1 << 40  # no more cuts
        assert "".join(chunk for chunk in seen if chunk != "end\n") == "".join(f"{number}\n" for number in range(1, 1000001))
        assert handle.result.exit_code == 0
        assert cutter.cuts > 0


def test_the_client_goes_and_the_command_runs_on(service: Service, sandbox: Any) -> None:
    body = {"command": "echo one; until [ -e /tmp/on ]; do sleep 0.02; done; echo two; exit 3", "command_id": "runs-on"}
    with service.http() as http:
        with http.stream("POST", f"{sandbox.dataplane_url}/execute/stream/start", json=body) as answer:
            assert answer.headers["content-type"].startswith("text/event-stream")
            seen = events(answer)
            name, started = next(seen)
            assert (name, started["command_id"]) == ("started", "runs-on")
            assert next(seen)[0] == "stdout"
        sandbox.write("/tmp/on", "")
        with http.stream("POST", f"{sandbox.dataplane_url}/execute/stream/start", json=body) as answer:  # the same command again
            again = list(events(answer))
    assert again[0] == ("started", started)
    assert b"".join(base64.b64decode(data["data"]) for name, data in again if name == "stdout") == b"one\ntwo\n"
    assert sorted(again[-3:-1], key=str) == [
        ("stream_end", {"stream": "stderr", "offset": 0}),
        ("stream_end", {"stream": "stdout", "offset": 8}),
    ]
    assert again[-1] == ("exit", {"exit_code": 3})


def test_any_bytes(service: Service, sandbox: Any) -> None:
    """Twenty megabytes of noise: acknowledged ring by ring, to the byte, twice resumed from the middle."""
    size = 20 * MIB
    sandbox.run(f"head -c {size} /dev/urandom > /root/noise")
    collected = Collector()
    acks = 0
    with service.http() as http:
        path = "start"
        body: dict[str, Any] = {"command": "cat /root/noise; exit 5", "command_id": "noise"}
        done = False
        while not done:
            with http.stream("POST", f"{sandbox.dataplane_url}/execute/stream/{path}", json=body) as answer:
                assert answer.status_code == 200
                for name, data in events(answer):
                    if name == "stdout":
                        collected.add(data)
                    elif name == "ack_required":
                        acks += 1
                        assert data == {"stdout_offset": collected.end, "stderr_offset": 0}
                    elif name == "exit":
                        done = data["exit_code"] == 5
                    if name == "stdout" and acks in (1, 3) and collected.end % (4 * MIB) > 2 * MIB:
                        acks += 1
                        break  # hangs up with megabytes on the way
            path, body = "resume", {"command_id": "noise", "stdout_offset": collected.end, "stderr_offset": 0}
    assert collected.end == size
    assert sandbox.run("sha256sum < /root/noise").stdout.split()[0] == collected.digest.hexdigest()
    assert acks >= 5


def test_unacknowledged_output_blocks_the_command_and_is_not_lost(service: Service, sandbox: Any) -> None:
    with service.http() as http:
        url = f"{sandbox.dataplane_url}/execute/stream"
        body = {"command": "head -c 8388608 /dev/zero; touch /root/wrote-all", "command_id": "blocks"}
        with http.stream("POST", f"{url}/start", json=body) as answer:
            last = list(events(answer))[-1]
        assert last == ("ack_required", {"stdout_offset": 4 * MIB, "stderr_offset": 0})
        assert sandbox.run("sleep 0.2; ls /root/wrote-all").exit_code != 0
        with http.stream("POST", f"{url}/resume", json={"command_id": "blocks", "stdout_offset": MIB}) as answer:
            first = next(data for name, data in events(answer) if name == "stdout")
        assert first["offset"] == MIB  # kept until it is acknowledged
        with http.stream("POST", f"{url}/resume", json={"command_id": "blocks", "stdout_offset": 6 * MIB}) as answer:
            assert answer.status_code == 200


def test_both_transports_know_the_same_commands(service: Service, sandbox: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    handle = sandbox.run("echo over events; sleep 0.2; exit 4", wait=False)
    next(iter(handle))
    monkeypatch.setenv("LANGSMITH_EXPERIMENTAL_FEATURES", "nosandbox_sse_exec")
    result = sandbox.reconnect(handle.command_id).result
    assert (result.stdout, result.exit_code) == ("over events\n", 4)


def test_what_one_way_cannot_do_is_refused(service: Service, sandbox: Any) -> None:
    with service.http() as http:
        for field in ("pty", "kill_on_disconnect", "ssh_agent_forward"):
            answer = http.post(f"{sandbox.dataplane_url}/execute/stream/start", json={"command": "true", field: True})
            assert answer.status_code == 422
            assert answer.json()["detail"][0]["loc"] == ["body", field]
        assert http.post(f"{sandbox.dataplane_url}/execute/stream/start", json={"command": ""}).status_code == 422
        late = http.post(f"{sandbox.dataplane_url}/execute/stream/resume", json={"command_id": "unheard-of"})
        assert (late.status_code, late.json()["detail"]["error"]) == (404, "CommandNotFound")


def test_the_service_ends(own_service: Callable[..., Service], name: str) -> None:
    service = own_service()
    with service.client() as client, service.http() as http:
        made = client.create_sandbox(name=name)
        body = {"command": "echo here; sleep 1000"}
        with http.stream("POST", f"{made.dataplane_url}/execute/stream/start", json=body) as answer:
            seen = events(answer)
            assert [next(seen)[0], next(seen)[0]] == ["started", "stdout"]
            stopping = threading.Thread(target=service.stop)
            stopping.start()
            rest = list(seen)
        stopping.join()
    assert [(name, data.get("error_type")) for name, data in rest] == [("error", "ServerShuttingDown")]

from __future__ import annotations

import asyncio
import fcntl
import os
import signal
import stat
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from gatewayd.config import Proxies
from gatewayd.errors import GatewayError
from gatewayd.sandbox import embedded as embedded_module
from gatewayd.sandbox.embedded import Embedded
from gatewayd.sandbox.rest_client import FixedAccess, RestClient
from tests.unit.fakeservice import until


@pytest.fixture
async def make(tmp_path: Path) -> AsyncIterator[Callable[[], Embedded]]:
    """Makes instances on one state directory; at the end nothing of it runs any more."""
    made: list[Embedded] = []

    def make() -> Embedded:
        made.append(
            Embedded(tmp_path / "state", {**os.environ, "LANGSMITH_API_KEY": "outer-secret", "NOTIFY_SOCKET": "/nowhere"})
        )
        return made[-1]

    yield make
    last = made[-1]
    await last.stop()
    for each in made:
        await each.aclose()
    assert (await last.find())["state"] == "stopped"
    await last.aclose()


def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """Run `script` in place of the service."""
    path = tmp_path / "service"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(path))


async def test_started_once_used_adopted_and_stopped(make: Callable[[], Embedded], tmp_path: Path) -> None:
    first = make()
    assert await first.find() == {"endpoint": "", "pid": None, "state": "stopped"}
    profiles = await asyncio.gather(*(first.ensure() for _ in range(5)))
    assert len(set(profiles)) == 1
    profile = profiles[0]
    assert (profile.name, profile.endpoint[:17]) == ("local", "http://127.0.0.1:")
    assert profile.api_key == (tmp_path / "state/local/api-key").read_text().strip()
    status = await first.find()
    assert (status["state"], status["endpoint"]) == ("running", profile.endpoint)
    pid = status["pid"]
    assert pid is not None
    assert os.getsid(pid) == pid
    environment = Path(f"/proc/{pid}/environ").read_bytes()
    assert b"outer-secret" not in environment
    assert b"NOTIFY_SOCKET" not in environment
    assert profile.api_key.encode() not in Path(f"/proc/{pid}/cmdline").read_bytes()
    assert stat.S_IMODE((tmp_path / "state/local.log").stat().st_mode) == 0o600
    rest = RestClient(FixedAccess(profile), Proxies())
    assert await rest.list({}) == {"sandboxes": []} | await rest.list({})
    await rest.aclose()

    await first.aclose()  # the service stays
    second = make()
    assert await second.ensure() == profile
    assert (await second.find())["pid"] == pid
    await second.stop()
    assert not Path(f"/proc/{pid}/exe").exists()
    await second.stop()


async def test_killed_and_started_again(make: Callable[[], Embedded]) -> None:
    embedded = make()
    await embedded.ensure()
    pid = (await embedded.find())["pid"]
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    await until(lambda: embedded._service is None, "the end is noticed")
    await embedded.ensure()
    assert (await embedded.find())["pid"] != pid


async def test_a_stale_endpoint_is_not_believed(make: Callable[[], Embedded], tmp_path: Path) -> None:
    """The pid lives, nobody answers with our key: it is another process by now."""
    directory = tmp_path / "state/local"
    directory.mkdir(parents=True, mode=0o700)
    (directory / "api-key").touch(0o600)
    (directory / "api-key").write_text("old-key")
    for endpoint in ('"http://127.0.0.1:1"', '"http://evil.example"', '"http://127.0.0.1:notaport"', "3"):
        (directory / "endpoint.json").write_text(f'{{"endpoint": {endpoint}, "pid": {os.getpid()}}}')
        assert (await make().find())["state"] == "stopped"


async def test_failing_shows_what_it_said(make: Callable[[], Embedded], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "state").mkdir(mode=0o700)
    (tmp_path / "state/local.log").write_text("yesterday's trouble\n")
    program(tmp_path, monkeypatch, "echo 'no bwrap\033[31m here' >&2; exit 9")
    embedded = make()
    outcomes = await asyncio.gather(*(embedded.ensure() for _ in range(3)), return_exceptions=True)
    for outcome in outcomes:
        assert isinstance(outcome, GatewayError)
        assert outcome.message == "cannot start the local sandbox service: it ended with exit code 9: no bwrap [31m here"
        assert outcome.kind == "unavailable"
        assert "local.log" in outcome.hint
    assert (await embedded.find())["state"] == "stopped"


async def test_a_long_log_is_put_aside(make: Callable[[], Embedded], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded_module, "LOG_MAX", 10)
    (tmp_path / "state").mkdir(mode=0o700)
    (tmp_path / "state/local.log").write_text("something that is long enough\n")
    program(tmp_path, monkeypatch, "echo new >&2; exit 9")
    with pytest.raises(GatewayError, match="exit code 9: new"):
        await make().ensure()
    assert (tmp_path / "state/local.log").read_text() == "new\n"
    assert (tmp_path / "state/local.log.1").read_text() == "something that is long enough\n"


async def test_a_service_that_says_nothing_is_given_up(
    make: Callable[[], Embedded], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded_module, "START_TIMEOUT", 0.3)
    program(tmp_path, monkeypatch, f"echo $$ > {tmp_path}/pid; exec sleep 100")
    with pytest.raises(GatewayError, match="was not ready within"):
        await make().ensure()
    assert not Path(f"/proc/{(tmp_path / 'pid').read_text().strip()}").exists()


@pytest.mark.parametrize("line", ["nonsense", '{"endpoint": "https://elsewhere"}', "[]"])
async def test_a_service_that_talks_nonsense(
    make: Callable[[], Embedded], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str
) -> None:
    program(tmp_path, monkeypatch, f"echo '{line}'; exit 0")
    with pytest.raises(GatewayError, match="cannot start the local sandbox service"):
        await make().ensure()


async def test_another_process_holds_the_state_directory(
    make: Callable[[], Embedded], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded_module, "START_TIMEOUT", 3.0)
    directory = tmp_path / "state/local"
    directory.mkdir(parents=True, mode=0o700)
    with (directory / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(GatewayError, match="exit code 73"):
            await make().ensure()


async def test_a_state_directory_that_cannot_be(make: Callable[[], Embedded], tmp_path: Path) -> None:
    (tmp_path / "state").write_text("a file")
    with pytest.raises(GatewayError, match="cannot start the local service") as caught:
        await make().ensure()
    assert caught.value.kind == "config"

"""The service itself: started, ended, killed, started twice; and sandboxes that fail or crash."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import psutil
import pytest
from langsmith.sandbox import ResourceCreationError, SandboxClientError, SandboxNotReadyError
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

if TYPE_CHECKING:
    from tests.sdk.conftest import Service

Start = Callable[..., "Service"]


def wait_until(true: Callable[[], Any], what: str, deadline: float = 15.0) -> Any:
    """Poll something that sends no event."""
    end = time.monotonic() + deadline
    while not (value := true()):
        assert time.monotonic() < end, f"not within {deadline:g} s: {what}"
        time.sleep(0.02)
    return value


def run_local(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "gatewayd", "local", *args],
        capture_output=True,
        text=True,
        timeout=30,
        stdin=subprocess.DEVNULL,
        check=False,
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_ends_in_order_and_starts_again(own_service: Start, name: str, number: int) -> None:
    first = own_service()
    published = json.loads((first.state_dir / "endpoint.json").read_text())
    assert published == {"endpoint": first.endpoint, "pid": first.process.pid, "version": published["version"]}
    with first.client() as client:
        made = client.create_sandbox(name=name)
        made.write("file", "kept")
        made.run("sleep 1000 >/dev/null 2>&1 </dev/null &")
        children = psutil.Process(first.process.pid).children(recursive=True)
        assert children
    first.stop(number)
    assert not [child for child in children if child.is_running()]
    second = own_service()
    assert second.key == first.key
    with second.client() as client:
        [back] = client.list_sandboxes()
        assert (back.id, back.status, back.status_message) == (made.id, "stopped", None)
        assert back.read("file") == b"kept"
        back.delete()
    assert not any((second.state_dir / "boxes").iterdir())


def test_sandboxes_survive_a_killed_service(own_service: Start, name: str) -> None:
    first = own_service()
    with first.client() as client:
        made = client.create_sandbox(name=name, labels={"a": "b"})
        made.write("file", "kept")
        made.run("sleep 1000 >/dev/null 2>&1 </dev/null &")
        children = psutil.Process(first.process.pid).children(recursive=True)
    first.kill()
    assert (first.state_dir / "endpoint.json").exists()
    second = own_service()
    wait_until(lambda: not [child for child in children if child.is_running()], "the killed service's processes are gone")
    with second.client() as client:
        [back] = client.list_sandboxes()
        assert (back.id, back.status, back.labels) == (made.id, "stopped", {"a": "b"})
        assert "ended without stopping it" in back.status_message
        assert back.read("file") == b"kept"
        assert client.get_sandbox(name).status == "ready"
        back.delete()


def test_one_service_for_one_state_directory(own_service: Start) -> None:
    service = own_service()
    second = run_local("--state-dir", str(service.state_dir))
    assert second.returncode == 73
    assert second.stdout == ""
    assert str(service.process.pid) in second.stderr
    assert service.endpoint in second.stderr
    with service.client() as client:
        assert client.list_sandboxes() == []


def test_ports(own_service: Start, tmp_path: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        refused = run_local("--state-dir", str(tmp_path / "other"), "--port", str(port))
    assert refused.returncode == 73
    assert f"127.0.0.1 port {port}: address already in use" in refused.stderr
    assert not (tmp_path / "other" / "endpoint.json").exists()
    service = own_service("--port", str(port))
    assert service.endpoint == f"http://127.0.0.1:{port}"
    service.stop()
    again = own_service("--port", str(port), "--host", "::1")
    assert again.endpoint == f"http://[::1]:{port}"
    with again.client() as client:
        assert client.list_sandboxes() == []


@pytest.mark.parametrize("args", [[], ["--state-dir", "x", "--port", "70000"], ["--state-dir", "x", "--unknown"]])
def test_usage(args: list[str]) -> None:
    assert run_local(*args).returncode == 2


def test_another_addresss_is_warned_about(own_service: Start) -> None:
    service = own_service("--port", "0", "--host", "0.0.0.0")
    assert "WARNING" in service.text()
    assert "without encryption" in service.text()
    assert service.endpoint.startswith("http://127.0.0.1:")
    with service.client() as client:
        assert client.list_sandboxes() == []


def test_websockets_are_told_that_it_goes(own_service: Start) -> None:
    service = own_service()
    with service.client() as client, contextlib.ExitStack() as stack:
        made = client.create_sandbox()
        url = made.dataplane_url.replace("http://", "ws://")
        headers = {"X-Api-Key": service.key}
        command = stack.enter_context(connect(f"{url}/execute/ws", additional_headers=headers))
        command.send(json.dumps({"type": "execute", "command": "echo ready; sleep 1000"}))
        while "ready" not in str(command.recv(timeout=10)):
            pass
        tunnel = stack.enter_context(connect(f"{url}/tunnel", additional_headers=headers))
        request = threading.Thread(
            target=client._http.post, args=(f"{made.dataplane_url}/execute",), kwargs={"json": {"command": "sleep 1000"}}
        )
        request.start()
        wait_until(lambda: made.run("grep -lsa 'sleep.100[0]' /proc/[0-9]*/cmdline | wc -l").stdout >= "2", "both commands run")
        service.stop()
        assert close_code(command) == close_code(tunnel) == 1001
        request.join(10)
        assert not request.is_alive()


def close_code(ws: ClientConnection) -> int | None:
    """Read to the end: the code the service closed with."""
    try:
        while True:
            ws.recv(timeout=10)
    except ConnectionClosed as closed:
        return closed.rcvd.code if closed.rcvd else None


def test_a_client_that_does_not_read_does_not_hold_it_up(own_service: Start) -> None:
    service = own_service()
    with service.client() as client:
        made = client.create_sandbox()
        handles = [made.run("exec yes", wait=False) for _ in range(3)]
        wait_until(lambda: all(handle._control._ws.recv_messages.paused for handle in handles), "output piles up")
        made.write("large", bytes(20 << 20))
        with service.http() as http, http.stream("GET", f"{made.dataplane_url}/download", params={"path": "large"}) as answer:
            assert answer.status_code == 200
            service.stop()


def test_a_second_signal_ends_at_once(own_service: Start) -> None:
    service = own_service()
    with service.client() as client:
        client.create_sandbox(name="stubborn").run(
            "python3 -c 'import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(1000)' >/dev/null 2>&1 </dev/null &"
        )
    service.process.terminate()
    wait_until(lambda: "SIGTERM: ending" in service.text(), "the first signal was heard")
    service.process.terminate()
    assert service.process.wait(5) in (0, 143)
    assert service.process.stdout is not None
    service.process.stdout.close()


def monitor_of(service: Service) -> psutil.Process:
    """The process outside that carries the only running sandbox."""
    [child] = psutil.Process(service.process.pid).children()
    return child


def test_a_sandbox_that_crashes_is_stopped_and_can_be_woken(own_service: Start, name: str) -> None:
    service = own_service()
    with service.client() as client:
        made = client.create_sandbox(name=name)
        made.write("file", "kept")
        handle = made.run("sleep 1000", wait=False)
        monitor_of(service).kill()
        assert handle.result.exit_code == 137
        wait_until(lambda: client.get_sandbox_status(name).status == "stopped", "the crash is noticed")
        assert "ended by itself" in client.get_sandbox_status(name).status_message
        assert made.read("file") == b"kept"
        made.delete()


def test_a_sandbox_that_cannot_start(own_service: Start, name: str) -> None:
    service = own_service()
    with service.client() as client:
        made = client.create_sandbox(name=name)
        made.write("file", "kept")
        made.stop()
        disk = service.state_dir / "boxes" / made.id
        disk.rename(disk.with_suffix(".aside"))
        disk.write_text("no folder")
        with pytest.raises(ResourceCreationError, match="cannot start"):
            made.start()
        assert client.get_sandbox(name).status == "failed"
        with pytest.raises(SandboxNotReadyError, match="cannot start"):
            made.read("file")
        disk.unlink()
        disk.with_suffix(".aside").rename(disk)
        assert made.read("file") == b"kept"
        assert client.get_sandbox(name).status == "ready"
        made.delete()


def test_a_create_that_fails_leaves_nothing(own_service: Start, name: str) -> None:
    service = own_service()
    with service.client() as client:
        (service.state_dir / "bases").write_text("no folder")
        with pytest.raises(ResourceCreationError, match="cannot start"):
            client.create_sandbox(name=name)
        assert client.list_sandboxes() == []
        (service.state_dir / "bases").unlink()
        client.create_sandbox(name=name).delete()


def test_no_secret_is_shown(own_service: Start) -> None:
    service = own_service()
    assert service.key not in " ".join(psutil.Process(service.process.pid).cmdline())
    assert service.key not in " ".join(psutil.Process(service.process.pid).environ().values())
    with service.client() as client, client.sandbox() as made:
        inside = made.run("cat /proc/[0-9]*/environ /proc/[0-9]*/cmdline; ls -la / /root /tmp; mount")
        assert service.key not in inside.stdout
        assert str(service.state_dir) not in inside.stdout


def test_nothing_leaks(own_service: Start, name: str) -> None:
    service = own_service()
    process = psutil.Process(service.process.pid)
    with service.client() as client, client.sandbox(name=name) as made:

        def everything() -> None:
            made.run("echo x; echo y >&2")
            made.run("echo x", pty=True)
            made.run("sleep 0.01 & echo z")
            handle = made.run("cat", wait=False, close_input=False)
            handle.send_input("x")
            handle.kill()
            made.reconnect(handle.command_id).result  # noqa: B018 - the property does the work
            made.write("file", b"x" * 100000)
            made.read("file")
            made.stat("file")
            made.read_range("file", start=5)
            with contextlib.suppress(SandboxClientError):
                made.read("nowhere")
            with contextlib.suppress(SandboxClientError):
                made.run("true", cwd="/nowhere")
            with connect(
                made.dataplane_url.replace("http", "ws", 1) + "/tunnel", additional_headers={"X-Api-Key": service.key}
            ) as ws:
                ws.send(bytes.fromhex("000100010000000100000000" + "000000000000000100000003" + "01" + "0001"))
                ws.recv(timeout=10)
            made.stop()
            made.start()

        def settled() -> tuple[int, int, int]:
            """Descriptors, children, and threads: the pool's may come, so only their limit counts."""
            return process.num_fds(), len(process.children(recursive=True)), max(process.num_threads(), 16)

        everything()
        before = settled()
        for _ in range(3):
            everything()
        wait_until(lambda: settled() == before, f"as before: {before}, not {settled()}")


def test_a_low_limit_of_descriptors_is_raised_as_far_as_it_may(own_service: Start, name: str) -> None:
    service = own_service(wrapper=["prlimit", "--nofile=128:8192"])
    with service.client() as client, client.sandbox(name=name) as made:
        handles = [made.run("read line; echo $line", wait=False, close_input=False) for _ in range(60)]  # three each
        for number, handle in enumerate(handles):
            handle.send_input(f"{number}\n")
        assert [handle.result.stdout for handle in handles] == [f"{number}\n" for number in range(60)]


def test_no_disk_is_left(own_service: Start) -> None:
    service = own_service()
    with service.client() as client:
        for _ in range(3):
            with client.sandbox() as made:
                made.write("file", os.urandom(1000))
    assert list((service.state_dir / "boxes").iterdir()) == []
    service.stop()
    shutil.rmtree(service.state_dir)

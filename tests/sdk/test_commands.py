"""Commands through the SDK: over WebSocket, with input, killed, taken up again; and over plain HTTP."""

from __future__ import annotations

import json
import socket
import struct
import threading
from typing import TYPE_CHECKING, Any

import httpx2
import pytest
from langsmith.sandbox import CommandTimeoutError, SandboxOperationError
from websockets.sync.client import connect

if TYPE_CHECKING:
    from tests.sdk.conftest import Service


def running(sandbox: Any, word: str) -> bool:
    """Whether a process whose command line has the word runs in the sandbox. The one that looks does not have it."""
    return bool(sandbox.run(f"grep -lsa '{word[:-1]}[{word[-1]}]' /proc/[0-9]*/cmdline").stdout)


def test_output_and_exit_code(sandbox: Any) -> None:
    result = sandbox.run("echo out; echo err >&2; exit 7")
    assert (result.stdout, result.stderr, result.exit_code) == ("out\n", "err\n", 7)
    assert not result.success


def test_where_and_with_what_it_runs(sandbox: Any) -> None:
    result = sandbox.run("pwd; echo $HOME $USER; echo $LANG; hostname; id -u; [ -t 0 ] || echo no terminal")
    home, user = "/root", "root"
    assert result.stdout.splitlines()[:2] == [home, f"{home} {user}"]
    assert result.stdout.splitlines()[3:] == [sandbox.name, "0", "no terminal"]
    assert sandbox.run("echo $A; pwd", env={"A": "b c"}, cwd="/srv").stdout == "b c\n/srv\n"
    assert sandbox.run("echo $0", shell="/bin/sh").stdout == "/bin/sh\n"  # noqa: S604 - the shell inside the sandbox


def test_signals_are_128_plus(sandbox: Any) -> None:
    assert sandbox.run("kill -TERM $$").exit_code == 143
    assert sandbox.run("kill -KILL $$").exit_code == 137


def test_commands_that_cannot_start(sandbox: Any) -> None:
    with pytest.raises(SandboxOperationError, match="No such file"):
        sandbox.run("true", cwd="/nowhere")
    with pytest.raises(SandboxOperationError, match="cannot run"):
        sandbox.run("true", shell="/bin/nosuchshell")  # noqa: S604 - the shell inside the sandbox
    with pytest.raises(SandboxOperationError):
        sandbox.run("true", run_config={"user": "nosuchuser"})
    assert sandbox.run("true").exit_code == 0


def test_a_lot_of_output(sandbox: Any) -> None:
    result = sandbox.run("seq 1 400000; seq 1 1000 >&2", timeout=60)
    assert result.stdout == "".join(f"{number}\n" for number in range(1, 400001))
    assert result.stderr.count("\n") == 1000


def test_text_survives_any_cut(sandbox: Any) -> None:
    script = "import os,time\nfor b in 'grüße, 世界 🎉\\n'.encode():\n os.write(1, bytes([b])); time.sleep(0.001)"
    result = sandbox.run(f'python3 -c "{script}"')
    assert result.stdout == "grüße, 世界 🎉\n"
    assert sandbox.run(r"printf 'a\xffb\xe2\x82'").stdout == "a\ufffdb\ufffd"


def test_streamed_input(sandbox: Any) -> None:
    handle = sandbox.run('while read -r line; do echo "<$line>"; done; echo end', wait=False, close_input=False)
    for number in range(3):
        handle.send_input(f"line {number}\n")
    handle.close_input()
    assert "".join(chunk.data for chunk in handle) == "<line 0>\n<line 1>\n<line 2>\nend\n"
    assert handle.result.exit_code == 0
    assert sandbox.run("cat").stdout == ""  # stdin is closed unless asked for


def test_a_lot_of_input(sandbox: Any) -> None:
    handle = sandbox.run("sleep 0.3; sha256sum", wait=False, close_input=False)
    block = "0123456789abcdef" * 65536
    for _ in range(5):  # 5 MiB, while nobody reads yet
        handle.send_input(block)
    handle.close_input()
    assert (
        handle.result.stdout.split()[0]
        == sandbox.run("yes 0123456789abcdef | tr -d '\\n' | head -c 5242880 | sha256sum").stdout.split()[0]
    )


def test_conversation(sandbox: Any) -> None:
    handle = sandbox.run("python3 -iqu 2>&1", wait=False, close_input=False)
    chunks = iter(handle)
    handle.send_input("print(6 * 7)\n")
    seen = ""
    while "42" not in seen:
        seen += next(chunks).data
    handle.send_input("raise SystemExit(5)\n")
    assert handle.result.exit_code == 5


def test_kill(sandbox: Any) -> None:
    handle = sandbox.run("echo started; exec sleep 7654", wait=False)
    assert next(iter(handle)).data == "started\n"
    handle.kill()
    again = sandbox.reconnect(handle.command_id)
    assert again.result.exit_code == 137
    assert not running(sandbox, "7654")


def test_kill_reaches_a_command_that_floods(sandbox: Any) -> None:
    for number in range(3):
        handle = sandbox.run(f"exec yes flood-{number}", wait=False)
        next(iter(handle))
        handle.kill()  # sends the kill and hangs up, with megabytes of output unread
        assert sandbox.reconnect(handle.command_id, stdout_offset=10**12).result.exit_code == 137


def test_timeout(sandbox: Any) -> None:
    with pytest.raises(CommandTimeoutError, match="1 second"):
        sandbox.run("echo before; sleep 7655 & sleep 7655", timeout=1)
    assert not running(sandbox, "7655")


def test_reconnect_from_an_offset(sandbox: Any) -> None:
    handle = sandbox.run("printf 0123456789; printf abc >&2; read -r line; printf $line", wait=False, close_input=False)
    got = ""
    for chunk in handle:
        got += chunk.data
        if len(got) == 13:
            break
    again = sandbox.reconnect(handle.command_id, stdout_offset=4, stderr_offset=3)
    parts = [next(iter(again))]
    assert (parts[0].stream, parts[0].data, parts[0].offset) == ("stdout", "456789", 4)
    again.send_input("more\n")
    result = again.result
    assert (result.stdout, result.stderr, result.exit_code) == ("456789more", "", 0)
    # finished, and still there
    assert sandbox.reconnect(handle.command_id).result.stdout == "0123456789more"
    assert sandbox.reconnect(handle.command_id, stdout_offset=10).result.stdout == "more"


def test_reconnecting_to_nothing(sandbox: Any) -> None:
    with pytest.raises(SandboxOperationError, match="Command not found") as caught:
        sandbox.reconnect("nosuchcommand").result  # noqa: B018 - the property does the work
    assert caught.value.error_type == "CommandNotFound"
    handle = sandbox.run("echo short", wait=False, ttl_seconds=0)
    assert handle.result.stdout == "short\n"
    with pytest.raises(SandboxOperationError, match="expired") as caught:
        sandbox.reconnect(handle.command_id).result  # noqa: B018
    assert caught.value.error_type == "SessionExpired"


def test_a_command_outlives_its_client(sandbox: Any) -> None:
    handle = sandbox.run("read -r line; echo $line > outlived", wait=False, close_input=False)
    handle._control._ws.close()
    again = sandbox.reconnect(handle.command_id)
    thread = threading.Thread(target=lambda: again.result)
    thread.start()
    while again._control._ws is None:
        thread.join(0.01)
    again.send_input("yes\n")
    thread.join(10)
    assert sandbox.read("outlived") == b"yes\n"


def test_kill_on_disconnect(sandbox: Any) -> None:
    handle = sandbox.run("exec sleep 7656", wait=False, kill_on_disconnect=True)
    handle._control._ws.close()
    assert sandbox.run("while grep -lsaq '765[6]' /proc/[0-9]*/cmdline; do sleep 0.02; done", timeout=10).exit_code == 0
    assert sandbox.reconnect(handle.command_id).result.exit_code == 137


def test_a_client_that_goes_while_its_input_waits(service: Service, sandbox: Any) -> None:
    url = sandbox.dataplane_url.replace("http", "ws", 1) + "/execute/ws"
    with connect(url, additional_headers={"X-Api-Key": service.key}, ping_interval=None) as ws:
        ws.send(json.dumps({"type": "execute", "command": "exec sleep 7660", "kill_on_disconnect": True}))
        assert json.loads(ws.recv(timeout=10))["type"] == "started"
        for _ in range(3):  # 3 MiB that nobody reads: the service stops reading, and cannot see the end of the connection
            ws.send(json.dumps({"type": "input", "data": "x" * (1 << 20)}))
        ws.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        ws.socket.close()
    assert sandbox.run("while grep -lsaq '766[0]' /proc/[0-9]*/cmdline; do sleep 0.02; done", timeout=20).exit_code == 0


def test_a_terminal(sandbox: Any) -> None:
    handle = sandbox.run("stty size; tty; [ -t 0 ] && [ -t 1 ] && [ -t 2 ] && echo $TERM; cat", wait=False, pty=True)
    seen = ""
    chunks = iter(handle)
    while "xterm" not in seen:
        seen += next(chunks).data
    assert seen.startswith("24 80\r\n/dev/pts/")
    handle.close_input()  # ignored on a terminal
    handle.send_input("typed\n")
    while seen.count("typed") < 2:  # the echo, and cat
        seen += next(chunks).data
    handle.send_input("\x04")
    assert handle.result.exit_code == 0
    assert sandbox.run("echo through a terminal", pty=True).stdout == "through a terminal\r\n"


def test_a_background_process_does_not_hold_the_command(sandbox: Any) -> None:
    result = sandbox.run(
        "(trap '' HUP; sleep 0.2; echo written > survived; while :; do echo line; sleep 0.1; done) & echo done", timeout=30
    )
    assert result.exit_code == 0
    assert result.stdout.startswith("done\n")
    sandbox.run("while ! [ -e survived ]; do sleep 0.05; done; kill %1; pkill -f survived; true", timeout=10)


def test_a_client_of_plain_http_that_goes(service: Service, sandbox: Any) -> None:
    with service.http() as http, pytest.raises(httpx2.ReadTimeout):
        http.post(f"{sandbox.dataplane_url}/execute", json={"command": "exec sleep 7659"}, timeout=0.3)
    assert sandbox.run("while grep -lsaq '765[9]' /proc/[0-9]*/cmdline; do sleep 0.02; done", timeout=10).exit_code == 0


def test_plain_http(service: Service, sandbox: Any) -> None:
    url = f"{sandbox.dataplane_url}/execute"
    with service.http() as http:
        ran = http.post(url, json={"command": "cat; echo ü; echo e >&2; exit 4", "env": {"A": "1"}, "cwd": "/"}).json()
        assert ran == {"stdout": "ü\n", "stderr": "e\n", "exit_code": 4}
        late = http.post(url, json={"command": "echo x; sleep 7657", "timeout": 1})
        assert (late.status_code, late.json()["detail"]["error"]) == (408, "CommandError")
        assert not running(sandbox, "7657")
        huge = http.post(url, json={"command": "exec yes 7658"})
        assert huge.status_code == 400
        assert "/execute/ws" in huge.json()["detail"]["message"]
        assert not running(sandbox, "7658")
        assert http.post(url, json={"command": ""}).json()["detail"]["error"] == "CommandError"
        assert http.post(url, json={"command": "true", "cwd": "/nowhere"}).json()["detail"]["error"] == "CommandError"
        assert http.post(url, json={"command": 5}).status_code == 422

"""exec over a real guest: a process of its own, a daemon that breaks when it is told to."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gatewayd.guest import wire

from .conftest import DEADLINE, Daemon, Spawn
from .guestworld import GuestWorld

UNREACHABLE = {"error": {"kind": "unavailable", "message": "the link is down", "hint": ""}}


@pytest.fixture
def world(daemon: Daemon) -> Iterator[GuestWorld]:
    started = GuestWorld(daemon, Path(tempfile.mkdtemp(prefix="gw-")))
    yield started
    started.close()


def wait_until(true: Callable[[], Any], what: str) -> Any:
    end = time.monotonic() + DEADLINE
    while not (value := true()):
        assert time.monotonic() < end, f"not within {DEADLINE:.0f} s: {what}"
        time.sleep(0.01)
    return value


def run(spawn: Spawn, *words: str, data: bytes | None = None, options: tuple[str, ...] = ()) -> tuple[int, bytes, bytes]:
    """`sandbox exec OPTIONS demo -- WORDS`."""
    source = {} if data is not None else {"stdin": subprocess.DEVNULL}
    process = spawn("exec", "demo", *options, "--", *words, **source)
    out, err = process.communicate(data, timeout=DEADLINE)
    return process.returncode, out, err


def line(process: subprocess.Popen[bytes]) -> bytes:
    assert process.stdout is not None
    return process.stdout.readline()


def write_for_ever(process: subprocess.Popen[bytes]) -> None:
    """Until nobody reads it."""
    assert process.stdin is not None
    while True:
        process.stdin.write(b"x" * 65536)


def said(process: subprocess.Popen[bytes]) -> bytes:
    """Everything on standard error."""
    assert process.stderr is not None
    return process.stderr.read()


def test_words_streams_and_code(world: GuestWorld, spawn: Spawn) -> None:
    words = ["a b", "'", '"', "$HOME", "*", "\\", "--help", "", "ü😀", "\udcff", "a\nb"]
    code, out, err = run(spawn, "sh", "-c", 'printf "[%s]" "$@"; echo err >&2; exit 3', "sh", *words)
    assert (code, err) == (3, b"err\n")
    assert out == b"".join(b"[%s]" % os.fsencode(word) for word in words)
    assert world.daemon.lines[0]["wake"] is True


def test_any_bytes_both_ways(world: GuestWorld, spawn: Spawn) -> None:
    data = os.urandom(3_000_000)
    assert run(spawn, "cat", data=data) == (0, data, b"")


def test_half_close(world: GuestWorld, spawn: Spawn) -> None:
    assert run(spawn, "sort", data=b"b\na\n") == (0, b"a\nb\n", b"")


def test_environment_and_folder(world: GuestWorld, spawn: Spawn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INHERITED", "from here")
    options = ("--env", "A=b=c", "--env", "INHERITED", "--cwd", "/tmp")
    assert run(spawn, "sh", "-c", "echo $A,$INHERITED,$PWD", options=options) == (0, b"b=c,from here,/tmp\n", b"")
    assert run(spawn, "echo", "$HOME", "a b", options=("--shell", "/bin/sh")) == (0, b"$HOME a b\n", b"")


@pytest.mark.parametrize(("script", "code"), [("exit 255", 255), ("kill -9 $$", 137), ("kill -TERM $$", 143)])
def test_how_it_ended(world: GuestWorld, spawn: Spawn, script: str, code: int) -> None:
    assert run(spawn, "sh", "-c", script) == (code, b"", b"")


@pytest.mark.parametrize(
    ("words", "options", "code", "says"),
    [
        (["no-such-program"], (), 127, b"no-such-program"),
        (["/etc/passwd"], (), 126, b"/etc/passwd"),
        (["true"], ("--cwd", "/no/such/folder"), 127, b"/no/such/folder"),
        (["true"], ("--user", "no-such-user"), 127, b"no-such-user"),
        (["true"], ("--env", "A=" + "x" * 100_000, "--env", "B=" + "y" * 100_000, "--env", "C=" + "z" * 100_000), 2, b"262144"),
    ],
)
def test_what_cannot_be_run(
    world: GuestWorld, spawn: Spawn, words: list[str], options: tuple[str, ...], code: int, says: bytes
) -> None:
    ended, out, err = run(spawn, *words, options=options)
    assert (ended, out) == (code, b"")
    assert err.startswith(b"sandbox: ")
    assert says in err


def test_nobody_reads(world: GuestWorld, spawn: Spawn) -> None:
    process = spawn("exec", "demo", "--", "yes")
    assert process.stdout is not None
    process.stdout.read(100_000)
    process.stdout.close()
    assert process.wait(DEADLINE) == 141
    assert said(process) == b""


def test_input_that_nobody_takes(world: GuestWorld, spawn: Spawn) -> None:
    process = spawn("exec", "demo", "--", "sh", "-c", "exec <&-; echo closed; sleep 1000")
    assert line(process) == b"closed\n"
    with pytest.raises(BrokenPipeError):
        write_for_ever(process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(DEADLINE) == 143


def test_the_end_of_the_output_is_passed_on(world: GuestWorld, spawn: Spawn) -> None:
    process = spawn("exec", "demo", "--", "sh", "-c", "echo last; exec >&-; read x; exit 5")
    assert process.stdout is not None
    assert process.stdout.read() == b"last\n"  # to its end, while the command runs
    assert process.stdin is not None
    process.stdin.write(b"\n")
    process.stdin.flush()
    assert process.wait(DEADLINE) == 5


def test_what_is_left_in_the_background(world: GuestWorld, spawn: Spawn) -> None:
    """Its output is not waited for, however long it lives; nothing written before the end is missing."""
    code, out, err = run(spawn, "sh", "-c", "sleep 1000 & head -c 3000000 /dev/zero; echo $! >&2; exit 7")
    assert (code, len(out)) == (7, 3_000_000)
    os.kill(int(err), signal.SIGKILL)  # still alive


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGQUIT, 131)]
)
def test_signals_go_to_the_command(world: GuestWorld, spawn: Spawn, number: signal.Signals, code: int) -> None:
    script = f"trap 'echo caught; exit 9' {number.name[3:]}; echo ready; while :; do sleep 0.02; done"
    process = spawn("exec", "demo", "--", "sh", "-c", script)
    assert line(process) == b"ready\n"
    process.send_signal(number)
    assert line(process) == b"caught\n"
    assert process.wait(DEADLINE) == 9
    process = spawn("exec", "demo", "--", "sh", "-c", "ulimit -c 0; echo ready; exec sleep 1000")
    assert line(process) == b"ready\n"
    process.send_signal(number)
    assert process.wait(DEADLINE) == code
    assert said(process) == b""


def test_a_second_interrupt_ends_it_here(world: GuestWorld, spawn: Spawn) -> None:
    process = spawn("exec", "demo", "--", "sh", "-c", "trap 'echo no' INT; echo $$; while :; do sleep 0.02; done")
    pid = int(line(process))
    process.send_signal(signal.SIGINT)
    assert line(process) == b"no\n"
    process.send_signal(signal.SIGINT)
    assert process.wait(DEADLINE) == 130
    wait_until(lambda: not Path(f"/proc/{pid}").exists(), "the command was closed")


def test_a_timeout(world: GuestWorld, spawn: Spawn) -> None:
    code, out, err = run(spawn, "sh", "-c", "echo $$; exec sleep 1000", options=("--timeout", "0.5"))
    assert code == 75
    assert b"0.5 s" in err
    wait_until(lambda: not Path(f"/proc/{int(out)}").exists(), "the command was killed")


OPENED = wire.encode_frame(wire.Kind.OPENED, wire.encode_fields([("pid", b"7")]))
EXITED = wire.encode_frame(wire.Kind.EXIT, wire.encode_fields([("code", b"0")]))
OUTPUT = wire.encode_frame(wire.Kind.OUTPUT, b"again\n")


@pytest.mark.parametrize(
    ("frames", "again", "says"),
    [(b"", b"", b"not started within 0.5 s"), (OPENED + EXITED, OUTPUT, b"its output did not within 0.5 s")],
    ids=["never opened", "never done"],
)
def test_a_timeout_of_a_guest_that_goes_on(daemon: Daemon, spawn: Spawn, frames: bytes, again: bytes, says: bytes) -> None:
    daemon.script = lambda request, sock: guest_says(sock, frames, again)
    code, _, err = run(spawn, "true", options=("--timeout", "0.5"))
    assert code == 75
    assert says in err


def guest_says(sock: socket.socket, frames: bytes, again: bytes = b"") -> None:
    """A guest that says `frames`, then `again` ever and ever, until the client has gone."""
    with contextlib.suppress(ConnectionError):
        sock.sendall(b'{"ok":{"status":0,"received":0,"base":0,"credit":0}}\n' + frames)
        sock.settimeout(0.05)
        end = time.monotonic() + DEADLINE
        while time.monotonic() < end:
            with contextlib.suppress(TimeoutError):
                if not sock.recv(65536):
                    return
                continue
            sock.sendall(again)


def test_a_reader_may_take_longer_than_the_timeout(world: GuestWorld, spawn: Spawn) -> None:
    process = spawn("exec", "demo", "--timeout", "4", "--", "head", "-c", "300000", "/dev/zero", stdin=subprocess.DEVNULL)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(5)  # it waits for us
    out, err = process.communicate(timeout=DEADLINE)
    assert (process.returncode, len(out), err) == (0, 300_000, b"")


# --- connections that break ------------------------------------------------------------------------------


def test_no_byte_is_lost_or_doubled(world: GuestWorld, spawn: Spawn) -> None:
    """Cut at twenty places, most of them within a frame."""
    data = os.urandom(4_000_000)
    world.cut_after = [count * 190_000 + 7 * count for count in range(1, 21)]
    code, out, err = run(spawn, "cat", data=data)
    assert (code, err) == (0, b"")
    assert hashlib.sha256(out).digest() == hashlib.sha256(data).digest()
    assert world.cut_after == []
    requests = world.daemon.lines
    assert len(requests) == 21
    assert [request["mode"] for request in requests] == [0] + [1] * 20
    assert [request["wake"] for request in requests] == [True] + [False] * 20
    received = [request["received"] for request in requests]
    assert received == sorted(received)
    assert len({request["session"] for request in requests}) == 1


def test_a_connection_that_breaks_before_its_answer(world: GuestWorld, spawn: Spawn) -> None:
    serve = world.daemon.script
    calls: list[int] = []

    def script(request: dict[str, Any], sock: Any) -> None:
        calls.append(request["mode"])
        if len(calls) > 2 and serve is not None:
            serve(request, sock)

    world.daemon.script = script
    assert run(spawn, "echo", "once") == (0, b"once\n", b"")
    assert calls == [0, 0, 0]


def test_the_user_hears_of_a_long_loss(world: GuestWorld, spawn: Spawn) -> None:
    process = spawn("exec", "demo", "--", "sh", "-c", "echo one; read x; echo two; exit 4")
    assert line(process) == b"one\n"
    world.answers = [UNREACHABLE] * 6  # for about four seconds
    world.cut()
    assert process.stderr is not None
    assert process.stderr.readline() == "sandbox: connection to sandbox 'demo' lost, reconnecting…\n".encode()
    assert process.stdin is not None
    process.stdin.write(b"typed meanwhile\n")
    process.stdin.flush()
    assert process.stderr.readline() == b"sandbox: connected to sandbox 'demo' again\n"
    assert line(process) == b"two\n"
    assert process.wait(DEADLINE) == 4


@pytest.mark.parametrize(
    ("answer", "code", "says"),
    [
        (UNREACHABLE, 69, b"no connection to sandbox 'demo' for 1 s"),
        ({"error": {"kind": "stopped", "message": "sandbox 'demo' is stopped"}}, 69, b"has ended: sandbox 'demo' is stopped\n"),
        ({"error": {"kind": "not_found", "message": "no sandbox named 'demo'", "hint": "h"}}, 68, b"has ended: no sandbox named"),
        ({"error": {"kind": "auth", "message": "the key is refused"}}, 77, b"the key is refused"),
        ({"ok": {"status": 1, "received": 0, "base": 0, "credit": 0}}, 1, b"was restarted"),
        ({"ok": {"status": 3, "received": 0, "base": 0, "credit": 0}}, 1, b"was dropped"),
        ({"ok": {"status": 0, "received": 0, "base": 10**9, "credit": 0}}, 70, b"makes no sense"),
        ({"ok": {"status": 0}}, 70, b"makes no sense"),
        ({"nonsense": 1}, 70, b"makes no sense"),
    ],
)
def test_sessions_that_are_over(world: GuestWorld, spawn: Spawn, answer: dict[str, Any], code: int, says: bytes) -> None:
    process = spawn("exec", "demo", "--linger", "1", "--", "sh", "-c", "echo one; exec sleep 1000")
    assert line(process) == b"one\n"
    world.answers = [answer] * 100
    world.cut()
    assert process.wait(DEADLINE) == code
    assert says in said(process)


def test_a_guest_that_is_gone(world: GuestWorld, spawn: Spawn) -> None:
    """The sandbox was restarted: another guest answers."""
    process = spawn("exec", "demo", "--", "sh", "-c", "echo one; exec sleep 1000")
    assert line(process) == b"one\n"
    world.stop()
    world.cut()
    world.start()
    assert process.wait(DEADLINE) == 1
    assert b"the session is gone: sandbox 'demo' was restarted" in said(process)


def test_an_interrupt_while_nobody_answers(world: GuestWorld, spawn: Spawn) -> None:
    process = spawn("exec", "demo", "--", "sh", "-c", "trap 'echo caught; exit 9' INT; echo one; while :; do sleep 0.02; done")
    assert line(process) == b"one\n"
    world.answers = [UNREACHABLE] * 3
    world.cut()
    process.send_signal(signal.SIGINT)
    assert line(process) == b"caught\n"  # it arrives with the next connection
    assert process.wait(DEADLINE) == 9


def test_an_interrupt_before_the_first_answer(daemon: Daemon, spawn: Spawn) -> None:
    def silent(request: dict[str, Any], sock: Any) -> None:
        sock.sendall(b'{"notice":"starting the sandbox"}\n')
        assert sock.recv(1) == b""

    daemon.script = silent
    process = spawn("exec", "demo", "--", "true")
    assert process.stderr is not None
    assert process.stderr.readline() == b"sandbox: starting the sandbox\n"
    process.send_signal(signal.SIGINT)
    assert process.wait(DEADLINE) == 130


def test_what_is_done_at_once_is_not_talked_about(world: GuestWorld, spawn: Spawn) -> None:
    serve = world.daemon.script

    def script(request: dict[str, Any], sock: Any) -> None:
        sock.sendall(b'{"notice":"setting up"}\n')
        assert serve is not None
        serve(request, sock)

    world.daemon.script = script
    assert run(spawn, "echo", "hi") == (0, b"hi\n", b"")


# --- sessions that stay ----------------------------------------------------------------------------------


def test_detach_ps_attach(world: GuestWorld, spawn: Spawn) -> None:
    go = world.root / "go"
    script = f"echo early; while [ ! -e {go} ]; do sleep 0.02; done; echo late; exit 6"
    out, err = spawn("exec", "demo", "--detach", "--", "sh", "-c", script).communicate(timeout=DEADLINE)
    started = json.loads(out)
    assert (started["sandbox"], err) == ("demo", b"")
    out, _ = spawn("ps", "demo").communicate(timeout=DEADLINE)
    (item,) = json.loads(out)["sessions"]
    assert (item["id"], item["pid"], item["pty"], item["attached"]) == (started["session"], started["pid"], False, False)
    assert item["command"] == f"sh -c {script}"
    assert abs(item["started"] - time.time()) < 3600
    assert (item["code"], item["signal"]) == (None, None)
    out, _ = spawn("ps", "demo", "--format", "pretty").communicate(timeout=DEADLINE)
    assert f"{started['session'][:8]}  {started['pid']}" in out.decode()
    process = spawn("attach", "demo", started["session"][:6])
    assert line(process) == b"early\n"
    other = spawn("attach", "demo")
    assert process.wait(DEADLINE) == 73
    assert b"attached from elsewhere" in said(process)
    go.touch()
    out, err = other.communicate(timeout=DEADLINE)
    assert (other.returncode, out[-5:], err) == (6, b"late\n", b"")
    out, _ = spawn("ps", "demo").communicate(timeout=DEADLINE)
    assert json.loads(out) == {"sessions": []}
    assert all(request["wake"] is False for request in world.daemon.lines[1:])


def test_attach_to_what_has_ended(world: GuestWorld, spawn: Spawn) -> None:
    words = ["sh", "-c", "echo done; exit 8"]
    out, _ = spawn("exec", "demo", "--detach", "--format", "id", "--", *words).communicate(timeout=DEADLINE)
    number = out.decode().strip()

    def ended() -> bool:
        listed, _ = spawn("ps", "demo").communicate(timeout=DEADLINE)
        return bool(json.loads(listed)["sessions"][0]["code"] == 8)

    wait_until(ended, "it has ended")
    process = spawn("attach", "demo", number)
    out, err = process.communicate(timeout=DEADLINE)
    assert (process.returncode, out, err) == (8, b"done\n", b"")


def test_the_end_of_attach_is_not_the_end(world: GuestWorld, spawn: Spawn) -> None:
    out, _ = spawn("exec", "demo", "-d", "--", "sh", "-c", "echo one; exec sleep 1000").communicate(timeout=DEADLINE)
    pid = json.loads(out)["pid"]
    process = spawn("attach", "demo")
    assert line(process) == b"one\n"
    process.send_signal(signal.SIGHUP)
    assert process.wait(DEADLINE) == 129
    process = spawn("attach", "demo", stdin=subprocess.DEVNULL)
    world.connected.acquire(timeout=DEADLINE)
    wait_until(lambda: any(item["attached"] for item in listed(spawn)), "it is attached again")
    os.kill(pid, 0)
    process.send_signal(signal.SIGINT)
    assert process.wait(DEADLINE) == 130


def listed(spawn: Spawn) -> list[dict[str, Any]]:
    out, _ = spawn("ps", "demo").communicate(timeout=DEADLINE)
    found: list[dict[str, Any]] = json.loads(out)["sessions"]
    return found


def test_which_session_is_meant(world: GuestWorld, spawn: Spawn) -> None:
    process = spawn("attach", "demo")
    assert process.wait(DEADLINE) == 68
    assert b"has no sessions" in said(process)
    for _ in range(2):
        assert spawn("exec", "demo", "-d", "--", "sleep", "1000").wait(DEADLINE) == 0
    process = spawn("attach", "demo")
    assert process.wait(DEADLINE) == 2
    assert b"2 sessions" in said(process)
    process = spawn("attach", "demo", "nothing-like-it")
    assert process.wait(DEADLINE) == 68


def test_ps_of_a_stopped_sandbox(world: GuestWorld, spawn: Spawn) -> None:
    world.answers = [{"error": {"kind": "stopped", "message": "sandbox 'demo' is stopped"}}]
    process = spawn("ps", "demo")
    out, err = process.communicate(timeout=DEADLINE)
    assert (process.returncode, json.loads(out), err) == (0, {"sessions": []}, b"sandbox: sandbox 'demo' is stopped\n")
    assert world.daemon.lines[0]["wake"] is False


@pytest.mark.parametrize(
    "pid", [b"x", b"-1", b"1_0", b"9" * 5000, b"4294967297"], ids=["x", "minus", "underscore", "long", "large"]
)
def test_a_process_number_that_is_none(daemon: Daemon, spawn: Spawn, pid: bytes) -> None:
    opened = wire.encode_frame(wire.Kind.OPENED, wire.encode_fields([("pid", pid)]))
    daemon.script = lambda request, sock: guest_says(sock, opened)
    process = spawn("exec", "demo", "--detach", "--", "true")
    out, err = process.communicate(timeout=DEADLINE)
    assert (process.returncode, out) == (70, b"")
    assert err.startswith(b"sandbox: the guest in sandbox 'demo' makes no sense: the number ")

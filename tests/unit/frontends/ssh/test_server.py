"""The server with the real ssh, and with a client that does what ssh would not."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import asyncssh
import pytest

from gatewayd.api import ErrorKind
from gatewayd.errors import GatewayError
from gatewayd.frontends.ssh import engine, server, shell
from gatewayd.sandbox.session import ExitStatus
from tests.unit.frontends.ssh.parts import Front, HostSession

NO_PYTHON = GatewayError("sandbox 'box' has no Python", kind=ErrorKind.UNSUPPORTED)


@contextlib.asynccontextmanager
async def connected(front: Front, username: str = "sandbox") -> AsyncIterator[asyncssh.SSHClientConnection]:
    """An asyncssh client."""
    async with asyncssh.connect(
        "box", sock=front.dial(), username=username, known_hosts=None, client_keys=None, agent_path=None, config=None
    ) as client:
        yield client


async def started(front: Front) -> HostSession:
    """The process of the next session."""
    async with asyncio.timeout(20):
        return await front.guests.started.get()


def written(session: HostSession) -> int:
    """Bytes that its process has written."""
    lines = Path(f"/proc/{session.pid}/io").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("wchar")).split()[1])


async def test_commands(front: Front) -> None:
    assert await front.run("ssh", "box", "cat; echo err >&2; exit 42", data=b"in") == (42, b"in", b"err\n")
    assert (await front.run("ssh", "box", "kill -TERM $$"))[0] == 255


async def test_signals_and_how_a_process_died(front: Front) -> None:
    async with connected(front) as client:
        process = await client.create_process("echo ready; exec sleep 100")
        assert await process.stdout.readline() == "ready\n"
        process.send_signal("USR1")
        done = await process.wait()
        assert done.exit_signal is not None
        assert done.exit_signal[0] == "USR1"
        process = await client.create_process("kill -SEGV $$")
        assert (await process.wait()).exit_signal is not None
        process = await client.create_process("kill -STKFLT $$")
        assert (await process.wait()).exit_signal[0] == "STKFLT@openssh.com"  # type: ignore[index]


async def test_a_signal_that_is_none_is_told(front: Front) -> None:
    async with connected(front) as client:
        process = await client.create_process("echo ready; cat")
        assert await process.stdout.readline() == "ready\n"
        process.channel.send_signal("NOSUCH")
        assert "no signal NOSUCH" in await process.stderr.readline()
        process.stdin.write_eof()
        assert (await process.wait()).exit_status == 0


async def test_a_session_may_be_without_a_network_for_a_day(front: Front) -> None:
    assert (await front.run("ssh", "box", "true"))[0] == 0
    assert (await started(front)).spec.linger == 24 * 60 * 60


async def test_a_lost_sandbox_is_told_and_ends_the_connection(front: Front) -> None:
    running = asyncio.ensure_future(front.run("ssh", "-tt", "box", "sleep 100"))
    session = await started(front)
    session.lost.set_exception(GatewayError("sandbox 'box' was stopped", kind=ErrorKind.STOPPED, hint="start it"))
    code, _, err = await running
    assert code == 255
    assert b"sandbox: sandbox 'box' was stopped\r\nhint: start it\r\n" in err
    async with connected(front) as client:
        process = await client.create_process("sleep 100")
        (await started(front)).lost.set_exception(GatewayError("it is gone", kind=ErrorKind.NOT_FOUND))
        assert (await process.wait()).exit_status == 255
        async with asyncio.timeout(10):
            await client.wait_closed()


async def test_a_session_that_fails_leaves_the_others(front: Front, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "LOST_GRACE", 0)
    async with connected(front) as client:
        first = await client.create_process("cat")
        await started(front)
        second = await client.create_process("sleep 100")
        (await started(front)).lost.set_exception(GatewayError("its guest has ended", kind=ErrorKind.UNAVAILABLE))
        assert (await second.wait()).exit_status == 255
        assert (await client.run("echo third")).stdout == "third\n"
        first.stdin.write("still here\n")
        assert await first.stdout.readline() == "still here\n"


async def test_a_terminal_is_read_to_its_end_however_late_that_comes(front: Front) -> None:
    async with connected(front) as client:
        process = await client.create_process("stty -echo; echo ready; read x; seq 500; exit 3", term_type="xterm")
        session = await started(front)
        assert await process.stdout.readline() == "ready\r\n"
        read, flowing = session.read, asyncio.Event()

        async def stalled(*args: int) -> bytes:
            data = await read(*args)
            await flowing.wait()
            return data

        session.read = stalled  # type: ignore[method-assign]
        process.stdin.write("\n")
        output = asyncio.ensure_future(process.stdout.read())
        assert await session.wait() == ExitStatus(3)
        await asyncio.wait([output], timeout=4 * shell.TEXT_DRAIN)  # nothing that may go by: there is more to come
        flowing.set()
        assert (await output).split() == [str(number) for number in range(1, 501)]
        assert (await process.wait()).exit_status == 3


async def test_a_gateway_that_stops_takes_leave(front: Front) -> None:
    running = asyncio.ensure_future(front.run("ssh", "-R", "0:127.0.0.1:1", "box", "sleep 100"))
    session = await started(front)
    await front.stop()
    code, _, err = await running
    assert code == 255
    assert b"the gateway is stopping" in err
    assert session.closed
    assert [listener.closed for listener in front.guests.listeners] == [True]


async def test_what_cannot_start_is_told(front: Front) -> None:
    front.guests.unusable = GatewayError("cannot start the guest: disk full", kind=ErrorKind.FAILED)
    assert await front.run("ssh", "box", "true") == (255, b"", b"sandbox: cannot start the guest: disk full\n")


@pytest.mark.parametrize("command", ["scp -t /tmp", "/usr/bin/scp -r -f x", "rsync --server -e.Ls . /x", "git-upload-pack '/x'"])
async def test_text_sessions_refuse_what_is_binary(front: Front, command: str) -> None:
    front.guests.unusable = NO_PYTHON
    code, out, err = await front.run("ssh", "box", command)
    assert (code, out) == (255, b"")
    assert b"only text gets through" in err
    assert not front.guests.sessions


async def test_text_sessions_have_no_sftp_but_forwards_to_ports(front: Front) -> None:
    front.guests.unusable = NO_PYTHON
    code, _, err = await front.run("sftp", "-b", "/dev/null", "box")
    assert code == 255
    assert b"no Python" in err

    def hello(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"hello")
        writer.close()

    served = await asyncio.start_server(hello, "127.0.0.1", 0)
    port = served.sockets[0].getsockname()[1]
    assert await front.run("ssh", "-W", f"localhost:{port}", "box") == (0, b"hello", b"")
    code, _, err = await front.run("ssh", "-W", "example.invalid:80", "box")
    assert code == 255
    served.close()


async def test_sockets_are_asked_for_with_the_rights_of_the_user(front: Front) -> None:
    async with connected(front, "ada") as client:
        with pytest.raises(asyncssh.ChannelOpenError):
            await client.open_unix_connection(str(front.root / "none"))
        listener = await client.start_server(lambda host, port: False, "127.0.0.1", 0)
        listener.close()
        await listener.wait_closed()
    assert front.guests.users == ["ada", "ada"]


async def test_the_cancellation_of_a_forward_that_is_none_harms_nobody(front: Front) -> None:
    async with connected(front) as client:
        for request in (b"cancel-tcpip-forward", b"cancel-streamlocal-forward@openssh.com"):
            port = asyncssh.packet.UInt32(1) if b"tcpip" in request else b""
            answer, _ = await client._make_global_request(request, asyncssh.packet.String("x"), port)
            assert answer == asyncssh.constants.MSG_REQUEST_FAILURE
        assert (await client.run("echo alive")).stdout == "alive\n"


async def test_an_environment_has_bounds(front: Front) -> None:
    env = {f"BIG{number}": "x" * 20000 for number in range(10)}
    async with connected(front) as client:
        done = await client.run("env | grep -c ^BIG", env=env)
        assert done.stdout == "3\n"
        assert (await client.run("env | grep -c =a=b", env={"A": "=a=b"})).stdout == "1\n"


async def test_channels_are_counted(front: Front, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "CHANNELS_MAX", 3)
    async with connected(front) as client:
        processes = [await client.create_process("cat") for _ in range(3)]
        with pytest.raises(asyncssh.ChannelOpenError, match="at most 3"):
            await client.create_process("cat")
        for process in processes:
            process.stdin.write_eof()
            assert (await process.wait()).exit_status == 0
        assert (await client.run("echo again")).stdout == "again\n"


async def test_a_user_name_that_is_none_is_refused(front: Front) -> None:
    with pytest.raises(asyncssh.IllegalUserName, match="no user name"):
        async with connected(front, "a b;c"):
            pass


async def test_a_client_that_reads_nothing_stops_the_process(front: Front) -> None:
    async with connected(front) as client:
        process = await client.create_process("exec yes 0123456789", encoding=None)
        session = await started(front)
        before = -1
        async with asyncio.timeout(30):
            while (now := written(session)) != before or not now:  # until nothing moves any more
                before = now
                await asyncio.sleep(0.5)
        assert now < 16 << 20
        assert (await process.stdout.read(11)) == b"0123456789\n"


async def test_nothing_of_asyncssh_listens_here() -> None:
    """What would act on this host is replaced; see engine.py."""
    ours, theirs = engine.Connection, asyncssh.SSHServerConnection
    for name in ("create_agent_listener", "attach_x11_listener", "detach_x11_listener"):
        assert getattr(ours, name) is not getattr(theirs, name)
    assert engine.Gate.tun_requested is asyncssh.SSHServer.tun_requested  # which refuses
    assert engine.Gate.tap_requested is asyncssh.SSHServer.tap_requested

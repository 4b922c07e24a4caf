"""ssh over TCP: who comes in."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, cast

import asyncssh
import pytest

from gatewayd.errors import GatewayError
from gatewayd.frontends.ssh.keys import Keys
from gatewayd.frontends.ssh.target import Target
from gatewayd.frontends.ssh.tcp import TcpListener
from tests.unit.frontends.ssh.parts import Front


class Net:
    """A front end on TCP, and the files that say who may come in."""

    def __init__(self, front: Front) -> None:
        self.front = front
        self.root = front.root / "net"
        self.root.mkdir(mode=0o700)
        self.authorized, self.authorities = self.root / "authorized_keys", self.root / "authorities"
        self.authorized.touch(0o600)
        self.authorities.touch(0o600)
        self.named: list[tuple[str, str]] = []  # sandbox and user, as the clients named them
        self.port = 0

    def identify(self, sandbox: str, user: str) -> Target:
        self.named.append((sandbox, user))
        return Target(self.front.ways, cast(Any, None), sandbox, "")

    def key(self, name: str) -> Path:
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", self.root / name], check=True)
        return self.root / name

    def sign(self, authority: Path, key: Path, *options: str) -> None:
        argv: list[str | Path] = ["ssh-keygen", "-q", "-s", authority, "-I", "test", *options, f"{key}.pub"]
        subprocess.run(argv, check=True, capture_output=True)

    async def login(self, key: Path, user: str = "box", command: str = "echo in") -> tuple[int, bytes, bytes]:
        options = ("-o", "IdentitiesOnly=yes", "-o", "PreferredAuthentications=publickey", "-i", key, "-l", user)
        return await self.front.run("ssh", "-p", str(self.port), *options, "net", command)


@pytest.fixture
async def net(front: Front) -> AsyncIterator[Net]:
    net = Net(front)
    listener = TcpListener("127.0.0.1", 0, Keys(net.authorized, net.authorities), front.options, net.identify)
    net.port = await listener.start()
    yield net
    await listener.aclose()


def public(key: Path) -> str:
    return Path(f"{key}.pub").read_text()


async def test_keys_let_in_and_are_read_again(net: Net) -> None:
    mine, other = net.key("mine"), net.key("other")
    net.authorized.write_text(f"# keys\n{public(mine)}")
    assert await net.login(mine) == (0, b"in\n", b"")
    assert (await net.login(other))[0] == 255
    net.authorized.write_text(public(mine) + public(other))
    assert await net.login(other, "box") == (0, b"in\n", b"")
    net.authorized.write_text("")
    assert (await net.login(mine))[0] == 255
    assert set(net.named) == {("box", "")}


async def test_users_and_sandboxes(net: Net) -> None:
    mine = net.key("mine")
    net.authorized.write_text(public(mine))
    assert (await net.login(mine, "ada%box"))[1] == b"in\n"
    assert net.named == [("box", "ada")]
    for wrong in ("a b", "%", "x%", "../x", "box%"):
        code, _, err = await net.login(mine, wrong)
        assert code == 255
        assert b"names no sandbox" in err


async def test_restrictions_of_a_key_hold(net: Net) -> None:
    mine = net.key("mine")
    net.authorized.write_text(f'command="echo forced",no-port-forwarding {public(mine)}')
    assert (await net.login(mine))[1] == b"forced\n"
    options = ("-o", "IdentitiesOnly=yes", "-o", "LogLevel=INFO", "-i", mine, "-l", "box", "-W", "localhost:1")
    code, _, err = await net.front.run("ssh", "-p", str(net.port), *options, "net")
    assert code == 255
    assert b"administratively prohibited" in err


async def test_a_restricted_key_gets_what_is_given_back(net: Net) -> None:
    mine = net.key("mine")
    options = ("-o", "IdentitiesOnly=yes", "-i", mine, "-l", "box", "-p", str(net.port))
    forward = ("-o", "ExitOnForwardFailure=yes", "-R", "0:127.0.0.1:1")
    for line, terminal, listens in (
        ("restrict", False, False),
        ("restrict,pty", True, False),
        ("restrict,port-forwarding", False, True),
        ('permitlisten="1"', True, False),
        ('permitlisten="localhost:*"', True, True),
    ):
        net.authorized.write_text(f"{line} {public(mine)}")
        code, out, _ = await net.front.run("ssh", "-tt", *options, "net", "tty -s && echo yes")
        assert (code, out) == ((0, b"yes\r\n") if terminal else (255, b"")), line  # ssh leaves when it gets none
        assert ((await net.front.run("ssh", *forward, *options, "net", "true"))[0] == 0) is listens, line


async def test_permitopen_leaves_no_way_around(net: Net) -> None:
    mine = net.key("mine")
    options = ("-o", "IdentitiesOnly=yes", "-o", "LogLevel=INFO", "-i", mine, "-l", "box", "-p", str(net.port))
    net.authorized.write_text(f'permitopen="localhost:1" {public(mine)}')
    for there, expected in (("localhost:1", b"connect failed"), ("localhost:2", b"administratively prohibited")):
        code, _, err = await net.front.run("ssh", *options, "-W", there, "net")
        assert (code, expected in err) == (255, True), err
    client = await asyncssh.connect(
        "127.0.0.1", net.port, username="box", client_keys=[str(mine)], known_hosts=None, agent_path=None, config=None
    )
    async with client:
        with pytest.raises(asyncssh.ChannelOpenError, match="does not permit"):
            await client.open_unix_connection("/run/any.sock")


async def test_options_that_do_not_hold_let_nobody_in(net: Net, caplog: pytest.LogCaptureFixture) -> None:
    mine, other = net.key("mine"), net.key("other")
    for line, because in (
        ('expiry-time="19990101"', "it has expired"),
        ('expiry-time="1999"', "expiry-time= wants"),
        ("sandbox-only", "unknown option sandbox-only"),
        ('from="192.0.2.1"', "not from 127.0.0.1"),
    ):
        caplog.clear()
        caplog.set_level("INFO")
        net.authorized.write_text(f"{line} {public(mine)}{public(other)}")
        assert (await net.login(mine))[0] == 255, line
        assert because in caplog.text
        assert (await net.login(other))[0] == 0, line


async def test_certificates(net: Net) -> None:
    authority, mine = net.key("authority"), net.key("mine")
    net.authorities.write_text(public(authority))
    assert (await net.login(mine))[0] == 255
    net.sign(authority, mine, "-n", "box,ada%box")
    assert (await net.login(mine))[1] == b"in\n"
    assert (await net.login(mine, "ada%box"))[1] == b"in\n"
    assert (await net.login(mine, "other"))[0] == 255
    net.sign(authority, mine)  # for nobody in particular
    assert (await net.login(mine))[0] == 255
    net.sign(authority, mine, "-n", "box", "-V", "20200101:20200102")
    assert (await net.login(mine))[0] == 255
    net.sign(net.key("impostor"), mine, "-n", "box")
    assert (await net.login(mine))[0] == 255


async def test_files_that_others_can_change_let_nobody_in(net: Net) -> None:
    mine = net.key("mine")
    net.authorized.write_text(public(mine))
    assert (await net.login(mine))[0] == 0
    net.authorized.chmod(0o620)
    assert (await net.login(mine))[0] == 255
    with pytest.raises(GatewayError, match="can be changed by others"):
        await Keys(net.authorized, None).current()
    net.authorized.chmod(0o600)
    net.root.chmod(0o777)
    assert (await net.login(mine))[0] == 255
    net.root.chmod(0o700)
    assert (await net.login(mine))[0] == 0


async def test_files_that_make_no_sense_are_told(net: Net) -> None:
    net.authorized.write_text("nonsense\n")
    with pytest.raises(GatewayError, match="cannot use"):
        await Keys(net.authorized, None).current()
    net.authorities.write_text("nonsense\n")
    with pytest.raises(GatewayError, match="cannot use"):
        await Keys(None, net.authorities).current()
    with pytest.raises(GatewayError, match="cannot read"):
        await Keys(net.root / "absent", None).current()


async def test_strangers_have_bounds(net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gatewayd.frontends.ssh.tcp.STRANGERS_MAX", 2)
    waiting = [await asyncio.open_connection("127.0.0.1", net.port) for _ in range(2)]
    for reader, _ in waiting:
        assert (await reader.readline()).startswith(b"SSH-2.0-OpenSSH_")
    reader, writer = await asyncio.open_connection("127.0.0.1", net.port)
    with contextlib.suppress(ConnectionError):
        while await reader.read(1000):
            pass
    for _, other in [*waiting, (reader, writer)]:
        other.close()


async def test_a_certificate_does_not_change_the_command_of_its_authority(net: Net) -> None:
    authority, mine = net.key("authority"), net.key("mine")
    net.authorized.write_text(f'cert-authority,command="echo line" {public(authority)}')
    net.sign(authority, mine, "-n", "box")
    assert (await net.login(mine))[1] == b"line\n"
    net.sign(authority, mine, "-n", "box", "-O", "force-command=echo line")
    assert (await net.login(mine))[1] == b"line\n"
    net.sign(authority, mine, "-n", "box", "-O", "force-command=echo other")
    assert (await net.login(mine))[0] == 255
    net.authorized.write_text(f"cert-authority {public(authority)}")
    assert (await net.login(mine))[1] == b"other\n"

"""ssh over TCP: who comes in."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, cast

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

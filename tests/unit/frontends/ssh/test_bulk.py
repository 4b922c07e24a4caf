"""Data packets that do not go asyncssh's way: with asyncssh's own client, which does."""

from __future__ import annotations

import asyncio
import hashlib
import os
from typing import Any, cast

import asyncssh
import pytest
from asyncssh.crypto import GCMCipher
from asyncssh.encryption import GCMEncryption

from gatewayd.frontends.ssh import bulk
from gatewayd.frontends.ssh.engine import Connection
from tests.unit.frontends.ssh.parts import Front
from tests.unit.frontends.ssh.test_server import connected


@pytest.mark.parametrize("name", ["aes128-gcm", "aes256-gcm"])
def test_it_speaks_as_asyncssh_does(name: str) -> None:
    key, iv = os.urandom(16 if name == "aes128-gcm" else 32), b"fixd" + b"\xff" * 7 + b"\xfe"
    theirs, ours = GCMEncryption(GCMCipher(name, key, iv)), bulk.FastGCM(GCMCipher(name, key, iv))
    for number in range(4):  # over the end of the count
        packet = bytes([number]) * 32
        assert ours.encrypt_packet(number, b"\0\0\0\x20", packet) == theirs.encrypt_packet(number, b"\0\0\0\x20", packet)
    theirs, ours = GCMEncryption(GCMCipher(name, key, iv)), bulk.FastGCM(GCMCipher(name, key, iv))
    sealed, tag = theirs.encrypt_packet(0, b"\0\0\0\x20", b"a" * 32)
    assert ours.decrypt_packet(0, sealed[:16], sealed[16:], 4, tag) == b"a" * 32
    sealed, tag = theirs.encrypt_packet(0, b"\0\0\0\x20", b"a" * 32)
    assert ours.decrypt_packet(0, sealed[:16], sealed[16:], 4, bytes(16)) is None


@pytest.mark.parametrize("cipher", ["aes128-gcm@openssh.com", "aes256-gcm@openssh.com", "aes128-ctr"])
async def test_data_of_all_sizes_comes_back(front: Front, cipher: str) -> None:
    parts = [os.urandom(size) for size in (*range(1, 40), 4096, 32767, 32768, 32769, 300_000)]
    async with asyncssh.connect(
        "box", sock=front.dial(), username="sandbox", known_hosts=None, client_keys=None, config=None, encryption_algs=[cipher]
    ) as client:
        process: Any = await client.create_process("cat; echo told >&2", encoding=None)
        for part in parts:
            process.stdin.write(part)
            assert await process.stdout.readexactly(len(part)) == part
        process.stdin.write_eof()
        assert (await process.communicate())[1] == b"told\n"


async def test_packets_may_be_cut_anywhere(front: Front, monkeypatch: pytest.MonkeyPatch) -> None:
    receive = Connection.data_received

    def cut(connection: Connection, data: bytes, datatype: int | None = None) -> None:
        for at in range(0, len(data), 7):
            receive(connection, data[at : at + 7], datatype)

    monkeypatch.setattr(Connection, "data_received", cut)
    data = os.urandom(100_000)
    async with connected(front) as client:
        done = await client.run("cat", input=data, encoding=None)
        assert done.stdout == data


async def test_keys_change_in_the_middle(front: Front) -> None:
    front.options.rekey_bytes = 1 << 20
    data = os.urandom(8 << 20)
    options = ("-o", "RekeyLimit=2M", "-o", "LogLevel=DEBUG1")
    command = "sha256sum; head -c 8000000 /dev/zero"
    code, out, err = await front.run("ssh", *options, "box", command, data=data)
    assert (code, out) == (0, hashlib.sha256(data).hexdigest().encode() + b"  -\n" + bytes(8_000_000))
    assert err.count(b"SSH2_MSG_NEWKEYS received") > 4


@pytest.mark.parametrize("what", ["tag", "length", "short"])
async def test_what_is_not_genuine_ends_the_connection(front: Front, what: str) -> None:
    async with connected(front) as client:
        await client.run("true")
        inner = cast(Any, client)
        send = inner._send

        def spoil(data: bytes) -> None:
            spoiled = bytearray(data)
            if what == "tag":
                spoiled[-1] ^= 1
            else:
                spoiled[:4] = b"\x7f\xff\xff\xff" if what == "length" else b"\0\0\0\x04"
            inner._send = send
            send(bytes(spoiled))

        inner._send = spoil
        with pytest.raises((asyncssh.DisconnectError, asyncssh.ChannelOpenError, ConnectionError)):
            await client.run("true")
        async with asyncio.timeout(20):
            await client.wait_closed()
    assert len(front.guests.sessions) == 1


async def test_data_for_no_channel_ends_the_connection(front: Front) -> None:
    async with connected(front) as client:
        inner = cast(Any, client)
        inner.send_packet(94, asyncssh.packet.UInt32(99), asyncssh.packet.String(b"x"))
        async with asyncio.timeout(20):
            await client.wait_closed()

"""https and wss with a company's own certificate authority."""

from __future__ import annotations

import asyncio
import datetime
import ipaddress
import ssl
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from websockets.asyncio.server import ServerConnection, serve

from gatewayd.config import Profile, Proxies
from gatewayd.errors import GatewayError
from gatewayd.sandbox.link import Target, open_websocket
from gatewayd.sandbox.rest_client import FixedAccess, RestClient


@dataclass
class Tls:
    """Servers whose certificate only `ca_file` vouches for."""

    ca_file: str
    https: str
    wss: str


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Key and self-signed certificate for 127.0.0.1 in one file."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "company CA")])
    now = datetime.datetime.now(datetime.UTC)
    built = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    path = tmp_path_factory.mktemp("tls") / "server.pem"
    path.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        + built.public_bytes(serialization.Encoding.PEM)
    )
    return path


@pytest.fixture
async def tls(certificate: Path) -> AsyncIterator[Tls]:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate)

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b'HTTP/1.1 200 OK\r\nContent-Length: 17\r\nConnection: close\r\n\r\n{"sandboxes": []}')
        writer.close()
        await writer.wait_closed()

    async def hello(connection: ServerConnection) -> None:
        await connection.send("hello")
        await connection.wait_closed()

    https = await asyncio.start_server(answer, "127.0.0.1", 0, ssl=context)
    async with serve(hello, "127.0.0.1", 0, ssl=context) as wss:
        ports = https.sockets[0].getsockname()[1], next(iter(wss.sockets)).getsockname()[1]
        yield Tls(str(certificate), f"https://127.0.0.1:{ports[0]}", f"wss://127.0.0.1:{ports[1]}/x")
    https.close()
    await https.wait_closed()


async def test_a_ca_of_the_profile_is_trusted(tls: Tls) -> None:
    profile = Profile("work", tls.https, "k", ca_file=tls.ca_file)
    client = RestClient(FixedAccess(profile), Proxies())
    assert await client.list({}) == {"sandboxes": []}
    await client.aclose()
    websocket = await open_websocket(Target(tls.wss, profile, "x", "open it"))
    assert await websocket.recv() == "hello"
    await websocket.close()


async def test_without_it_nobody_is(tls: Tls) -> None:
    profile = Profile("work", tls.https, "k")
    client = RestClient(FixedAccess(profile), Proxies(), retries=0)
    with pytest.raises(GatewayError, match="certificate that cannot be verified") as caught:
        await client.list({})
    assert "ca_file" in caught.value.hint
    await client.aclose()
    with pytest.raises(GatewayError, match="certificate that cannot be verified"):
        await open_websocket(Target(tls.wss, profile, "x", "open it"))


async def test_a_ca_file_that_is_gone(tls: Tls) -> None:
    profile = Profile("work", tls.https, "k", ca_file="/nowhere/ca.pem")
    client = RestClient(FixedAccess(profile), Proxies())
    with pytest.raises(GatewayError, match=r"cannot use ca_file /nowhere/ca\.pem") as caught:
        await client.list({})
    assert caught.value.kind == "config"
    await client.aclose()

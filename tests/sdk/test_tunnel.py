"""Tunnels: the SDK's own yamux client, and what the wire says when a port cannot be reached."""

from __future__ import annotations

import contextlib
import hashlib
import os
import select
import socket
import struct
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect

if TYPE_CHECKING:
    from tests.sdk.conftest import Service


# the SDK calls websockets' connect() in a way that newer websockets deprecate
pytestmark = pytest.mark.filterwarnings(r"ignore:connect\(\) must be used as a context manager:DeprecationWarning")


def free_port() -> int:
    """A local port that nobody has right now."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


Open = Callable[[int], socket.socket]


@pytest.fixture
def dial(sandbox: Any) -> Iterator[Callable[[int], socket.socket]]:
    """Connect to a port of the sandbox through the SDK's tunnel."""
    with contextlib.ExitStack() as stack:

        def connect_to(port: int) -> socket.socket:
            tunnel = stack.enter_context(sandbox.tunnel(port, local_port=free_port()))
            return stack.enter_context(socket.create_connection(("127.0.0.1", tunnel.local_port), timeout=30))

        yield connect_to


def listen(sandbox: Any, command: str, port: int) -> None:
    """Run a server in the sandbox and wait until it listens."""
    sandbox.run(f"{command} >/dev/null 2>&1 </dev/null &")
    hexadecimal = f":{port:04X} 00"
    sandbox.run(f"until grep -q '{hexadecimal}' /proc/net/tcp /proc/net/tcp6; do sleep 0.02; done", timeout=10)


def receive_all(sock: socket.socket) -> bytes:
    data = b""
    while chunk := sock.recv(65536):
        data += chunk
    return data


def test_an_http_server_inside(sandbox: Any, dial: Open) -> None:
    sandbox.write("/srv/www/hello.txt", "hello from inside")
    listen(sandbox, "python3 -m http.server 8000 --bind 127.0.0.1 -d /srv/www", 8000)
    for _ in range(3):
        sock = dial(8000)
        sock.sendall(b"GET /hello.txt HTTP/1.0\r\n\r\n")
        assert receive_all(sock).endswith(b"\r\n\r\nhello from inside")


def test_bytes_survive_both_ways(sandbox: Any, dial: Open) -> None:
    listen(sandbox, "socat -b 65536 TCP-LISTEN:8001,fork EXEC:cat", 8001)
    sock = dial(8001)
    data = os.urandom(1 << 20) * 8
    sent, got = hashlib.sha256(data), hashlib.sha256()
    received = at = 0
    sock.setblocking(False)
    while received < len(data):
        readable, writable, _ = select.select([sock], [sock] if at < len(data) else [], [], 30)
        assert readable or writable
        if writable:
            at += sock.send(data[at : at + 65536])
        if readable:
            chunk = sock.recv(65536)
            assert chunk
            got.update(chunk)
            received += len(chunk)
    assert got.digest() == sent.digest()


def test_a_server_that_speaks_ipv6_only(sandbox: Any, dial: Open) -> None:
    listen(sandbox, "socat TCP6-LISTEN:8002,bind=[::1],ipv6only=1,fork EXEC:'echo six'", 8002)
    assert receive_all(dial(8002)) == b"six\n"


def test_nothing_listens(dial: Open) -> None:
    assert dial(8999).recv(100) == b""


class RawTunnel:
    """Just enough yamux to open streams and look at the answers."""

    def __init__(self, ws: ClientConnection) -> None:
        self.ws = ws
        self.data = b""

    def send(self, kind: int, flags: int, stream: int, length: int, payload: bytes = b"") -> None:
        self.ws.send(struct.pack(">BBHII", 0, kind, flags, stream, length) + payload)

    def open(self, stream: int, header: bytes) -> None:
        self.send(1, 1, stream, 0)
        self.send(0, 0, stream, len(header), header)

    def payload(self, wanted: int) -> bytes:
        """The next data of a stream, b"" at its end; pings are answered."""
        while True:
            while len(self.data) < 12:
                self.data += self._recv()
            _, kind, flags, stream, length = struct.unpack(">BBHII", self.data[:12])
            self.data = self.data[12:]
            if kind == 2 and flags & 1:
                self.send(2, 2, 0, length)
            payload = b""
            if kind == 0:
                while len(self.data) < length:
                    self.data += self._recv()
                payload, self.data = self.data[:length], self.data[length:]
            if stream == wanted and (payload or flags & 4):
                return payload

    def _recv(self) -> bytes:
        message = self.ws.recv(timeout=10)
        assert isinstance(message, bytes)
        return message

    def receive_to_the_end(self) -> None:
        """Read until the service closes the WebSocket."""
        while True:
            self._recv()


def open_tunnel(service: Service, sandbox: Any) -> contextlib.AbstractContextManager[ClientConnection]:
    """A WebSocket on /tunnel, to be used as a context manager."""
    url = sandbox.dataplane_url.replace("http://", "ws://") + "/tunnel"
    return connect(url, additional_headers={"X-Api-Key": service.key}, ping_interval=None)


@pytest.fixture
def raw(service: Service, sandbox: Any) -> Iterator[RawTunnel]:
    """A tunnel without a library."""
    with open_tunnel(service, sandbox) as ws:
        yield RawTunnel(ws)


def test_statuses(sandbox: Any, raw: RawTunnel) -> None:
    listen(sandbox, "socat TCP-LISTEN:8003,fork EXEC:cat", 8003)
    raw.open(1, struct.pack(">BH", 1, 8003))
    assert raw.payload(1) == b"\0"
    raw.open(3, struct.pack(">BH", 1, 0))
    assert raw.payload(3) == b"\1"
    raw.open(5, struct.pack(">BH", 1, 8998))
    assert raw.payload(5) == b"\2"
    raw.open(7, struct.pack(">BH", 2, 8003))
    assert raw.payload(7) == b"\3"
    raw.open(9, struct.pack(">BH", 1, 8003) + b"early")  # data right behind the header
    assert raw.payload(9) == b"\0"
    assert raw.payload(9) == b"early"
    raw.send(1, 1, 11, 0)
    for byte in struct.pack(">BH", 1, 8003) + b"!":  # a header in pieces
        raw.send(0, 0, 11, 1, bytes([byte]))
    assert raw.payload(11) == b"\0"
    assert raw.payload(11) == b"!"
    raw.send(0, 0, 1, 2, b"ok")  # the first stream is none the worse for all this
    assert raw.payload(1) == b"ok"


def test_a_half_closed_connection_still_gets_its_reply(sandbox: Any, raw: RawTunnel) -> None:
    listen(sandbox, "socat TCP-LISTEN:8004,fork EXEC:'sort -r'", 8004)
    raw.open(1, struct.pack(">BH", 1, 8004))
    assert raw.payload(1) == b"\0"
    raw.send(0, 4, 1, 4, b"a\nb\n")
    reply = b""
    while chunk := raw.payload(1):
        reply += chunk
    assert reply == b"b\na\n"


def test_garbage_ends_the_tunnel_and_nothing_else(service: Service, sandbox: Any, raw: RawTunnel) -> None:
    raw.ws.send(b"\xff" * 64)
    with pytest.raises(ConnectionClosed):
        raw.receive_to_the_end()
    assert sandbox.run("echo fine").stdout == "fine\n"


def test_text_messages_are_no_tunnel(raw: RawTunnel, sandbox: Any) -> None:
    raw.ws.send("text")
    raw.open(1, struct.pack(">BH", 1, 8998))
    assert raw.payload(1) == b"\2"
    assert sandbox.run("echo fine").stdout == "fine\n"


@pytest.mark.parametrize("endpoint", ["tunnel", "execute/ws"])
def test_upgrades_are_refused_with_the_envelope(service: Service, sandbox: Any, endpoint: str) -> None:
    good = sandbox.dataplane_url.replace("http://", "ws://")
    missing = good.replace(sandbox.id, "00000000-0000-0000-0000-000000000000")
    cases = [(good, {"X-Api-Key": "wrong"}, 401), (good, {}, 401), (missing, {"X-Api-Key": service.key}, 404)]
    for url, headers, status in cases:
        with pytest.raises(InvalidStatus) as caught, connect(f"{url}/{endpoint}", additional_headers=headers):
            pass
        response = caught.value.response
        assert response.status_code == status
        assert response.headers["Content-Type"] == "application/json"
        assert b'"error_id"' in response.body


def test_a_tunnel_wakes_the_sandbox_and_ends_with_its_run(service: Service, client: Any, name: str) -> None:
    with client.sandbox(name=name) as made:
        made.stop()
        with open_tunnel(service, made) as ws:
            assert client.get_sandbox_status(name).status == "ready"
            tunnel = RawTunnel(ws)
            tunnel.open(1, struct.pack(">BH", 1, 8998))
            assert tunnel.payload(1) == b"\2"
            made.stop()
            with pytest.raises(ConnectionClosed):
                tunnel.receive_to_the_end()
        assert client.get_sandbox_status(name).status == "stopped"

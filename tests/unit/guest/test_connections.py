"""Connections and listeners inside: half-close, resets, backlogs, what is left behind."""

from __future__ import annotations

import contextlib
import hashlib
import os
import pwd
import socket
import struct
from pathlib import Path

import pytest

from tests.unit.guest.guestclient import (
    ACCEPTED,
    CLOSE,
    ERROR,
    INPUT_EOF,
    INPUT_STOP,
    OPENED,
    STOP_OUTPUT,
    Client,
    Guest,
    Refused,
    parse,
    until,
)


@pytest.fixture
def server() -> socket.socket:
    return socket.create_server(("127.0.0.1", 0))


def tcp(guest: Guest, port: int, host: str = "127.0.0.1", **options: int) -> Client:
    return Client(guest).open(("kind", "tcp"), ("host", host), ("port", port), *options.items())


def ends(client: Client) -> None:
    """The guest ends the session by itself once everything is acknowledged."""
    with contextlib.suppress(ConnectionError):
        while True:
            client.ack()
            client.pump()
    with pytest.raises(Refused) as refused:
        client.connect(1)
    assert refused.value.status == 1


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "127.1", "::1"])
def test_both_directions_end_by_themselves(guest: Guest, server: socket.socket, host: str) -> None:
    if host == "::1":
        server.close()
        server = socket.create_server(("::1", 0), family=socket.AF_INET6)
    with server:
        client = tcp(guest, server.getsockname()[1], host)
        opened = client.opened()
        peer, address = server.accept()
    with peer:
        shown = f"[{address[0]}]:{address[1]}" if ":" in address[0] else f"{address[0]}:{address[1]}"
        assert opened["local"].decode() == shown
        client.input(b"question")
        client.send(INPUT_EOF)
        assert peer.recv(100, socket.MSG_WAITALL) == b"question"  # and then its end
        peer.sendall(b"answer")
        peer.shutdown(socket.SHUT_WR)
        client.wait_eof(1)
        assert client.output[1] == b"answer"
    ends(client)


def test_the_peer_may_end_first(guest: Guest, server: socket.socket) -> None:
    with server:
        client = tcp(guest, server.getsockname()[1])
        peer, _ = server.accept()
    with peer:
        peer.shutdown(socket.SHUT_WR)
        client.wait_eof(1)
        client.input(b"late")
        client.send(INPUT_EOF)
        assert peer.recv(100, socket.MSG_WAITALL) == b"late"
    ends(client)


def test_much_data_over_broken_connections(guest: Guest, server: socket.socket) -> None:
    data = os.urandom(3_000_000)
    with server:
        client = tcp(guest, server.getsockname()[1], linger=60)
        client.opened()
        peer, _ = server.accept()
    with peer:
        client.cut()
        peer.setblocking(False)
        assert peer.send(data) > 0
        peer.setblocking(True)
        client.connect(1)
        client.input(b"hello")
        assert peer.recv(100) == b"hello"
    client.wait_eof(1)
    assert data.startswith(client.output[1])
    assert hashlib.sha256(client.output[1]).digest() == hashlib.sha256(data[: len(client.output[1])]).digest()
    client.close()


def test_the_end_needs_no_credit(guest: Guest, server: socket.socket) -> None:
    with server:
        client = Client(guest, window=1000)
        client.auto_grant = False
        client.open(("kind", "tcp"), ("host", "localhost"), ("port", server.getsockname()[1]))
        peer, _ = server.accept()
    with peer:
        peer.sendall(bytes(1000))
        client.wait_until(lambda: len(client.output[1]) == 1000)
        peer.shutdown(socket.SHUT_WR)
        client.wait_eof(1)
        client.input(b"x")
        assert peer.recv(1) == b"x"
    client.close()


def test_nobody_listens(guest: Guest, server: socket.socket) -> None:
    port = server.getsockname()[1]
    server.close()
    error = (client := tcp(guest, port)).wait(ERROR)
    assert (error["kind"], error["errno"]) == (b"refused", b"111")
    ends(client)


def test_there_is_no_such_host(guest: Guest) -> None:
    client = tcp(guest, 80, "no-such-host.invalid")
    assert client.wait(ERROR)["kind"] == b"not-found"
    ends(client)


def test_a_name_is_not_waited_for(guest: Guest) -> None:
    client = tcp(guest, 80, "no-such-host.invalid")
    client.send(CLOSE)
    with pytest.raises(ConnectionError):
        client.drain()


def test_a_reset_is_an_error(guest: Guest, server: socket.socket) -> None:
    with server:
        client = tcp(guest, server.getsockname()[1])
        client.opened()
        peer, _ = server.accept()
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    peer.close()
    assert client.wait(ERROR)["errno"] == b"104"
    ends(client)


def test_nobody_reads_the_output(guest: Guest, server: socket.socket) -> None:
    with server:
        client = tcp(guest, server.getsockname()[1])
        client.opened()
        peer, _ = server.accept()
    with peer:
        client.send(STOP_OUTPUT, b"\x01")
        client.wait_eof(1)
        client.send(INPUT_EOF)
        assert peer.recv(1) == b""
    ends(client)


def test_unix_sockets(guest: Guest, tmp_path: Path) -> None:
    folder = tmp_path / ("long" * 40)
    folder.mkdir()
    path = folder / "socket"
    server = socket.socket(socket.AF_UNIX)
    fd = os.open(folder, os.O_PATH)
    server.bind(f"/proc/self/fd/{fd}/socket")
    os.close(fd)
    server.listen(1)
    with server:
        client = Client(guest).open(("kind", "unix"), ("path", str(path)))
        client.opened()
        peer, _ = server.accept()
    with peer:
        client.input(b"x")
        assert peer.recv(10) == b"x"
        peer.shutdown(socket.SHUT_RD)
        client.input(b"y")
        client.wait(INPUT_STOP)
        peer.sendall(b"z")
    client.wait_eof(1)
    assert client.output[1] == b"z"
    ends(client)


def test_an_abstract_socket(guest: Guest) -> None:
    name = b"\0gatewayd-test-" + os.urandom(6).hex().encode()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(name)
        server.listen(1)
        client = Client(guest).open(("kind", "unix"), ("path", name))
        client.opened()
        client.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to connect for somebody else")
def test_a_unix_socket_is_reached_with_the_rights_of_its_user(guest: Guest) -> None:
    listener = Client(guest).open(("kind", "listen-unix"))
    path = listener.opened()["path"]
    for user, kind in (("nobody", b"permission"), ("nobody-of-that-name", b"not-found")):
        denied = Client(guest).open(("kind", "unix"), ("path", path), ("user", user))
        assert denied.wait(ERROR)["kind"] == kind
        ends(denied)
    allowed = Client(guest).open(("kind", "unix"), ("path", path), ("user", "root"))
    allowed.opened()
    fetch(listener, []).close()
    allowed.close()
    listener.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to connect for somebody else")
@pytest.mark.parametrize("user", ["", "nobody"])
def test_the_peer_of_a_unix_socket_sees_its_user(guest: Guest, user: str) -> None:
    name = b"\0gatewayd-test-" + os.urandom(6).hex().encode()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(name)
        server.listen(1)
        client = Client(guest).open(("kind", "unix"), ("path", name), ("user", user))
        client.opened()
        peer, _ = server.accept()
        with peer:
            uid = struct.unpack("3i", peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[1]
        assert uid == (pwd.getpwnam(user).pw_uid if user else 0)
        client.close()


def test_a_unix_socket_that_is_not_there(guest: Guest, tmp_path: Path) -> None:
    client = Client(guest).open(("kind", "unix"), ("path", str(tmp_path / "none")))
    assert client.wait(ERROR)["kind"] == b"not-found"
    ends(client)


def fetch(listener: Client, seen: list[bytes]) -> Client:
    """The next accepted connection."""
    while True:
        for kind, payload in listener.events:
            if kind == ACCEPTED and (found := parse(payload))["id"] not in seen:
                seen.append(found["id"])
                return Client(listener.guest, bytes.fromhex(found["id"].decode()), listener.window).connect(1)
        listener.pump()


def test_a_listening_port(guest: Guest) -> None:
    listener = Client(guest).open(("kind", "listen-tcp"), ("host", "127.0.0.1"), ("port", 0))
    port = int(listener.opened()["port"])
    seen: list[bytes] = []
    for number in range(5):
        with socket.create_connection(("127.0.0.1", port)) as peer:
            peer.sendall(b"early %d" % number)
            client = fetch(listener, seen)
            client.wait_output(b"early %d" % number)
            client.input(b"answer")
            client.send(INPUT_EOF)
            assert peer.recv(100, socket.MSG_WAITALL) == b"answer"
        client.wait_eof(1)
        assert [kind for kind, _ in client.events] == []  # no OPENED
        ends(client)
    listener.close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port))


def test_a_port_that_is_taken(guest: Guest, server: socket.socket) -> None:
    with server:
        listener = Client(guest).open(("kind", "listen-tcp"), ("host", "localhost"), ("port", server.getsockname()[1]))
        assert listener.wait(ERROR)["errno"] == b"98"
        ends(listener)


def test_what_nobody_fetches_is_closed(tmp_path: Path) -> None:
    guest = Guest(tmp_path, replace=("FETCH_SECONDS = 30.0", "FETCH_SECONDS = 0.2")).start()
    listener = Client(guest).open(("kind", "listen-tcp"), ("host", ""), ("port", 0))
    with socket.create_connection(("127.0.0.1", int(listener.opened()["port"])), timeout=20) as peer:
        assert peer.recv(1) == b""
    listener.close()
    guest.check_clean()
    guest.stop()


def test_a_listener_holds_so_many(tmp_path: Path) -> None:
    guest = Guest(tmp_path, replace=("= 1024, 128, 128", "= 1024, 3, 128")).start()
    listener = Client(guest).open(("kind", "listen-tcp"), ("host", "*"), ("port", 0))
    port = int(listener.opened()["port"])
    peers = [socket.create_connection(("127.0.0.1", port)) for _ in range(6)]
    seen: list[bytes] = []
    clients = [fetch(listener, seen) for _ in range(6)]  # each that is fetched makes place
    for peer, client in zip(peers, clients, strict=True):
        peer.sendall(b"x")
        client.wait_output(b"x")
        peer.close()
        client.close()
    listener.close()
    guest.check_clean()
    guest.stop()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to listen for somebody else")
def test_ports_below_1024_are_for_root_alone(guest: Guest) -> None:
    denied = Client(guest).open(("kind", "listen-tcp"), ("port", 1023), ("user", "nobody"))
    assert denied.wait(ERROR)["kind"] == b"permission"
    ends(denied)
    allowed = Client(guest).open(("kind", "listen-tcp"), ("port", 0), ("user", "nobody"))
    assert int(allowed.opened()["port"]) > 1023
    allowed.close()
    with socket.create_server(("127.0.0.2", 1023)):  # root gets as far as the kernel's own answer
        refused = Client(guest).open(("kind", "listen-tcp"), ("host", "127.0.0.2"), ("port", 1023), ("user", "root"))
        assert refused.wait(ERROR)["errno"] == b"98"
        ends(refused)


def test_a_unix_listener_of_its_own(guest: Guest) -> None:
    listener = Client(guest).open(("kind", "listen-unix"))
    path = Path(listener.opened()["path"].decode())
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
    with socket.socket(socket.AF_UNIX) as peer:
        peer.connect(str(path))
        client = fetch(listener, [])
        peer.sendall(b"hello")
        client.wait_output(b"hello")
        client.close()
    listener.close()
    assert not path.parent.exists()


def test_a_unix_listener_at_a_path(guest: Guest, tmp_path: Path) -> None:
    for path in (tmp_path / "socket", tmp_path / ("d" * 120) / "socket"):
        path.parent.mkdir(exist_ok=True)
        listener = Client(guest).open(("kind", "listen-unix"), ("path", str(path)))
        assert listener.opened()["path"].decode() == str(path)
        second = Client(guest).open(("kind", "listen-unix"), ("path", str(path)))
        assert second.wait(ERROR)["errno"] == b"98"
        second.close()
        assert path.is_socket()
        listener.close()
        assert not path.exists()


def test_a_name_that_was_taken_over_stays(guest: Guest, tmp_path: Path) -> None:
    path = tmp_path / "socket"
    listener = Client(guest).open(("kind", "listen-unix"), ("path", str(path)))
    listener.opened()
    path.unlink()
    path.write_text("mine")
    listener.close()
    assert path.read_text() == "mine"


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to listen for somebody else")
def test_a_unix_listener_of_another_user(guest: Guest) -> None:
    listener = Client(guest).open(("kind", "listen-unix"), ("user", "nobody"))
    path = Path(listener.opened()["path"].decode())
    nobody = pwd.getpwnam("nobody").pw_uid
    assert (path.stat().st_uid, path.parent.stat().st_uid) == (nobody, nobody)
    listener.close()
    assert not path.parent.exists()
    denied = Client(guest).open(("kind", "listen-unix"), ("user", "nobody"), ("path", "/root/socket"))
    assert denied.wait(ERROR)["kind"] == b"permission"
    denied.close()


def test_listeners_are_removed_when_the_guest_ends(tmp_path: Path) -> None:
    guest = Guest(tmp_path).start()
    listener = Client(guest).open(("kind", "listen-unix"))
    path = Path(listener.opened()["path"].decode())
    guest.stop()
    until(lambda: not path.parent.exists())
    listener.cut()
    assert listener.find(OPENED)

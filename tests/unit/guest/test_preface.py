"""What a connection begins with, and what ends it: tokens, counts, garbage, limits."""

from __future__ import annotations

import os
import socket
import struct
from pathlib import Path

import pytest

from tests.unit.guest.guestclient import (
    ACK,
    CLOSE,
    ERROR,
    GRANT,
    INPUT,
    INPUT_EOF,
    OPEN,
    RESIZE,
    SIGNAL,
    STOP_OUTPUT,
    Client,
    Guest,
    Refused,
    fields,
    until,
)


def closed(sock: socket.socket) -> bool:
    """Whether the guest closes the connection without a word."""
    try:
        return sock.recv(1) == b""
    except ConnectionResetError:
        return True


def test_a_wrong_token_gets_no_answer(guest: Guest) -> None:
    for token in (bytes(32), guest.token[:-1] + bytes([guest.token[-1] ^ 1])):
        with pytest.raises(ConnectionError):
            Client(guest).connect(token=token)


@pytest.mark.parametrize("data", [b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" + bytes(61), b"GWG2" + bytes(57), b"X", os.urandom(4000)])
def test_garbage_gets_no_answer(guest: Guest, data: bytes) -> None:
    with guest.dial() as sock:
        sock.sendall(data)
        assert closed(sock)


def test_a_preface_may_come_in_pieces(guest: Guest) -> None:
    with guest.dial() as sock:
        for byte in struct.pack(">4s32s16sBQ", b"GWG1", guest.token, bytes(16), 1, 0):
            sock.sendall(bytes([byte]))
        assert sock.recv(100) == bytes([1]) + bytes(20)
        assert closed(sock)


def test_a_slow_preface_ends_the_connection(tmp_path: Path) -> None:
    guest = Guest(tmp_path, replace=("PREFACE_SECONDS = 10.0", "PREFACE_SECONDS = 0.2")).start()
    with guest.dial() as sock:
        sock.sendall(b"GWG1")
        assert closed(sock)
    guest.check_clean()
    guest.stop()


def test_too_many_strangers_make_place(guest: Guest) -> None:
    first = guest.dial()
    strangers = [guest.dial() for _ in range(128)]
    assert closed(first)
    client = Client(guest).process("true")
    assert client.finish() == {"code": b"0"}
    client.close()
    for sock in [first, *strangers]:
        sock.close()


@pytest.mark.parametrize(("mode", "received", "status"), [(1, 0, 1), (2, 0, 1), (0, 5, 4), (3, 0, 4), (255, 0, 4)])
def test_what_cannot_be_is_refused(guest: Guest, mode: int, received: int, status: int) -> None:
    client = Client(guest)
    client.received = received
    with pytest.raises(Refused) as refused:
        client.connect(mode)
    assert refused.value.status == status


def test_counts_that_cannot_be_are_refused(guest: Guest) -> None:
    client = Client(guest).process("echo", "x", linger=60)
    client.finish()
    count = client.received
    client.ack()
    for wrong, status in ((count + 1, 4), (count - 1, 3), (0, 3)):
        other = Client(guest, client.id)
        other.received = wrong
        until(lambda: refusal(other) == status)  # noqa: B023  # waited for within the loop
    client.close()  # its connection still stands
    with pytest.raises(Refused):
        client.connect(1)


def refusal(client: Client) -> int:
    try:
        client.connect(1)
    except Refused as refused:
        return refused.status
    return 0


def test_a_count_within_a_frame_is_refused(guest: Guest) -> None:
    client = Client(guest)
    client.auto_ack = False
    client.process("echo", "x").finish()
    assert client.received > 10
    other = Client(guest, client.id)
    other.received = 3
    assert refusal(other) == 4
    client.close()


def violate(guest: Guest, kind: int, payload: bytes, *, raw: bytes = b"") -> dict[str, bytes]:
    """Send one wrong frame to a running `cat`; the ERROR."""
    client = Client(guest).process("cat")
    client.opened()
    assert client.sock is not None
    if raw:
        client.sock.sendall(raw)
    else:
        client.send(kind, payload)
    error = client.wait(ERROR)
    with pytest.raises(ConnectionError):
        client.drain()
    client.connect(1)  # the error is still there for who comes back
    client.close()
    return error


@pytest.mark.parametrize(
    ("kind", "payload"),
    [
        (OPEN, fields(("kind", "process"))),
        (INPUT_EOF + 0x30, b""),
        (0x42, b"not yours"),
        (GRANT, b"\x01"),
        (GRANT, b"\x07\0\0\0\x01"),
        (RESIZE, b"\0"),
        (SIGNAL, b"X" * 40),
        (STOP_OUTPUT, b"\x03"),
        (ACK, struct.pack(">Q", 1 << 40)),
        (ACK, b""),
    ],
)
def test_a_wrong_frame_ends_the_session(guest: Guest, kind: int, payload: bytes) -> None:
    assert violate(guest, kind, payload)["kind"] == b"usage"


def test_a_giant_frame_ends_the_session(guest: Guest) -> None:
    error = violate(guest, 0, b"", raw=struct.pack(">BI", INPUT, 262145) + bytes(100))
    assert error["kind"] == b"usage"
    assert b"262145" in error["message"]


def test_more_input_than_granted_ends_the_session(guest: Guest) -> None:
    client = Client(guest, window=262144).process("sleep", "100")
    client.opened()
    client.input(bytes(2 * 262144))  # the pipe takes half of it
    assert client.credit == 0
    client.send(INPUT, bytes(1))
    assert client.wait(ERROR)["kind"] == b"usage"
    client.cut()
    client.connect(1).close()


def test_input_after_its_end_ends_the_session(guest: Guest) -> None:
    client = Client(guest).process("cat")
    client.send(INPUT_EOF)
    client.send(INPUT_EOF)  # this one is harmless
    client.send(INPUT, b"x")
    assert client.wait(ERROR)["kind"] == b"usage"
    client.cut()
    client.connect(1).close()


@pytest.mark.parametrize(
    "payload",
    [
        b"\x04kind",
        b"\x04kind\0\0\0\x09process",
        b"\xff",
        b"\0\0\0\0\0",
        fields(("kind", "no such")),
        fields(),
        fields(("kind", "process"), ("window", 0)),
        fields(("kind", "process"), ("window", 16777217)),
        fields(("kind", "process"), ("linger", "-1")),
        fields(("kind", "process"), ("linger", 604801)),
        fields(("kind", "process"), ("overflow", "explode")),
        fields(("kind", "process"), ("env", "no equals sign")),
        fields(("kind", "process"), ("arg", b"a\0b")),
        fields(("kind", "process"), ("pty", 1), ("rows", 65536)),
        fields(("kind", "tcp"), ("host", "localhost"), ("port", 0)),
        fields(("kind", "tcp"), ("host", "localhost"), ("port", "９")),
    ],
)
def test_an_open_without_sense_is_refused(guest: Guest, payload: bytes) -> None:
    client = Client(guest)
    client.send(OPEN, payload)
    client.connect()
    assert client.wait(ERROR)["kind"] == b"usage"
    client.close()


def test_the_first_frame_is_open(guest: Guest) -> None:
    client = Client(guest).connect()
    client.send(INPUT, b"x")
    assert client.wait(ERROR)["kind"] == b"usage"
    client.cut()
    client.connect(1).close()


def test_unknown_fields_and_unnumbered_frames_are_ignored(guest: Guest) -> None:
    client = Client(guest).process("cat", colour="red")
    client.send(0xF0, b"what is this")
    client.send(INPUT_EOF)
    assert client.finish() == {"code": b"0"}
    client.close()


def test_a_session_opened_twice_is_one(guest: Guest, tmp_path: Path) -> None:
    """The connection broke before the answer: the client opens again."""
    marks = tmp_path / "marks"
    client = Client(guest)
    client.send(OPEN, fields(("kind", "process"), ("command", f"echo started >> {marks}; cat")))
    client.connect(0)
    client.cut()
    client.connect(0)
    client.send(INPUT_EOF)
    assert client.finish() == {"code": b"0"}
    client.close()
    assert marks.read_text() == "started\n"


def test_no_more_sessions_than_the_limit(tmp_path: Path) -> None:
    """At the limit, what is over makes place; what is not, stays."""
    guest = Guest(tmp_path, replace=("= 1024, 128, 128", "= 4, 128, 128")).start()
    clients = [Client(guest).process("cat") for _ in range(3)]
    over = Client(guest).open(("kind", "process"), ("user", "no such user"))
    over.wait(ERROR)
    with pytest.raises(Refused) as refused:
        Client(guest).connect()
    assert refused.value.status == 2
    over.cut()
    clients.append(Client(guest))
    until(lambda: refusal_of_open(clients[-1]) == 0)
    clients[-1].process("cat")
    for client in clients:
        client.close()
    guest.check_clean()
    guest.stop()


def refusal_of_open(client: Client) -> int:
    try:
        client.connect(0)
    except Refused as refused:
        return refused.status
    return 0


def test_two_hundred_sessions(guest: Guest) -> None:
    clients = [Client(guest).process("cat", name=f"n{number}") for number in range(200)]
    for number, client in enumerate(clients):
        client.input(b"%d" % number)
    listing = Client(guest).open(("kind", "list"))
    listing.wait(0x46)
    items = list(listing.items())
    assert len(items) == 200
    assert {item["name"] for item in items} == {b"n%d" % number for number in range(200)}
    assert all(item["attached"] == b"1" and item["command"] == b"cat" and item["kind"] == b"process" for item in items)
    listing.close()
    for number, client in enumerate(clients):
        client.send(INPUT_EOF)
        assert client.finish() == {"code": b"0"}
        assert client.output[1] == b"%d" % number
        client.close()


def test_close_says_that_it_came(guest: Guest) -> None:
    client = Client(guest).process("sleep", "100")
    client.opened()
    client.send(CLOSE)
    with pytest.raises(ConnectionError):
        client.drain()
    assert client.unacked == []


def test_the_window_is_also_that_of_input(guest: Guest) -> None:
    client = Client(guest, window=3 << 20).process("sleep", "100")
    client.opened()
    client.wait_until(lambda: client.credit == 3 << 20)
    client.input(bytes(3 << 20))  # without waiting for the process
    client.wait_until(lambda: not client.unacked)
    client.cut()
    client.connect(2)
    assert 0 <= client.credit <= 262144  # what the pipe has taken
    client.close()

"""Sessions outlive their connections: nothing is lost, doubled or reordered, wherever a connection breaks."""

from __future__ import annotations

import contextlib
import hashlib
import random
import socket
import struct
import threading
from collections.abc import Iterator

import pytest

from tests.unit.guest.guestclient import (
    CREDIT,
    DETACHED,
    EXIT,
    INPUT,
    INPUT_EOF,
    Client,
    Guest,
    Refused,
    until,
)


class Cutter:
    """A relay in front of a guest; every connection through it breaks after the next number of bytes, counted both ways."""

    def __init__(self, guest: Guest, cuts: Iterator[int]) -> None:
        self.guest = guest
        self.cuts = cuts
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.connections = 0
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    def run(self) -> None:
        while True:
            try:
                near, _ = self.listener.accept()
            except OSError:
                return
            self.connections += 1
            with near, self.guest_socket() as far:
                left = [next(self.cuts)]
                both = [threading.Thread(target=self.copy, args=(*pair, left)) for pair in ((near, far), (far, near))]
                for each in both:
                    each.start()
                for each in both:
                    each.join()

    def guest_socket(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.guest.port), timeout=30)

    def copy(self, source: socket.socket, target: socket.socket, left: list[int]) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                part = data[: left[0]]
                left[0] -= len(data)
                target.sendall(part)
                if left[0] <= 0:
                    break
        for each in (source, target):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        self.thread.join()


class Persistent(Client):
    """Comes back whenever its connection breaks."""

    def __init__(self, guest: Guest, port: int) -> None:
        super().__init__(guest)
        self.port = port
        self.known = False  # whether the guest has ever answered

    def dial(self) -> None:
        while self.sock is None:
            try:
                self.connect(1 if self.known else 0)
            except (ConnectionError, OSError):
                continue
            self.known = True

    def pump(self) -> None:
        try:
            super().pump()
        except (ConnectionError, OSError):
            self.dial()

    def send(self, kind: int, payload: bytes = b"") -> None:
        super().send(kind, payload)
        if self.sock is None:
            self.dial()


@pytest.mark.parametrize("seed", range(6))
def test_connections_may_break_anywhere(guest: Guest, seed: int) -> None:
    """The bytes of `tee` come back whole, as output and as errors, over connections that break at random bytes."""
    rng = random.Random(seed)  # noqa: S311
    small = seed % 2 == 0

    def cuts() -> Iterator[int]:
        yield from (10, 61, 70, 82, 83, 100)  # within the preface, the answer, OPEN
        while True:
            yield rng.randrange(62, 3000 if small else 400_000) if rng.random() < 0.9 else 1 << 40

    data = rng.randbytes(60_000 if small else 4_000_000)
    cutter = Cutter(guest, cuts())
    through = Guest.__new__(Guest)
    through.__dict__.update(guest.__dict__)
    through.port = cutter.listener.getsockname()[1]
    client = Persistent(through, through.port)
    client.process("tee", "/dev/stderr", linger=60)
    client.input(data)
    client.send(INPUT_EOF)
    assert client.finish() == {"code": b"0"}
    for stream in (1, 2):
        assert hashlib.sha256(client.output[stream]).digest() == hashlib.sha256(data).digest()
    assert cutter.connections > 6
    client.cut()
    cutter.close()
    last = Client(guest, client.id)
    last.sent, last.received = client.sent, client.received
    last.connect(1).close()


def test_it_works_on_while_nobody_is_there(guest: Guest) -> None:
    client = Client(guest).process("sh", "-c", "echo before; read x; echo $x; exit 9", linger=60)
    client.wait_output(b"before\n")
    client.input(b"go\n")
    client.cut()
    client.connect(1)
    assert client.finish() == {"code": b"9"}
    assert client.output[1] == b"before\ngo\n"
    client.close()


def test_how_it_went_is_told_again(guest: Guest) -> None:
    """A client that lost its connection before the end hears of it after the process has ended."""
    client = Client(guest).process("sh", "-c", "read x; exit 9", linger=60)
    client.opened()
    client.input(b"x\n")
    client.cut()
    for _ in range(3):
        other = Client(guest, client.id)
        other.received = client.received
        other.sent = client.sent
        other.connect(1)
        assert other.wait(EXIT) == {"code": b"9"}
        other.cut()
    client.close()


def test_frames_are_not_taken_twice(guest: Guest) -> None:
    """Input that was sent on the old connection and again on the new one counts once."""
    client = Client(guest).process("cat", linger=60)
    client.opened()
    for number in range(300):
        client.send(INPUT, b"%d\n" % number)
        client.credit -= len(b"%d\n" % number)
        if number % 10 == 0:
            client.connect(1)
    client.send(INPUT_EOF)
    client.finish()
    assert client.output[1] == b"".join(b"%d\n" % number for number in range(300))
    client.close()


def test_a_new_connection_detaches_the_old(guest: Guest) -> None:
    client = Client(guest).process("cat", linger=60)
    client.opened()
    old, client.sock = client.sock, None
    assert old is not None
    client.connect(1)
    data = b""
    while chunk := old.recv(4096):
        data += chunk
    old.close()
    kinds = []
    while data:
        kind, size = struct.unpack(">BI", data[:5])
        kinds.append(kind)
        data = data[5 + size :]
    assert kinds[-1] == DETACHED
    client.input(b"still here")
    client.wait_output(b"still here")
    client.close()


def test_attach_takes_over(guest: Guest) -> None:
    first = Client(guest).process("cat", linger=60)
    first.input(b"one")
    first.wait_output(b"one")
    first.ack()
    second = Client(guest, first.id).connect(2)
    with pytest.raises(ConnectionError):
        first.drain()
    assert first.events[-1][0] == DETACHED
    second.input(b" two")
    second.wait_output(b" two")
    assert bytes(second.output[1]) in (b" two", b"one two")  # as far as the acknowledgement had come
    second.cut()
    second.connect(1)  # from now on it is a client like any other
    second.send(INPUT_EOF)
    assert second.finish() == {"code": b"0"}
    second.close()


def test_attach_counts_credit_anew(guest: Guest) -> None:
    """Neither what the first client did not grant, nor CREDITs that it has used, trouble the second."""
    first = Client(guest, window=10_000)
    first.auto_grant = first.auto_ack = False
    first.process("sh", "-c", "head -c 30000 /dev/zero; cat", linger=60)
    first.wait_until(lambda: first.allowed[1] == 0)
    first.input(bytes(262144))  # stays in the pipe
    first.wait_until(lambda: first.credit == 262144)
    first.ack()
    first.cut()
    second = Client(guest, first.id).connect(2)
    assert second.credit == 262144
    second.wait_until(lambda: len(second.output[1]) >= 20_000)
    second.input(bytes(500_000))
    second.send(INPUT_EOF)
    assert second.finish() == {"code": b"0"}
    assert len(second.output[1]) + 10_000 - 30_000 - 762_144 in (0, 10_000)
    second.close()


def test_attach_hears_what_was_acknowledged_already(guest: Guest) -> None:
    first = Client(guest).process("sh", "-c", "echo x; exit 3", linger=60)
    first.finish()
    first.ack()
    first.cut()
    second = Client(guest, first.id)
    second.connect(2)
    assert second.finish() == {"code": b"3"}
    second.cut()
    third = Client(guest, first.id).connect(2)
    assert third.finish() == {"code": b"3"}
    third.close()


def test_credit_sent_again_is_zero_for_who_attaches(guest: Guest) -> None:
    first = Client(guest)
    first.auto_ack = False
    first.process("cat", linger=60)
    first.input(bytes(300_000))
    first.wait_until(lambda: len(first.output[1]) == 300_000)
    first.cut()
    second = Client(guest, first.id)
    amounts: list[int] = []
    plain = second.frame

    def frame(kind: int, payload: bytes) -> None:
        if kind == CREDIT:
            amounts.append(int.from_bytes(payload, "big"))
        plain(kind, payload)

    second.frame = frame  # type: ignore[method-assign]
    second.connect(2)
    second.wait_until(lambda: len(second.output[1]) == 300_000)
    assert amounts
    assert set(amounts) == {0}
    second.close()


def test_output_waits_when_nobody_takes_it(guest: Guest) -> None:
    client = Client(guest, window=50_000).process("seq", "100000", linger=60)
    client.opened()
    client.cut()
    client.connect(1)
    assert client.finish() == {"code": b"0"}
    assert client.output[1] == b"".join(b"%d\n" % each for each in range(1, 100_001))
    client.close()


def test_the_oldest_output_is_dropped(guest: Guest) -> None:
    """overflow=drop: the process goes on; who resumes hears that bytes are gone, who attaches gets the newest."""
    client = Client(guest, window=20_000)
    client.process("sh", "-c", "read x; seq 100000; echo end; exit 4", linger=60, overflow="drop")
    client.opened()
    client.ack()
    client.input(b"\n")
    client.cut()
    listing: list[dict[str, bytes]] = []

    def ended() -> bool:
        other = Client(guest).open(("kind", "list"))
        other.wait(EXIT)
        listing[:] = other.items()
        other.close()
        return any(item.get("code") == b"4" for item in listing)

    until(ended)
    with pytest.raises(Refused) as refused:
        client.connect(1)
    assert refused.value.status == 3
    other = Client(guest, client.id).connect(2)
    assert other.finish() == {"code": b"4"}
    assert other.output[1].endswith(b"99999\n100000\nend\n")
    assert 5_000 < len(other.output[1]) <= 20_000
    other.close()


def test_dropping_stops_when_somebody_comes(guest: Guest) -> None:
    client = Client(guest, window=20_000)
    client.process("sh", "-c", "seq 50000; sleep 0.3; seq 50000", linger=60, overflow="drop")
    client.opened()
    assert client.finish() == {"code": b"0"}
    assert client.output[1] == b"".join(b"%d\n" % each for each in range(1, 50_001)) * 2
    client.close()


def test_a_session_ends_when_nobody_comes_back(guest: Guest) -> None:
    client = Client(guest).process("cat", linger=1)
    client.opened()
    client.cut()
    client.connect(1)  # in time
    client.cut()

    def lost() -> bool:
        other = Client(guest).open(("kind", "list"))
        other.wait(EXIT)
        ids = {item["id"] for item in other.items()}
        other.close()
        return client.id.hex().encode() not in ids

    until(lost)
    with pytest.raises(Refused) as refused:
        client.connect(1)
    assert refused.value.status == 1


def test_the_answer_counts_only_what_it_must(guest: Guest) -> None:
    """base is the client's count, received the guest's; credit excludes CREDITs that come again."""
    client = Client(guest)
    client.auto_ack = False
    client.process("cat", linger=60)
    before = client.received
    client.opened()
    client.input(bytes(200_000))
    client.wait_until(lambda: len(client.output[1]) == 200_000)
    client.cut()
    with guest.dial() as sock:
        sock.sendall(struct.pack(">4s32s16sBQ", b"GWG1", guest.token, client.id, 1, before))
        answer = sock.recv(21, socket.MSG_WAITALL)
    status, received, base, credit = struct.unpack(">BQQI", answer)
    assert (status, received, base, credit) == (0, client.sent, before, 262144 - 200_000)
    client.close()


def test_small_outputs_become_few_frames(guest: Guest) -> None:
    """What is written byte by byte while nobody is there does not cost a frame a byte."""
    script = "read x; i=0; while [ $i -lt 2000 ]; do printf x; i=$((i+1)); done; echo"
    client = Client(guest).process("sh", "-c", script, linger=60)
    client.opened()
    client.input(b"\n")
    client.cut()
    client.connect(1)
    client.finish()
    assert client.output[1] == b"x" * 2000 + b"\n"
    client.close()

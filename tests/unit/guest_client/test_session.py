from __future__ import annotations

import struct

import pytest

from gatewayd.guest import wire
from gatewayd.guest.events import (
    Accepted,
    Credit,
    Detached,
    Event,
    Exit,
    Failed,
    InputStopped,
    Item,
    Opened,
    Output,
    OutputEof,
)
from gatewayd.guest.session import UNACKNOWLEDGED_SPARE, ClientSession, GuestRefused
from gatewayd.guest.wire import Answer, GuestProtocolError, Kind, Mode, encode_fields, encode_frame


def ack(count: int) -> bytes:
    return encode_frame(Kind.ACK, struct.pack(">Q", count))


def fields(kind: int, /, **values: str) -> bytes:
    return encode_frame(kind, encode_fields([(key, value.encode()) for key, value in values.items()]))


OPENED = fields(Kind.OPENED, pid="12")


def running(kind: str = "process", window: int = 1000) -> ClientSession:
    """A session whose OPENED has come, with nothing left to send."""
    session = ClientSession(window=window)
    session.open([("kind", kind.encode())])
    session.connected(Answer(0, 0, 0, wire.INPUT_WINDOW))
    (frame,) = session.data_to_send()
    assert session.receive(OPENED + ack(len(frame)), 0.0) == [Opened({"pid": b"12"})]
    session._ack_at = None
    assert session.unacknowledged == 0
    return session


def frames(session: ClientSession) -> list[tuple[int, bytes]]:
    return wire.FrameDecoder().feed(b"".join(session.data_to_send()))


def test_opening() -> None:
    session = ClientSession(window=4096)
    session.open([("kind", b"process"), ("arg", b"id")])
    assert session.preface(bytes(32)) == wire.encode_preface(bytes(32), session.id, Mode.OPEN, 0)
    assert session.data_to_send() == []
    session.connected(Answer(0, 0, 0, wire.INPUT_WINDOW))
    ((kind, payload),) = frames(session)
    assert kind == Kind.OPEN
    assert wire.decode_fields(payload) == [("kind", b"process"), ("arg", b"id"), ("window", b"4096")]
    assert session.mode == Mode.RESUME
    with pytest.raises(RuntimeError):
        session.open([])


@pytest.mark.parametrize("status", [1, 2, 3, 4])
def test_a_refusal_changes_nothing(status: int) -> None:
    session = ClientSession()
    session.open([("kind", b"process")])
    with pytest.raises(GuestRefused) as caught:
        session.connected(Answer(status, 0, 0, 0))
    assert caught.value.status == status
    assert session.mode == Mode.OPEN
    session.connected(Answer(0, 0, 0, 0))
    assert [kind for kind, _ in frames(session)] == [Kind.OPEN]


def test_input_is_taken_as_far_as_the_credit_goes() -> None:
    session = running()
    assert session.send_input(bytes(wire.INPUT_WINDOW + 5)) == wire.INPUT_WINDOW
    assert session.send_input(b"x") == 0
    assert session.receive(encode_frame(Kind.CREDIT, struct.pack(">I", 3)), 0.0) == [Credit(3)]
    assert session.send_input(memoryview(b"hello")) == 3
    session.input_eof()
    session.input_eof()
    assert [(kind, len(payload)) for kind, payload in frames(session) if kind != Kind.ACK] == [
        (Kind.INPUT, wire.INPUT_WINDOW),
        (Kind.INPUT, 3),
        (Kind.INPUT_EOF, 0),
    ]
    with pytest.raises(RuntimeError):
        session.send_input(b"x")


def test_the_window_is_also_that_of_input() -> None:
    session = running(window=1 << 20)
    more = (1 << 20) - wire.INPUT_WINDOW
    session.receive(encode_frame(Kind.CREDIT, struct.pack(">I", more)), 0.0)
    assert session.send_input(bytes(2 << 20)) == 1 << 20
    assert [len(payload) for kind, payload in frames(session) if kind == Kind.INPUT] == [wire.PAYLOAD_MAX] * 4
    session.receive(encode_frame(Kind.CREDIT, struct.pack(">I", 1 << 20)), 0.0)
    with pytest.raises(GuestProtocolError, match="the window is 1048576"):
        session.receive(encode_frame(Kind.CREDIT, b"\0\0\0\1"), 0.0)


def test_input_that_waits_becomes_few_frames() -> None:
    session = running()
    session.disconnected()
    for _ in range(10_000):
        assert session.send_input(b"k") == 1
    session.resize(80, 24)
    session.send_input(b"after")
    session.connected(Answer(0, session._first, session.received, 0))
    sent = frames(session)
    assert b"".join(payload for kind, payload in sent if kind == Kind.INPUT) == b"k" * 10_000 + b"after"
    assert [kind for kind, _ in sent] == [Kind.INPUT] * 3 + [Kind.RESIZE, Kind.INPUT]
    assert session.unacknowledged == sum(wire.HEADER_SIZE + len(payload) for _, payload in sent)
    assert session.input_credit == wire.INPUT_WINDOW - 10_005


def test_input_that_nobody_reads_is_dropped() -> None:
    session = running()
    session.send_input(bytes(wire.INPUT_WINDOW))
    frames(session)
    stop = encode_frame(Kind.INPUT_STOP)
    assert session.receive(stop + stop, 0.0) == [InputStopped()]
    assert session.send_input(b"more") == 4
    assert frames(session) == []


def test_grants_are_sent_when_they_are_worth_a_frame() -> None:
    session = running(window=1000)
    session.grant(1, 249)
    assert frames(session) == []
    session.grant(1, 1)
    assert [frame for frame in frames(session) if frame[0] != Kind.ACK] == [(Kind.GRANT, b"\x01\0\0\0\xfa")]


def test_output() -> None:
    session = running(window=10)
    data = encode_frame(Kind.OUTPUT, b"abc") + encode_frame(Kind.ERROUT, b"de") + encode_frame(Kind.OUTPUT, b"")
    assert session.receive(data, 0.0) == [Output(1, b"abc"), Output(2, b"de")]
    assert session.receive(encode_frame(Kind.OUTPUT_EOF, b"\2"), 0.0) == [OutputEof(2)]
    with pytest.raises(GuestProtocolError, match="8 bytes on stream 1 that has 7 left"):
        session.receive(encode_frame(Kind.OUTPUT, b"12345678"), 0.0)


def test_output_that_nobody_wants_is_dropped() -> None:
    session = running()
    session.stop_output(1)
    session.stop_output(1)
    assert [frame for frame in frames(session) if frame[0] != Kind.ACK] == [(Kind.STOP_OUTPUT, b"\1")]
    end = encode_frame(Kind.OUTPUT_EOF, b"\1")
    assert session.receive(encode_frame(Kind.OUTPUT, b"late") + end, 0.0) == [OutputEof(1)]
    session.grant(1, 900)
    assert frames(session) == []


@pytest.mark.parametrize(
    ("frame", "event"),
    [
        (fields(Kind.EXIT, code="255"), Exit(255, "", False)),
        (fields(Kind.EXIT, signal="KILL"), Exit(None, "KILL", False)),
        (fields(Kind.EXIT, signal="SEGV", core="1", new="x"), Exit(None, "SEGV", True)),
        (encode_frame(Kind.EXIT), Exit(0, "", False)),
        (fields(Kind.ERROR, kind="refused", errno="111", message="no\x1b[2J way"), Failed("refused", 111, "no [2J way")),
        (encode_frame(Kind.ERROR), Failed("", None, "the guest does not say why")),
        (fields(Kind.ITEM, id="00"), Item({"id": b"00"})),
        (encode_frame(Kind.DETACHED, b"taken\nover"), Detached("taken over")),
    ],
)
def test_events(frame: bytes, event: Event) -> None:
    session = running()
    assert session.receive(frame, 0.0) == [event]
    assert session.ended == isinstance(event, Failed | Detached)


def test_a_listener() -> None:
    session = running("listen-tcp")
    assert session.receive(fields(Kind.ACCEPTED, id="0f" * 16, peer="1.2.3.4 5"), 0.0) == [Accepted(b"\x0f" * 16, "1.2.3.4 5")]
    other = ClientSession.accepted(b"\x0f" * 16, 500)
    assert other.mode == Mode.RESUME
    other.connected(Answer(0, 0, 0, wire.INPUT_WINDOW))
    assert other.receive(encode_frame(Kind.OUTPUT, b"hello"), 0.0) == [Output(1, b"hello")]


@pytest.mark.parametrize(
    "data",
    [
        fields(Kind.ACCEPTED, id="00" * 16),  # it is no listener
        fields(Kind.EXIT, code="256"),
        fields(Kind.EXIT, code="-1"),
        fields(Kind.EXIT, signal="term"),
        fields(Kind.EXIT, signal="A\nB"),
        fields(Kind.EXIT, signal="X" * 17),
        fields(Kind.EXIT) * 2,
        fields(Kind.ERROR, errno="x"),
        fields(Kind.ERROR) + encode_frame(Kind.OUTPUT, b"x"),
        encode_frame(Kind.OUTPUT_EOF, b"\3"),
        encode_frame(Kind.OUTPUT_EOF),
        encode_frame(Kind.OUTPUT_EOF, b"\1") * 2,
        encode_frame(Kind.OUTPUT_EOF, b"\1") + encode_frame(Kind.OUTPUT, b"x"),
        encode_frame(Kind.CREDIT, b"\0\0\0\1"),  # the window is full
        encode_frame(Kind.CREDIT, b"\0"),
        encode_frame(Kind.INPUT_STOP, b"x"),
        encode_frame(Kind.INPUT, b"x"),  # a client's
        encode_frame(0x7F),
        encode_frame(0xFF),
        encode_frame(Kind.ACK, b"\0"),
        ack(1 << 40),
        ack(0),
        b"\x42\xff\xff\xff\xff",
    ],
)
def test_what_ends_a_session(data: bytes) -> None:
    with pytest.raises(GuestProtocolError):
        running().receive(data, 0.0)


def test_an_acknowledgement_within_a_frame() -> None:
    session = running()
    session.send_input(b"hello")
    first = session._first
    frames(session)
    with pytest.raises(GuestProtocolError, match="within a frame"):
        session.receive(ack(first + 3), 0.0)


def test_output_before_opened() -> None:
    session = ClientSession()
    session.open([("kind", b"process")])
    session.connected(Answer(0, 0, 0, 0))
    with pytest.raises(GuestProtocolError, match="before the session was opened"):
        session.receive(encode_frame(Kind.OUTPUT, b"x"), 0.0)


def test_a_guest_that_acknowledges_nothing() -> None:
    session = running()
    limit = 2 * wire.INPUT_WINDOW + UNACKNOWLEDGED_SPARE
    grant = encode_frame(Kind.CREDIT, struct.pack(">I", 200_000))
    session.send_input(bytes(200_000))
    while session.unacknowledged <= limit:
        session.receive(grant, 0.0)
        session.send_input(bytes(200_000))
        session.data_to_send()
    with pytest.raises(GuestProtocolError, match="acknowledged none of"):
        session.receive(grant, 0.0)
    assert session.unacknowledged < limit + 300_000
    size = session.unacknowledged
    for _ in range(100):
        session.signal("INT")
        session.resize(1, 1)
    assert session.unacknowledged == size


def test_acknowledgements_come_with_what_is_sent_or_soon() -> None:
    session = running()
    session.receive(encode_frame(Kind.OUTPUT, b"abc"), 10.0)
    deadline = session.next_deadline()
    assert deadline is not None
    assert 10.0 < deadline <= 11.0
    session.tick(deadline - 0.01)
    assert session.data_to_send() == []
    session.tick(deadline)
    assert frames(session) == [(Kind.ACK, struct.pack(">Q", session.received))]
    assert session.next_deadline() is None
    session.receive(encode_frame(Kind.OUTPUT, b"abc"), 20.0)
    session.signal("INT")
    assert frames(session) == [(Kind.SIGNAL, b"INT"), (Kind.ACK, struct.pack(">Q", session.received))]
    assert session.next_deadline() is None


def test_much_output_is_acknowledged_at_once() -> None:
    session = running(window=1 << 20)
    session.receive(encode_frame(Kind.OUTPUT, bytes(70_000)), 0.0)
    assert [kind for kind, _ in frames(session)] == [Kind.ACK]


def test_resuming_sends_again_what_did_not_arrive() -> None:
    session = running()
    first = session._first
    for word in (b"one", b"two"):
        session.send_input(word)
        session.data_to_send()
    session.receive(encode_frame(Kind.OUTPUT, b"abc")[:5], 0.0)
    session.disconnected()
    session.send_input(b"three")
    assert session.data_to_send() == []
    assert session.preface(bytes(32)) == wire.encode_preface(bytes(32), session.id, Mode.RESUME, session.received)
    session.send_input(b"four")
    session.connected(Answer(0, first + 8, session.received, 0))
    assert frames(session) == [(Kind.INPUT, b"two"), (Kind.INPUT, b"threefour")]
    assert session.receive(encode_frame(Kind.OUTPUT, b"abc"), 0.0) == [Output(1, b"abc")]


@pytest.mark.parametrize("shift", [(1, 0), (-1, 0), (9, 0), (0, 1), (0, -1)])
def test_answers_that_cannot_be(shift: tuple[int, int]) -> None:
    session = running()
    session.send_input(b"abc")
    session.data_to_send()
    session.disconnected()
    with pytest.raises(GuestProtocolError):
        session.connected(Answer(0, session._first + shift[0], session.received + shift[1], 0))


def test_attaching() -> None:
    session = ClientSession.attach(bytes(16))
    session.resize(80, 24)
    assert session.preface(bytes(32)) == wire.encode_preface(bytes(32), bytes(16), Mode.ATTACH, 0)
    session.connected(Answer(0, 5000, 7000, 10))
    assert session.received == 7000
    assert session.send_input(bytes(20)) == 10
    assert [kind for kind, _ in frames(session)] == [Kind.RESIZE, Kind.INPUT]
    session.disconnected()
    assert session.preface(bytes(32)) == wire.encode_preface(bytes(32), bytes(16), Mode.RESUME, 7000)
    with pytest.raises(GuestProtocolError, match="at once"):
        ClientSession.attach(bytes(16)).connected(Answer(0, 0, 0, wire.WINDOW_MAX + 1))


def test_of_several_sizes_the_last_one_counts() -> None:
    session = running()
    session.resize(80, 24)
    session.resize(100000, -3)
    assert [frame for frame in frames(session) if frame[0] != Kind.ACK] == [(Kind.RESIZE, b"\xff\xff\0\0\0\0\0\0")]
    session.resize(1, 2, 3, 4)
    assert frames(session) == [(Kind.RESIZE, b"\0\1\0\2\0\3\0\4")]
    session.disconnected()
    session.resize(5, 6)
    session.connected(Answer(0, session._first, session.received, 0))
    assert [payload[:4] for _, payload in frames(session)] == [b"\xff\xff\0\0", b"\0\1\0\2", b"\0\5\0\6"]


@pytest.mark.parametrize("name", ["", "int", "SIG INT", "X" * 17, "ÄÖ", "INT\n"])
def test_signals_that_are_none(name: str) -> None:
    with pytest.raises(ValueError):
        running().signal(name)


def test_the_end() -> None:
    session = running()
    session.close()
    session.close()
    session.signal("INT")
    assert session.send_input(b"x") == 1
    assert [frame for frame in frames(session) if frame[0] != Kind.ACK] == [(Kind.CLOSE, b"")]
    assert session.unacknowledged == 5
    session.receive(ack(session._first + 5), 0.0)
    assert session.unacknowledged == 0


def test_the_last_acknowledgement_need_not_wait() -> None:
    session = running()
    session.data_to_send()
    session.receive(fields(Kind.ERROR, message="no"), 0.0)
    session.acknowledge()
    assert frames(session) == [(Kind.ACK, struct.pack(">Q", session.received))]
    session.acknowledge()
    assert frames(session) == []

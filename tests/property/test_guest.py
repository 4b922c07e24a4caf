"""Properties of a guest session: however often the connection breaks, and wherever, both sides get every byte once."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from gatewayd.guest import wire
from gatewayd.guest.events import Event, Exit, Output, OutputEof
from gatewayd.guest.session import ClientSession
from gatewayd.guest.wire import FrameDecoder, GuestProtocolError, Kind, encode_fields, encode_frame
from tests.unit.guest_client.model import ModelGuest, mirrored

frames = st.tuples(st.integers(0, 255), st.binary(max_size=50))


def pieces_of(data: bytes, sizes: list[int]) -> list[bytes]:
    pieces = []
    for size in sizes:
        pieces.append(data[:size])
        data = data[size:]
    return [*pieces, data]


@settings(deadline=None)
@given(st.lists(frames, max_size=12), st.lists(st.integers(0, 40), max_size=60), st.binary(max_size=4))
def test_cuts_do_not_matter_to_the_decoder(sent: list[tuple[int, bytes]], sizes: list[int], trailing: bytes) -> None:
    data = b"".join(encode_frame(kind, payload) for kind, payload in sent) + trailing
    assert FrameDecoder().feed(data) == sent
    for pieces in ([data[i : i + 1] for i in range(len(data))], pieces_of(data, sizes)):
        decoder = FrameDecoder()
        assert [frame for piece in pieces for frame in decoder.feed(piece)] == sent


@given(st.lists(st.tuples(st.text("abcxyz-", min_size=1, max_size=9), st.binary(max_size=30)), max_size=8))
def test_fields_come_back(fields: list[tuple[str, bytes]]) -> None:
    data = encode_fields(fields)
    assert wire.decode_fields(data) == fields
    for cut in range(len(data)):
        try:
            some = wire.decode_fields(data[:cut])
        except GuestProtocolError:
            continue
        assert some == fields[: len(some)]


@given(st.binary(max_size=80))
def test_garbage_in_fields_raises_one_error(data: bytes) -> None:
    try:
        fields = wire.decode_fields(data)
    except GuestProtocolError:
        return
    assert encode_fields(fields) == data


kinds = st.sampled_from([value for name, value in vars(Kind).items() if not name.startswith("_")])
likely = st.builds(
    encode_frame,
    kinds,
    st.one_of(
        st.binary(max_size=12),
        st.sampled_from([b"\x01", b"\x02", bytes(4), bytes(8), b"\0\0\1\0"]),
        st.builds(
            lambda key, value: encode_fields([(key, value)]),
            st.sampled_from(["code", "signal", "core", "errno", "message", "id", "peer"]),
            st.one_of(st.binary(max_size=9), st.sampled_from([b"7", b"-1", b"TERM", b"00" * 16, b"99999"])),
        ),
    ),
)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.one_of(likely, st.binary(max_size=30)), max_size=12), st.booleans())
def test_no_garbage_raises_anything_else(parts: list[bytes], listener: bool) -> None:
    session = ClientSession(window=1000)
    session.open([("kind", b"listen-tcp" if listener else b"process")])
    session.connected(wire.Answer(0, 0, 0, wire.INPUT_WINDOW))
    session.data_to_send()
    output = 0
    try:
        for part in parts:
            for event in session.receive(part, 0.0):
                if isinstance(event, Output):
                    output += len(event.data)
            assert session.input_credit <= wire.INPUT_WINDOW
            assert output <= 2000
    except GuestProtocolError:
        pass


class Wire:
    """Bytes on their way between a session and a model; a cut loses them."""

    def __init__(self, guest: ModelGuest, session: ClientSession) -> None:
        self.guest = guest
        self.session = session
        self.up = b""  # not yet at the guest
        self.down = b""  # not yet at the client
        self.answered = False
        self.events: list[Event] = []
        self.now = 0.0

    def connect(self) -> None:
        self.session.disconnected()
        self.guest.connect()
        self.up, self.down, self.answered = self.session.preface(self.guest.token), b"", False

    def move(self, up: int, down: int) -> None:
        """Let that many bytes arrive."""
        self.now += 0.1
        self.session.tick(self.now)
        self.up += b"".join(self.session.data_to_send())
        self.down += self.guest.receive(self.up[:up])
        self.up = self.up[up:]
        if not self.answered:
            if len(self.down) < wire.ANSWER_SIZE or down < wire.ANSWER_SIZE:
                return
            self.session.connected(wire.decode_answer(self.down[: wire.ANSWER_SIZE]))
            self.answered = True
            self.down, down = self.down[wire.ANSWER_SIZE :], down - wire.ANSWER_SIZE
        events = self.session.receive(self.down[:down], self.now)
        self.down = self.down[down:]
        for event in events:
            if isinstance(event, Output):
                self.session.grant(event.stream, len(event.data))
        self.events += events

    def output(self, stream: int) -> bytes:
        return b"".join(event.data for event in self.events if isinstance(event, Output) and event.stream == stream)


steps = st.one_of(
    st.tuples(st.just("send"), st.integers(0, 3000), st.just(0)),
    st.tuples(st.just("move"), st.integers(0, 400), st.integers(0, 400)),
    st.tuples(st.just("move"), st.integers(0, 20000), st.integers(0, 20000)),
    st.tuples(st.just("cut"), st.just(0), st.just(0)),
    st.tuples(st.just("resize"), st.integers(1, 200), st.integers(1, 100)),
)


@settings(max_examples=250, deadline=None)
@given(st.lists(steps, max_size=60), st.sampled_from([300, 1000, 65536, 300_000]), st.binary(min_size=1, max_size=64))
def test_nothing_is_lost_or_doubled(plan: list[tuple[str, int, int]], window: int, seed: bytes) -> None:
    guest, session = ModelGuest(), ClientSession(window=window)
    session.open([("kind", b"process")])
    link = Wire(guest, session)
    link.connect()
    given_up = bytearray()
    sizes: list[tuple[int, int]] = []
    for what, first, second in plan:
        if what == "send":
            data = (seed * (first // len(seed) + 1))[:first]
            given_up += data[: session.send_input(data)]
        elif what == "resize":
            session.resize(first, second)
            sizes.append((first, second))
        elif what == "cut":
            link.connect()
        else:
            link.move(first, second)
    session.input_eof()
    link.connect()
    for _ in range(3000):
        link.move(100_000, 100_000)
        if OutputEof(2) in link.events and not session.unacknowledged:
            break
    assert b"".join(payload for kind, payload in guest.got if kind == Kind.INPUT) == given_up
    assert link.output(1) == given_up
    assert len(link.output(2)) == len(given_up)
    assert link.events.count(Exit(3, "", False)) == 1
    assert session.unacknowledged == 0
    assert session.input_credit == max(window, wire.INPUT_WINDOW)
    resizes = [payload for kind, payload in guest.got if kind == Kind.RESIZE]
    assert len(resizes) <= len(sizes)
    if sizes:
        assert resizes[-1] == b"".join(value.to_bytes(2, "big") for value in (*sizes[-1], 0, 0))
    chunks = [payload for kind, payload in guest.got if kind == Kind.INPUT]
    assert link.output(2) == b"".join(mirrored(chunk) for chunk in chunks)
    assert [kind for kind, _ in guest.got].count(Kind.OPEN) == 1


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 5000), st.integers(0, 5000), st.lists(st.tuples(st.integers(0, 3000), st.integers(0, 3000)), max_size=6))
def test_attaching_goes_on_where_the_other_client_was(before: int, after: int, moves: list[tuple[int, int]]) -> None:
    guest, first = ModelGuest(), ClientSession(window=2000)
    first.open([("kind", b"process")])
    link = Wire(guest, first)
    link.connect()
    link.move(1000, 1000)  # the answer
    link.move(1000, 1000)  # OPEN
    sent = bytes(i % 251 for i in range(before))
    first.send_input(sent)
    for up, down in moves:
        link.move(up, down)
    reached = b"".join(payload for kind, payload in guest.got if kind == Kind.INPUT)
    second = ClientSession.attach(first.id)
    other = Wire(guest, second)
    other.connect()
    other.move(1000, 1000)
    rest = bytes(i % 241 for i in range(after))
    assert second.send_input(rest) == after
    second.input_eof()
    for _ in range(500):
        other.move(100_000, 100_000)
        if OutputEof(2) in other.events:
            break
    assert OutputEof(2) in other.events
    assert b"".join(payload for kind, payload in guest.got if kind == Kind.INPUT) == reached + rest
    assert second.input_credit == wire.INPUT_WINDOW
    whole = reached + rest
    seen = other.output(1)
    assert whole.endswith(seen)
    assert len(link.output(1)) + len(seen) >= len(whole)

"""Properties of the yamux core: two sessions agree however their bytes are cut; no garbage gets out as an exception."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from gatewayd.errors import GatewayError, MuxClosed, StreamClosed
from gatewayd.yamux.events import (
    DataReceived,
    EofReceived,
    Event,
    PingAnswered,
    SessionEnded,
    StreamOpened,
    StreamWasReset,
)
from gatewayd.yamux.frames import INITIAL_WINDOW, FrameReader, FrameType, Header, encode_header
from gatewayd.yamux.session import Session, SessionConfig
from gatewayd.yamux.stream import Signal, State

PATTERN = bytes(i % 251 for i in range(600_000))


def content(offset: int, size: int) -> bytes:
    """What every stream carries at `offset`: a loss, a repetition or a swap would show."""
    start = offset % 251
    return PATTERN[start : start + size]


# -- frames -----------------------------------------------------------------------------------------------------------

frames = st.one_of(
    st.builds(
        lambda kind, flags, sid, length: encode_header(kind, flags, sid, length),
        st.sampled_from([FrameType.WINDOW_UPDATE, FrameType.PING, FrameType.GO_AWAY]),
        st.integers(0, 0xFFFF),
        st.integers(0, 0xFFFFFFFF),
        st.integers(0, 0xFFFFFFFF),
    ),
    st.builds(
        lambda flags, sid, payload: encode_header(FrameType.DATA, flags, sid, len(payload)) + payload,
        st.integers(0, 0xFFFF),
        st.integers(0, 0xFFFFFFFF),
        st.binary(max_size=40),
    ),
)


def parse(pieces: list[bytes]) -> list[Header | bytes]:
    """Headers, and the payload of each DATA frame in one piece."""
    reader = FrameReader()
    parts: list[Header | bytes] = []
    for piece in pieces:
        for part in reader.feed(piece):
            if isinstance(part, bytes) and parts and isinstance(parts[-1], bytes):
                parts[-1] += part
            else:
                parts.append(part)
    return parts


@settings(deadline=None)
@given(st.lists(frames, max_size=12), st.lists(st.integers(1, 30), max_size=60))
def test_cuts_do_not_matter_to_the_reader(sent: list[bytes], cuts: list[int]) -> None:
    raw = b"".join(sent)
    pieces, rest = [], raw
    for cut in cuts:
        pieces.append(rest[:cut])
        rest = rest[cut:]
    whole = parse([raw])
    assert parse([*pieces, rest]) == whole
    assert parse([raw[i : i + 1] for i in range(len(raw))]) == whole
    again = b"".join(part if isinstance(part, bytes) else encode_header(FrameType(part.type), *part[1:]) for part in whole)
    assert again == raw


# -- garbage ----------------------------------------------------------------------------------------------------------

likely_frames = st.builds(
    lambda kind, flags, sid, length, payload: encode_header(kind, flags, sid, length) + payload,
    st.sampled_from(list(FrameType)),
    st.integers(0, 15),
    st.integers(0, 6),
    st.sampled_from([0, 1, 5, 40, INITIAL_WINDOW, INITIAL_WINDOW + 1, 0xFFFFFFFF]),
    st.binary(max_size=40),
)
local_actions = st.sampled_from(["open", "accept", "send", "eof", "reset", "consume", "ping", "go_away", "tick", "output"])


@given(
    client=st.booleans(),
    steps=st.lists(st.one_of(st.binary(max_size=60), frames, likely_frames, local_actions), max_size=40),
)
@settings(max_examples=300, deadline=None)
def test_no_garbage_raises_and_windows_stay_sane(client: bool, steps: list[bytes | str]) -> None:
    session = Session(client=client, config=SessionConfig(max_streams=4, accept_backlog=2))
    now = 0.0
    for step in steps:
        now += 20.0
        if isinstance(step, bytes):
            ended = session.ended
            events = session.receive_data(step, now)
            assert not (ended and events)
        else:
            act(session, step, now)
        check_windows(session)
        if session.ended:
            assert session.stream_count == 0
            assert session.next_deadline() is None


def act(session: Session, action: str, now: float) -> None:
    """One local call on every stream; only the documented errors may come."""
    ids = [sid for sid in range(1, 9) if session.stream(sid)] or [3]
    try:
        for sid in ids:
            stream = session.stream(sid)
            if action == "open":
                session.open_stream(now)
            elif action == "accept":
                session.accept(sid)
            elif action == "send":
                session.send(sid, b"x" * 100)
            elif action == "eof":
                session.send_eof(sid, now)
            elif action == "reset":
                session.reset(sid)
            elif action == "consume" and stream:
                session.consume(sid, stream.buffered)
            elif action == "ping":
                session.ping(now)
            elif action == "go_away":
                session.go_away()
            elif action == "tick":
                session.tick(now)
            elif action == "output":
                session.data_to_send()
    except MuxClosed:
        assert session.ended or session.peer_gone_away
    except (StreamClosed, GatewayError):
        assert action in {"open", "send", "eof"}


def check_windows(session: Session) -> None:
    for sid in range(12):
        stream = session.stream(sid)
        if stream is not None:
            assert 0 <= stream.send_window <= 0xFFFFFFFF
            assert stream.recv_window >= 0
            assert stream.buffered >= 0
            # Never over-granted: what the peer may send and what is not consumed fit the window together.
            assert stream.recv_window + stream.buffered <= stream.window
            assert stream.state not in (State.CLOSED, State.RESET)


# -- two sessions -----------------------------------------------------------------------------------------------------


@dataclass
class Direction:
    """What one side sent on a stream and what the other got."""

    sent: int = 0
    received: int = 0
    eof_sent: bool = False
    eof_received: bool = False


@dataclass
class Side:
    """One session of the two, its outgoing wire, and what it was told."""

    session: Session
    wire: bytearray = field(default_factory=bytearray)
    pings: set[int] = field(default_factory=set)


class TwoSessions(RuleBasedStateMachine):
    """A client and a server with an honest but arbitrarily cut wire between them."""

    streams = Bundle("streams")

    def __init__(self) -> None:
        super().__init__()
        self.sides = [
            Side(Session(client=True, config=SessionConfig(max_stream_window=INITIAL_WINDOW, max_frame=10_000))),
            Side(Session(client=False, config=SessionConfig(max_stream_window=400_000, send_queue=100_000))),
        ]
        self.now = 0.0
        self.directions: dict[tuple[int, int], Direction] = {}  # (sender, stream id)
        self.was_reset: set[int] = set()

    @rule(target=streams, side=st.integers(0, 1))
    def open(self, side: int) -> int:
        stream = self.sides[side].session.open_stream(self.now)
        self.directions[0, stream.id] = Direction()
        self.directions[1, stream.id] = Direction()
        return stream.id

    @rule(side=st.integers(0, 1), sid=streams, size=st.sampled_from([0, 1, 7, 1000, 70_000, 300_000]))
    def write(self, side: int, sid: int, size: int) -> None:
        direction, session = self.directions[side, sid], self.sides[side].session
        stream = session.stream(sid)
        if stream is None or not stream.allows(Signal.SEND_DATA):
            with pytest.raises(StreamClosed):
                session.send(sid, b"x")
            return
        while size:
            taken = session.send(sid, content(direction.sent, size))
            if not taken:
                assert not stream.send_window or not session.has_room
                return
            direction.sent += taken
            size -= taken

    @rule(side=st.integers(0, 1), sid=streams)
    def eof(self, side: int, sid: int) -> None:
        stream = self.sides[side].session.stream(sid)
        if stream is not None and stream.allows(Signal.SEND_FIN):
            self.sides[side].session.send_eof(sid, self.now)
            self.directions[side, sid].eof_sent = True

    @rule(target=streams, side=st.integers(0, 1), sid=consumes(streams))
    def reset(self, side: int, sid: int) -> object:
        if self.sides[side].session.stream(sid) is not None:
            self.was_reset.add(sid)
            self.sides[side].session.reset(sid)
        return multiple()  # a reset stream is of no further interest

    @rule(side=st.integers(0, 1), sid=streams, share=st.sampled_from([0.1, 0.5, 1.0]))
    def consume(self, side: int, sid: int, share: float) -> None:
        stream = self.sides[side].session.stream(sid)
        if stream is not None and self.arrived(side):
            self.sides[side].session.consume(sid, int(stream.buffered * share))

    @rule(side=st.integers(0, 1))
    def ping(self, side: int) -> None:
        self.sides[side].pings.add(self.sides[side].session.ping(self.now))

    @rule(side=st.integers(0, 1), sizes=st.lists(st.sampled_from([1, 5, 12, 13, 4096, 100_000]), max_size=20))
    def deliver(self, side: int, sizes: list[int]) -> None:
        """Carry some bytes from `side` to the other, cut into pieces of `sizes`."""
        sender, receiver = self.sides[side], self.sides[1 - side]
        sender.wire += sender.session.data_to_send()
        for size in sizes:
            piece = bytes(sender.wire[:size])
            del sender.wire[:size]
            self.handle(1 - side, receiver.session.receive_data(piece, self.now))

    def arrived(self, side: int) -> bool:
        """True when no announced payload is still on the wire: all that counts as buffered is really here."""
        return self.sides[side].session._reader.payload_left == 0

    def handle(self, side: int, events: list[Event]) -> None:
        for event in events:
            if isinstance(event, StreamOpened):
                self.sides[side].session.accept(event.stream_id)
            elif isinstance(event, DataReceived):
                direction = self.directions[1 - side, event.stream_id]
                assert not direction.eof_received
                assert event.data == content(direction.received, len(event.data))
                direction.received += len(event.data)
            elif isinstance(event, EofReceived):
                direction = self.directions[1 - side, event.stream_id]
                assert direction.eof_sent
                assert direction.received == direction.sent
                direction.eof_received = True
            elif isinstance(event, StreamWasReset):
                assert event.stream_id in self.was_reset
            elif isinstance(event, PingAnswered):
                self.sides[side].pings.remove(event.ping_id)
            else:
                assert not isinstance(event, SessionEnded)

    @invariant()
    def windows_hold(self) -> None:
        for side in self.sides:
            check_windows(side.session)

    def teardown(self) -> None:
        """Carry and consume everything: both sides agree on every stream."""
        for _ in range(200):
            for side in (0, 1):
                self.deliver(side, [1 << 20])
            for side in (0, 1):
                for sid in {sid for _, sid in self.directions}:
                    if (stream := self.sides[side].session.stream(sid)) and self.arrived(side):
                        self.sides[side].session.consume(sid, stream.buffered)
            if not any(side.wire or side.session.has_output for side in self.sides):
                break
        else:
            raise AssertionError("the sessions never come to rest")
        for number, one in enumerate(self.sides):
            assert not one.pings
            for sid in {sid for _, sid in self.directions}:
                mine, theirs = one.session.stream(sid), self.sides[1 - number].session.stream(sid)
                assert (mine is None) == (theirs is None)
                direction = self.directions[number, sid]
                if sid in self.was_reset:
                    assert mine is None
                    assert direction.received <= direction.sent
                    continue
                assert direction.received == direction.sent
                assert direction.eof_received == direction.eof_sent
                if mine is not None and theirs is not None and mine.allows(Signal.SEND_DATA):
                    assert mine.send_window == theirs.recv_window, "both count the same window"
                    assert mine.send_window > theirs.window * 7 // 8, "all consumed, so the window is open again"


TwoSessions.TestCase.settings = settings(max_examples=120, stateful_step_count=40, deadline=None)
TestTwoSessions = TwoSessions.TestCase

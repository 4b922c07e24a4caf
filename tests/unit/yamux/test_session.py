"""The session core: streams, windows, limits, strictness, clockwork. No event loop, no clock."""

from __future__ import annotations

import struct

import pytest

from gatewayd.errors import GatewayError, MuxClosed, StreamClosed
from gatewayd.yamux.events import (
    DataReceived,
    EofReceived,
    Event,
    GoAwayReceived,
    PingAnswered,
    SessionEnded,
    StreamAcknowledged,
    StreamOpened,
    StreamWasReset,
    WindowOpened,
)
from gatewayd.yamux.frames import INITIAL_WINDOW, Flag, FrameType, GoAwayCode, encode_header
from gatewayd.yamux.session import Session, SessionConfig
from gatewayd.yamux.stream import TRANSITIONS, Signal, State

SMALL = SessionConfig(max_stream_window=INITIAL_WINDOW)
MIB = 1 << 20


def frame(frame_type: FrameType, flags: int, stream_id: int, length: int, payload: bytes = b"") -> bytes:
    return encode_header(frame_type, flags, stream_id, length) + payload


def data(stream_id: int, payload: bytes, flags: int = 0) -> bytes:
    return frame(FrameType.DATA, flags, stream_id, len(payload), payload)


def update(stream_id: int, delta: int, flags: int = 0) -> bytes:
    return frame(FrameType.WINDOW_UPDATE, flags, stream_id, delta)


def headers(raw: bytes) -> list[tuple[int, int, int, int]]:
    """(type, flags, id, length) of every frame in `raw`."""
    found = []
    while raw:
        _, kind, flags, stream_id, length = struct.unpack_from(">BBHII", raw)
        found.append((kind, flags, stream_id, length))
        raw = raw[12 + (length if kind == FrameType.DATA else 0) :]
    return found


def all_output(session: Session) -> bytes:
    out = b""
    while part := session.data_to_send():
        out += part
    return out


def pump(a: Session, b: Session, now: float = 0.0) -> tuple[list[Event], list[Event]]:
    """Carry everything both ways until both are quiet; what each side was told."""
    to_a: list[Event] = []
    to_b: list[Event] = []
    while a.has_output or b.has_output:
        to_b += b.receive_data(all_output(a), now)
        to_a += a.receive_data(all_output(b), now)
    return to_a, to_b


def connected(config: SessionConfig = SMALL) -> tuple[Session, Session, int]:
    """A client, a server, and the id of a stream that both have agreed on."""
    client, server = Session(client=True, config=config), Session(client=False, config=config)
    stream_id = client.open_stream(0.0).id
    pump(client, server)
    server.accept(stream_id)
    pump(client, server)
    return client, server, stream_id


# -- opening ----------------------------------------------------------------------------------------------------------


def test_open_accept_and_ids() -> None:
    client, server = Session(client=True, config=SMALL), Session(client=False, config=SMALL)
    assert [client.open_stream(0.0).id, client.open_stream(0.0).id] == [1, 3]
    assert [server.open_stream(0.0).id, server.open_stream(0.0).id] == [2, 4]
    to_client, to_server = pump(client, server)
    assert to_server == [StreamOpened(1), StreamOpened(3)]
    assert to_client == [StreamOpened(2), StreamOpened(4)]
    assert client.unacked == 2
    server.accept(1)
    server.accept(1)
    assert headers(server.data_to_send()) == [(FrameType.WINDOW_UPDATE, Flag.ACK, 1, 0)]


def test_large_windows_are_granted_with_syn_and_ack() -> None:
    client = Session(client=True, config=SessionConfig(max_stream_window=4 * MIB))
    server = Session(client=False, config=SessionConfig(max_stream_window=2 * MIB))
    stream = client.open_stream(0.0)
    syn = client.data_to_send()
    assert headers(syn) == [(FrameType.WINDOW_UPDATE, Flag.SYN, 1, 4 * MIB - INITIAL_WINDOW)]
    server.receive_data(syn, 0.0)
    accepted = server.accept(1)
    assert accepted is not None
    assert accepted.send_window == 4 * MIB
    assert client.receive_data(server.data_to_send(), 0.0) == [StreamAcknowledged(1)]
    assert stream.send_window == 2 * MIB


def test_window_budget_falls_back_to_the_initial_window() -> None:
    client = Session(client=True, config=SessionConfig(max_stream_window=MIB, window_budget=MIB))
    first, second = client.open_stream(0.0), client.open_stream(0.0)
    assert (first.window, second.window) == (MIB, INITIAL_WINDOW)
    client.reset(first.id)
    assert client.open_stream(0.0).window == MIB


def test_data_before_the_acknowledgement_counts_as_one() -> None:
    client = Session(client=True, config=SMALL)
    client.open_stream(0.0)
    assert client.receive_data(data(1, b"x"), 0.0) == [StreamAcknowledged(1), DataReceived(1, b"x")]
    assert client.unacked == 0


def test_first_answer_carries_the_acknowledgement_even_without_accept() -> None:
    server = Session(client=False, config=SMALL)
    server.receive_data(update(1, 0, Flag.SYN), 0.0)
    server.send(1, b"hi")
    assert headers(server.data_to_send()) == [(FrameType.WINDOW_UPDATE, Flag.ACK, 1, 0), (FrameType.DATA, 0, 1, 2)]


def test_syn_on_a_data_frame_opens_with_its_payload() -> None:
    server = Session(client=False, config=SMALL)
    events = server.receive_data(data(1, b"abc", Flag.SYN | Flag.FIN), 0.0)
    assert events == [StreamOpened(1), DataReceived(1, b"abc"), EofReceived(1)]


def test_backlog_refuses_what_exceeds_it() -> None:
    server = Session(client=False, config=SessionConfig(accept_backlog=2))
    events = server.receive_data(b"".join(update(i, 0, Flag.SYN) for i in (1, 3, 5)), 0.0)
    assert events == [StreamOpened(1), StreamOpened(3)]
    assert headers(server.data_to_send()) == [(FrameType.WINDOW_UPDATE, Flag.RST, 5, 0)]
    server.accept(1)
    assert server.receive_data(update(7, 0, Flag.SYN), 0.0) == [StreamOpened(7)]


def test_stream_limit_holds_for_both_origins() -> None:
    client = Session(client=True, config=SessionConfig(max_streams=2))
    client.open_stream(0.0)
    assert client.receive_data(update(2, 0, Flag.SYN) + update(4, 0, Flag.SYN), 0.0) == [StreamOpened(2)]
    with pytest.raises(GatewayError, match="2 are open"):
        client.open_stream(0.0)


# -- closing ----------------------------------------------------------------------------------------------------------


def test_half_close_lets_the_other_direction_go_on() -> None:
    client, server, sid = connected()
    client.send(sid, b"request")
    client.send_eof(sid, 0.0)
    assert pump(client, server)[1] == [DataReceived(sid, b"request"), EofReceived(sid)]
    with pytest.raises(StreamClosed):
        client.send(sid, b"more")
    server.send(sid, b"reply")
    server.send_eof(sid, 0.0)
    assert pump(client, server)[0] == [DataReceived(sid, b"reply"), EofReceived(sid)]
    assert client.stream_count == server.stream_count == 0


def test_fin_stays_behind_queued_data_and_reset_too() -> None:
    client, _, sid = connected()
    client.send(sid, b"x")
    client.send_eof(sid, 0.0)
    client.reset(sid)
    assert [(kind, flags) for kind, flags, _, _ in headers(all_output(client))] == [
        (FrameType.DATA, 0),
        (FrameType.WINDOW_UPDATE, Flag.FIN),
        (FrameType.WINDOW_UPDATE, Flag.RST),
    ]


def test_reset_ends_one_stream_only() -> None:
    client, server, sid = connected()
    other = client.open_stream(0.0).id
    client.reset(sid)
    client.reset(sid)
    assert StreamWasReset(sid, "by the peer") in pump(client, server)[1]
    server.accept(other)
    server.send(other, b"alive")
    assert DataReceived(other, b"alive") in pump(client, server)[0]


def test_fin_on_a_data_frame_counts_after_its_payload_byte_by_byte() -> None:
    client, _, sid = connected()
    events: list[Event] = []
    for byte in data(sid, b"abc", Flag.FIN):
        events += client.receive_data(bytes([byte]), 0.0)
    assert events == [DataReceived(sid, b"a"), DataReceived(sid, b"b"), DataReceived(sid, b"c"), EofReceived(sid)]


def test_late_frames_of_a_closed_stream_are_drained() -> None:
    client, _, sid = connected()
    client.reset(sid)
    late = data(sid, b"late") + update(sid, 5) + update(sid, 0, Flag.FIN) + update(sid, 0, Flag.RST) + data(77, b"never there")
    assert client.receive_data(late + frame(FrameType.PING, Flag.SYN, 0, 9), 0.0) == []
    assert headers(all_output(client))[0] == (FrameType.PING, Flag.ACK, 0, 9)


def test_reset_in_the_middle_of_a_payload_drops_the_rest() -> None:
    client, _, sid = connected()
    raw = data(sid, b"0123456789")
    assert client.receive_data(raw[:15], 0.0) == [DataReceived(sid, b"012")]
    client.reset(sid)
    assert client.receive_data(raw[15:], 0.0) == []
    assert client.alive


def test_data_behind_a_fin_is_drained_and_a_second_fin_resets_the_stream() -> None:
    client, _, sid = connected()
    assert client.receive_data(update(sid, 0, Flag.FIN) + data(sid, b"late"), 0.0) == [EofReceived(sid)]
    assert client.receive_data(update(sid, 0, Flag.FIN), 0.0) == [StreamWasReset(sid, "the peer closed its direction twice")]
    assert client.alive


def test_table_is_complete_and_final_states_are_final() -> None:
    assert set(TRANSITIONS) == set(State)
    assert not TRANSITIONS[State.CLOSED]
    assert not TRANSITIONS[State.RESET]
    for state in (State.OPEN, State.LOCAL_CLOSED, State.REMOTE_CLOSED):
        assert TRANSITIONS[state][Signal.SEND_RST] is TRANSITIONS[state][Signal.RECV_RST] is State.RESET


# -- windows ----------------------------------------------------------------------------------------------------------


def test_send_stops_at_the_window_and_goes_on_with_credit() -> None:
    client, server, sid = connected(SessionConfig(max_stream_window=INITIAL_WINDOW, send_queue=MIB))
    payload = bytes(MIB)
    sent = 0
    while taken := client.send(sid, payload[sent:]):
        sent += taken
    assert sent == INITIAL_WINDOW
    got = sum(len(event.data) for event in pump(client, server)[1] if isinstance(event, DataReceived))
    assert got == INITIAL_WINDOW
    assert client.send(sid, b"x") == 0
    server.consume(sid, INITIAL_WINDOW // 2)
    assert pump(client, server)[0] == [WindowOpened(sid)]
    assert client.send(sid, payload[: INITIAL_WINDOW // 2]) > 0


def test_credit_is_returned_when_consumed_not_on_arrival() -> None:
    client, server, sid = connected()
    client.send(sid, bytes(60000))
    pump(client, server)
    assert not server.has_output
    server.consume(sid, 1000)
    assert not server.has_output, "too little for a frame"
    server.consume(sid, 59000)
    assert headers(server.data_to_send()) == [(FrameType.WINDOW_UPDATE, 0, sid, 60000)]
    with pytest.raises(ValueError, match="0 are unconsumed"):
        server.consume(sid, 1)


def test_no_credit_once_the_peer_has_closed() -> None:
    client, server, sid = connected()
    client.send(sid, bytes(60000))
    client.send_eof(sid, 0.0)
    pump(client, server)
    server.consume(sid, 60000)
    assert not server.has_output


def test_queue_limit_and_frame_size() -> None:
    client, _, sid = connected(SessionConfig(max_frame=1000, send_queue=2500))
    assert [client.send(sid, bytes(5000)) for _ in range(4)] == [1000, 1000, 1000, 0]
    assert not client.has_room
    assert [length for _, _, _, length in headers(all_output(client))] == [1000, 1000, 1000]
    assert client.has_room


def test_output_is_merged_up_to_the_limit_and_control_goes_first() -> None:
    client, _, sid = connected(SessionConfig(send_queue=MIB))
    for _ in range(8):
        client.send(sid, bytes(65536))
    client.ping(0.0)
    first = client.data_to_send(256 * 1024)
    assert 128 * 1024 < len(first) <= 256 * 1024
    assert headers(first)[0][0] == FrameType.PING


@pytest.mark.parametrize("limit", [1, 500, 1012, 1500, 2024, 2500])
def test_output_is_cut_between_frames_only(limit: int) -> None:
    client, server, sid = connected(SessionConfig(max_frame=1000))
    for letter in b"abc":
        client.send(sid, bytes([letter]) * 1000)
    received = b""
    while part := client.data_to_send(limit):
        client.ping(0.0) if client.has_output else None  # a control frame between any two
        received += b"".join(e.data for e in server.receive_data(part, 0.0) if isinstance(e, DataReceived))
        assert client.alive
    assert received == b"a" * 1000 + b"b" * 1000 + b"c" * 1000


# -- hostile peers ----------------------------------------------------------------------------------------------------

VIOLATIONS = {
    "version": b"\x01" + bytes(11),
    "type": b"\x00\x09" + bytes(10),
    "text": b"HTTP/1.1 400 Bad Request\r\n\r\n",
    "SYN with id 0": update(0, 0, Flag.SYN),
    "SYN with our parity": update(2, 0, Flag.SYN),
    "second SYN": update(1, 0, Flag.SYN),
    "window overrun": data(1, bytes(INITIAL_WINDOW)) + data(1, b"x"),
    "frame above every window": frame(FrameType.DATA, 0, 99, INITIAL_WINDOW + 1),
    "send window overflow": update(1, 0xFFFFFFFF),
}


@pytest.mark.parametrize("name", VIOLATIONS)
def test_violations_end_the_session_with_a_go_away(name: str) -> None:
    _, server, sid = connected()
    server.send(sid, b"queued")
    events = server.receive_data(VIOLATIONS[name] + data(1, b"more"), 0.0)
    assert isinstance(events[-1], SessionEnded)
    assert not events[-1].orderly
    assert server.ended is events[-1]
    assert headers(all_output(server)) == [(FrameType.GO_AWAY, 0, 0, GoAwayCode.PROTOCOL_ERROR)]
    assert server.receive_data(data(1, b"more"), 0.0) == []
    assert server.stream_count == 0
    for misuse in (lambda: server.send(sid, b"x"), lambda: server.open_stream(0.0), lambda: server.ping(0.0)):
        with pytest.raises(MuxClosed):
            misuse()
    assert server.next_deadline() is None
    assert server.tick(1e9) == []


def test_a_flood_of_pings_that_nobody_reads_ends_the_session() -> None:
    server = Session(client=False)
    flood = frame(FrameType.PING, Flag.SYN, 0, 1) * 10000
    events: list[Event] = []
    rounds = 0
    while not events:
        events = server.receive_data(flood, 0.0)
        rounds += 1
        assert rounds < 100
    assert isinstance(events[0], SessionEnded)


@pytest.mark.parametrize("code", [GoAwayCode.PROTOCOL_ERROR, GoAwayCode.INTERNAL_ERROR, 77])
def test_go_away_with_an_error_ends_the_session(code: int) -> None:
    client, _, _ = connected()
    events = client.receive_data(frame(FrameType.GO_AWAY, 0, 0, code), 0.0)
    assert events == [SessionEnded(f"the peer sent go away with code {int(code)}", orderly=False)]


def test_orderly_go_away_lets_streams_finish() -> None:
    client, server, sid = connected()
    server.go_away()
    server.go_away()
    assert pump(client, server)[0] == [GoAwayReceived()]
    with pytest.raises(MuxClosed):
        client.open_stream(0.0)
    client.send(sid, b"still")
    assert pump(client, server)[1] == [DataReceived(sid, b"still")]
    server.receive_data(update(9, 0, Flag.SYN), 0.0)
    assert headers(server.data_to_send()) == [(FrameType.WINDOW_UPDATE, Flag.RST, 9, 0)]


@pytest.mark.parametrize(("tail", "orderly"), [(b"", True), (b"\0\0", False), (data(1, b"abc")[:-1], False)])
def test_end_of_the_transport(tail: bytes, orderly: bool) -> None:
    client, _, _ = connected()
    client.receive_data(tail, 0.0)
    (ended,) = client.receive_eof()
    assert isinstance(ended, SessionEnded)
    assert ended.orderly is orderly
    assert client.receive_eof() == []


# -- time -------------------------------------------------------------------------------------------------------------


def test_ping_measures_the_round_trip() -> None:
    client, server, _ = connected()
    ping_id = client.ping(10.0)
    server.receive_data(client.data_to_send(), 10.0)
    assert client.receive_data(server.data_to_send(), 10.25) == [PingAnswered(ping_id, 0.25)]
    assert client.receive_data(frame(FrameType.PING, Flag.ACK, 0, ping_id), 11.0) == [], "an answer counts once"


def test_keepalive_pings_and_gives_up_in_silence() -> None:
    client, server, _ = connected()
    assert client.tick(100.0) == []
    assert client.next_deadline() == 115.0
    assert client.tick(114.9) == []
    assert not client.has_output
    client.tick(115.0)
    server.receive_data(client.data_to_send(), 115.0)
    answer = server.data_to_send()
    assert client.next_deadline() == 125.0
    client.receive_data(answer, 116.0)
    assert client.next_deadline() == 131.0
    client.tick(131.0)
    assert client.tick(140.9) == []
    assert client.tick(141.0) == [SessionEnded("no answer to a ping and nothing received for 10 s", orderly=False)]


def test_any_byte_received_is_a_sign_of_life() -> None:
    client, _, sid = connected()
    client.tick(0.0)
    client.tick(15.0)
    client.receive_data(update(sid, 1), 24.0)
    assert client.tick(25.0) == []
    assert client.next_deadline() == 34.0
    assert isinstance(client.tick(34.0)[0], SessionEnded)


def test_keepalive_can_be_off() -> None:
    client = Session(client=True, config=SessionConfig(keepalive_interval=0))
    client.tick(0.0)
    assert client.next_deadline() is None


def test_half_closed_and_read_by_nobody_is_reset_but_not_while_bytes_flow() -> None:
    client, server, sid = connected(SessionConfig(keepalive_interval=0))
    client.send_eof(sid, 1000.0)
    client.abandon(sid, 1000.0)
    pump(client, server, 1000.0)
    assert client.next_deadline() == 1300.0
    server.send(sid, b"x")
    server_out = all_output(server)
    client.receive_data(server_out, 1200.0)
    client.consume(sid, 1)
    assert client.tick(1300.0) == []
    assert client.next_deadline() == 1500.0
    assert client.tick(1500.0) == [StreamWasReset(sid, "half-closed and silent for 300 s")]
    assert headers(all_output(client))[-1] == (FrameType.WINDOW_UPDATE, Flag.RST, sid, 0)
    assert client.next_deadline() is None


def test_a_reply_may_take_as_long_as_it_likes() -> None:
    client, server, sid = connected(SessionConfig(keepalive_interval=0))
    client.send_eof(sid, 0.0)
    pump(client, server, 0.0)
    for now in (300.0, 600.0, 86400.0):
        assert client.tick(now) == []
        assert server.tick(now) == []
    server.send(sid, b"at last")
    server.send_eof(sid, 86400.0)
    assert pump(server, client, 86400.0)[1] == [DataReceived(sid, b"at last"), EofReceived(sid)]


def test_a_peer_that_closed_and_grants_nothing_is_reset_an_idle_one_is_not() -> None:
    client, server, stuck = connected(SessionConfig(keepalive_interval=0, max_stream_window=INITIAL_WINDOW, send_queue=MIB))
    idle = client.open_stream(0.0).id
    pump(client, server)
    for sid in (stuck, idle):
        client.send_eof(sid, 0.0)
    pump(client, server)
    while server.send(stuck, bytes(65536)):
        pass
    pump(client, server)
    assert server.tick(300.0) == [StreamWasReset(stuck, "half-closed and silent for 300 s")]
    assert server.tick(10000.0) == []
    server.send(idle, b"at last")
    assert pump(client, server)[0][-1] == DataReceived(idle, b"at last")


def test_config_is_checked() -> None:
    for wrong in ({"max_stream_window": 1000}, {"max_frame": 0}, {"accept_backlog": -1}, {"keepalive_timeout": 0.0}):
        with pytest.raises(ValueError, match="must be"):
            SessionConfig(**wrong)

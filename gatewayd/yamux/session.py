"""A yamux session without I/O: bytes and `now` in, bytes and events out. Client and server in one.

The caller moves the bytes: everything received goes into `receive_data`, everything `data_to_send` returns goes out in
order, and `tick` is called once at the start and whenever `next_deadline` has passed. `now` is any monotonic clock in seconds.

Follows https://github.com/hashicorp/yamux/blob/master/spec.md and, where that is silent, hashicorp's library.
"""

from __future__ import annotations

from typing import Final

from gatewayd.errors import GatewayError, MuxClosed, StreamClosed
from gatewayd.yamux.config import SessionConfig
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
from gatewayd.yamux.frames import (
    INITIAL_WINDOW,
    MAX_U32,
    Flag,
    FrameReader,
    FrameType,
    GoAwayCode,
    Header,
    ProtocolViolation,
)
from gatewayd.yamux.outbox import Outbox
from gatewayd.yamux.pings import Pings
from gatewayd.yamux.stream import Signal, State, Stream

__all__ = ["Session", "SessionConfig"]

_MAX_REPLIES: Final = 1 << 20  # unsent bytes beyond what `send` queues; only a peer that floods and does not read comes near it


class Session:
    """One side of a yamux session. Not thread-safe; never raises for what the peer sends."""

    def __init__(self, *, client: bool, config: SessionConfig | None = None) -> None:
        self.config = config or SessionConfig()
        self.ended: SessionEnded | None = None  # set once, when the session is over for whatever reason
        self.peer_gone_away = False  # the peer accepts no new streams
        self.gone_away = False  # we accept no new streams

        self._reader = FrameReader()
        self._streams: dict[int, Stream] = {}  # live streams; one leaves when CLOSED or RESET
        self._next_id = 1 if client else 2  # id of the next stream we open (spec, "Stream ID")
        self._peer_parity = 0 if client else 1  # id modulo 2 of streams the peer opens
        self._payload_of: Stream | None = None  # whose payload the reader is in; None: it is dropped
        self._payload_flags = 0  # flags of that frame: FIN and RST count once its payload is complete
        self._unaccepted = 0  # peer's streams that wait for accept()
        self._unacked = 0  # own streams that wait for the peer's ACK
        self._extra_granted = 0  # sum over live streams of window - INITIAL_WINDOW

        self._outbox = Outbox()  # frames not sent yet
        self._credit: dict[int, None] = {}  # ids of streams that are due a window update, in order

        self._pings = Pings(interval=self.config.keepalive_interval, timeout=self.config.keepalive_timeout)
        self._last_received = 0.0  # when bytes last came in
        self._half_closed: dict[int, Stream] = {}  # LOCAL_CLOSED and REMOTE_CLOSED streams, watched by the sweep
        self._sweep_at: float | None = None  # when _half_closed is looked through next

        self._max_unsent = self.config.send_queue + self.config.max_frame + _MAX_REPLIES  # bytes; beyond it the peer floods

    # -- what is there ------------------------------------------------------------------------------------------------

    @property
    def alive(self) -> bool:
        """False once the session has ended."""
        return self.ended is None

    @property
    def stream_count(self) -> int:
        """Streams open at the moment."""
        return len(self._streams)

    @property
    def unacked(self) -> int:
        """Own streams that the peer has not acknowledged; a peer with hashicorp's backlog resets those above 256."""
        return self._unacked

    @property
    def has_room(self) -> bool:
        """True when `send` would accept bytes as far as the output queue is concerned."""
        return self._outbox.data_size < self.config.send_queue

    @property
    def has_output(self) -> bool:
        """True when `data_to_send` would return something."""
        return bool(self._outbox or self._credit)

    def stream(self, stream_id: int) -> Stream | None:
        """The live stream of that id; for reading only."""
        return self._streams.get(stream_id)

    # -- streams ------------------------------------------------------------------------------------------------------

    def open_stream(self, now: float) -> Stream:
        """Open a stream; its SYN goes out with the next `data_to_send`.

        Raises:
            MuxClosed: the session has ended, the peer takes no more streams, or the ids are used up.
            GatewayError: `max_streams` are open.
        """
        self._check_alive()
        if self.peer_gone_away:
            raise MuxClosed("cannot open a stream: the peer is going away")
        if self._next_id > MAX_U32:
            raise MuxClosed("cannot open a stream: all stream ids are used")
        if len(self._streams) >= self.config.max_streams:
            raise GatewayError(f"cannot open a stream: {len(self._streams)} are open", kind="unavailable")
        stream = self._add_stream(self._next_id, local_origin=True, now=now)
        self._next_id += 2
        self._unacked += 1
        self._outbox.push_control(FrameType.WINDOW_UPDATE, Flag.SYN, stream.id, stream.first_grant())
        return stream

    def accept(self, stream_id: int) -> Stream | None:
        """Acknowledge a stream of the peer; None when it is gone already. Idempotent."""
        stream = self._streams.get(stream_id)
        if stream is not None and not stream.local_origin and not stream.acked:
            stream.acked = True
            self._unaccepted -= 1
            self._outbox.push_control(FrameType.WINDOW_UPDATE, Flag.ACK, stream_id, stream.first_grant())
        return stream

    def send(self, stream_id: int, data: bytes | memoryview) -> int:
        """Queue the beginning of `data` as one frame; how many bytes were taken.

        0 means: window exhausted (wait for WindowOpened) or queue full (`has_room` is False). The buffer must not change
        until `data_to_send` has returned it.

        Raises:
            MuxClosed: the session has ended.
            StreamClosed: we closed our direction, or the stream is gone.
        """
        stream = self._sendable(stream_id)
        size = min(len(data), stream.send_window, self.config.max_frame)
        if not size or not self.has_room:
            return 0
        stream.send_window -= size
        self._outbox.push_data(stream_id, memoryview(data)[:size])
        return size

    def send_eof(self, stream_id: int, now: float) -> None:
        """Close our direction: FIN behind what is queued.

        Raises:
            MuxClosed: the session has ended.
            StreamClosed: it was closed before, or the stream is gone.
        """
        stream = self._sendable(stream_id)
        stream.advance(Signal.SEND_FIN)
        self._outbox.push_behind_data(Flag.FIN, stream_id)
        self._half_close(stream, now)

    def abandon(self, stream_id: int, now: float) -> None:
        """The application reads this stream no more: the peer has `stream_close_timeout` to close its direction, too."""
        stream = self._streams.get(stream_id)
        if stream is not None:
            stream.abandoned = True
            stream.last_activity = now

    def reset(self, stream_id: int) -> None:
        """Drop a stream in both directions; nothing happens when it is gone already."""
        stream = self._streams.get(stream_id)
        if stream is not None:
            stream.advance(Signal.SEND_RST)
            self._outbox.push_behind_data(Flag.RST, stream_id)
            self._forget(stream)

    def consume(self, stream_id: int, size: int) -> None:
        """The application has taken `size` received bytes: grant them anew. Harmless when the stream is gone.

        Raises:
            ValueError: more than was received.
        """
        stream = self._streams.get(stream_id)
        if stream is None:
            return
        if size > stream.buffered:
            raise ValueError(f"cannot consume {size} bytes of stream {stream_id}: {stream.buffered} are unconsumed")
        stream.buffered -= size
        if stream.credit_due():
            self._credit[stream_id] = None

    # -- session ------------------------------------------------------------------------------------------------------

    def ping(self, now: float) -> int:
        """Send a ping; its PingAnswered event carries the id returned here.

        Raises:
            MuxClosed: the session has ended.
        """
        self._check_alive()
        ping_id = self._pings.new(now)
        self._outbox.push_control(FrameType.PING, Flag.SYN, 0, ping_id)
        return ping_id

    def go_away(self, code: GoAwayCode = GoAwayCode.NORMAL) -> None:
        """Tell the peer to open no more streams; those that are open go on. Idempotent."""
        if not self.gone_away and self.ended is None:
            self.gone_away = True
            self._outbox.push_control(FrameType.GO_AWAY, Flag.NONE, 0, code)

    def data_to_send(self, limit: int = 256 * 1024) -> bytes:
        """The next whole frames for the transport, about `limit` bytes at most; b"" when there are none.

        Control frames and window updates come first: they never wait behind bulk data.
        """
        for stream_id in self._credit:
            stream = self._streams.get(stream_id)
            if stream is not None and (delta := stream.take_credit()):
                self._outbox.push_control(FrameType.WINDOW_UPDATE, Flag.NONE, stream_id, delta)
        self._credit.clear()
        return b"".join(self._outbox.take(limit))

    def next_deadline(self) -> float | None:
        """When `tick` is due next; may lie in the past, and may turn out to have been too early."""
        if self.ended is not None:
            return None
        times = (self._pings.due(self._last_received), self._sweep_at)
        return min((time for time in times if time is not None), default=None)

    def tick(self, now: float) -> list[Event]:
        """Do what is due at `now`: keepalive, and the reset of half-closed streams that have gone silent."""
        events: list[Event] = []
        if self.ended is not None:
            return events
        self._pings.start(now)
        due = self._pings.due(self._last_received)
        if due is not None and now >= due:
            if self._pings.keepalive_under_way:
                self._end(f"no answer to a ping and nothing received for {self.config.keepalive_timeout:g} s", events)
            else:
                self._outbox.push_control(FrameType.PING, Flag.SYN, 0, self._pings.new_keepalive(now))
        if self._sweep_at is not None and now >= self._sweep_at:
            self._sweep(now, events)
        return events

    # -- receiving ----------------------------------------------------------------------------------------------------

    def receive_data(self, data: bytes | memoryview, now: float) -> list[Event]:
        """Take bytes from the transport, cut anywhere. Never raises for their content."""
        events: list[Event] = []
        if self.ended is not None:
            return events  # the rest of what the peer said does not matter any more
        self._last_received = now
        try:
            for part in self._reader.feed(data):
                if isinstance(part, bytes):
                    self._on_payload(part, now, events)
                elif part.type == FrameType.PING:
                    self._on_ping(part, now, events)
                elif part.type == FrameType.GO_AWAY:
                    self._on_go_away(part, events)
                else:
                    self._on_stream_frame(part, now, events)
                if not self.alive:
                    break
            if self._outbox.control_size + self._outbox.data_size > self._max_unsent:
                raise ProtocolViolation("too many requests without reading the answers")
        except ProtocolViolation as exc:
            self._end(str(exc), events, code=GoAwayCode.PROTOCOL_ERROR)
        return events

    def receive_eof(self) -> list[Event]:
        """The transport has ended: so has the session."""
        events: list[Event] = []
        whole = self._reader.at_boundary
        reason = "the peer closed the connection" + ("" if whole else " in the middle of a frame")
        self._end(reason, events, orderly=whole)
        return events

    def _on_stream_frame(self, header: Header, now: float, events: list[Event]) -> None:
        is_data = header.type == FrameType.DATA
        if is_data and header.length > self.config.max_stream_window:
            raise ProtocolViolation(f"stream {header.stream_id}: frame of {header.length} bytes")
        if header.flags & Flag.SYN:
            self._on_syn(header.stream_id, now, events)
        stream = self._streams.get(header.stream_id)
        if is_data:
            self._payload_of = stream
            self._payload_flags = header.flags
        if stream is None:
            return  # one that we closed or refused: late frames are drained
        stream.last_activity = now
        if stream.local_origin and not stream.acked and not header.flags & Flag.RST:
            # Any frame proves that the peer took the stream; some peers never set ACK.
            stream.acked = True
            self._unacked -= 1
            events.append(StreamAcknowledged(stream.id))
        if not is_data:
            if stream.receive_credit(header.length):
                events.append(WindowOpened(stream.id))
            self._on_closing_flags(stream, header.flags, now, events)
        elif not header.length:
            self._on_closing_flags(stream, header.flags, now, events)
        elif not stream.allows(Signal.RECV_DATA):
            self._payload_of = None  # LangSmith's SDK can send data behind its own FIN when its threads race: drained
        else:
            stream.receive_payload(header.length)

    def _on_syn(self, stream_id: int, now: float, events: list[Event]) -> None:
        if stream_id == 0 or stream_id % 2 != self._peer_parity:
            raise ProtocolViolation(f"SYN with stream id {stream_id}")
        if stream_id in self._streams:
            raise ProtocolViolation(f"second SYN for stream {stream_id}")
        if self.gone_away or self._unaccepted >= self.config.accept_backlog or len(self._streams) >= self.config.max_streams:
            self._outbox.push_control(FrameType.WINDOW_UPDATE, Flag.RST, stream_id, 0)
            return
        self._add_stream(stream_id, local_origin=False, now=now)
        self._unaccepted += 1
        events.append(StreamOpened(stream_id))

    def _on_payload(self, piece: bytes, now: float, events: list[Event]) -> None:
        stream = self._payload_of
        if stream is None or not stream.allows(Signal.RECV_DATA):
            return  # dropped: unknown, or reset since its header came
        stream.last_activity = now
        events.append(DataReceived(stream.id, piece))
        if not self._reader.payload_left:
            self._on_closing_flags(stream, self._payload_flags, now, events)

    def _on_closing_flags(self, stream: Stream, flags: int, now: float, events: list[Event]) -> None:
        if flags & Flag.FIN:
            if stream.allows(Signal.RECV_FIN):
                stream.advance(Signal.RECV_FIN)
                events.append(EofReceived(stream.id))
                self._half_close(stream, now)
            else:
                # One stream's fault is not worth the session, though hashicorp's library thinks so.
                events.append(StreamWasReset(stream.id, "the peer closed its direction twice"))
                self.reset(stream.id)
        if flags & Flag.RST and stream.allows(Signal.RECV_RST):
            stream.advance(Signal.RECV_RST)
            events.append(StreamWasReset(stream.id, "by the peer"))
            self._forget(stream)

    def _on_ping(self, header: Header, now: float, events: list[Event]) -> None:
        if header.flags & Flag.SYN:
            self._outbox.push_control(FrameType.PING, Flag.ACK, 0, header.length)
            return
        rtt = self._pings.answered(header.length, now)
        if rtt is not None:  # else late, or never asked for: hashicorp's library ignores it too
            events.append(PingAnswered(header.length, rtt))

    def _on_go_away(self, header: Header, events: list[Event]) -> None:
        if header.length == GoAwayCode.NORMAL:
            self.peer_gone_away = True
            events.append(GoAwayReceived())
        else:
            self._end(f"the peer sent go away with code {header.length}", events)

    # -- inside -------------------------------------------------------------------------------------------------------

    def _check_alive(self) -> None:
        if self.ended is not None:
            raise MuxClosed(f"the session ended: {self.ended.reason}")

    def _sendable(self, stream_id: int) -> Stream:
        stream = self._streams.get(stream_id)
        if stream is None or not stream.allows(Signal.SEND_DATA):
            self._check_alive()
            raise StreamClosed(f"cannot send on stream {stream_id}: it is closed")
        self.accept(stream_id)  # if it is the peer's: our ACK must not come after our data
        return stream

    def _add_stream(self, stream_id: int, *, local_origin: bool, now: float) -> Stream:
        window = self.config.max_stream_window
        if self._extra_granted + window - INITIAL_WINDOW > self.config.window_budget:
            window = INITIAL_WINDOW
        self._extra_granted += window - INITIAL_WINDOW
        stream = Stream(stream_id, local_origin=local_origin, window=window, now=now)
        self._streams[stream_id] = stream
        return stream

    def _forget(self, stream: Stream) -> None:
        del self._streams[stream.id]
        self._half_closed.pop(stream.id, None)
        self._extra_granted -= stream.window - INITIAL_WINDOW
        if not stream.acked:
            stream.acked = True
            if stream.local_origin:
                self._unacked -= 1
            else:
                self._unaccepted -= 1

    def _half_close(self, stream: Stream, now: float) -> None:
        """Enter a stream into the sweep's list, or forget it when both directions are closed now."""
        if stream.state is State.CLOSED:
            self._forget(stream)
            return
        stream.last_activity = now
        self._half_closed[stream.id] = stream
        if self._sweep_at is None:
            self._sweep_at = now + self.config.stream_close_timeout

    def _sweep(self, now: float, events: list[Event]) -> None:
        """Reset half-closed streams on which the peer has been due to do something for `stream_close_timeout`.

        It is due when we closed and read no more, or when it closed and lets us send nothing more. In every other case
        somebody still waits for bytes, a reply that takes an hour perhaps: such a stream may be idle for as long as it likes.
        """
        timeout = self.config.stream_close_timeout
        next_sweep = now + timeout
        for stream in list(self._half_closed.values()):
            peer_due = stream.abandoned if stream.state is State.LOCAL_CLOSED else not stream.send_window
            if not peer_due:
                stream.last_activity = now
            elif stream.last_activity + timeout <= now:
                events.append(StreamWasReset(stream.id, f"half-closed and silent for {timeout:g} s"))
                self.reset(stream.id)
            else:
                next_sweep = min(next_sweep, stream.last_activity + timeout)
        self._sweep_at = next_sweep if self._half_closed else None

    def _end(self, reason: str, events: list[Event], *, orderly: bool = False, code: GoAwayCode | None = None) -> None:
        if self.ended is not None:
            return
        self.ended = SessionEnded(reason, orderly)
        events.append(self.ended)
        for stream in self._streams.values():
            stream.state = State.RESET
        self._streams.clear()
        self._half_closed.clear()
        self._unaccepted = self._unacked = self._extra_granted = 0
        self._credit.clear()
        self._outbox.clear()
        if code is not None:
            self._outbox.push_control(FrameType.GO_AWAY, Flag.NONE, 0, code)

"""A guest as docs/guest-protocol.md describes it, with no sockets: one session that answers its input on both streams."""

from __future__ import annotations

import struct
from collections import deque

from gatewayd.guest import wire
from gatewayd.guest.wire import Answer, FrameDecoder, Kind, Mode, Status, encode_fields, encode_frame


def mirrored(data: bytes) -> bytes:
    """What the model writes to stream 2 for `data` on stream 1."""
    return data[::-1]


class ModelGuest:
    """Counts, keeps, sends again. Its process writes its input to stream 1, and mirrored to stream 2, as fast as it may."""

    def __init__(self) -> None:
        self.token = bytes(range(32))
        self.id: bytes | None = None  # of the session, once opened
        self.received = 0  # numbered bytes of the client
        self.got: list[tuple[int, bytes]] = []  # numbered frames of the client, each once
        self.out: deque[tuple[int, bytes]] = deque()  # output waiting for its window: stream, bytes
        self.window = {1: 0, 2: 0}
        self.full_window = 0  # as OPEN named it
        self.credit = wire.INPUT_WINDOW
        self.kept: deque[bytes] = deque()  # numbered frames not acknowledged
        self.first = 0  # number of the first of them
        self.next = 0  # of `kept`: the first that this connection has not been given
        self.input_eof = False
        self.exited = False
        self.mute = False  # acknowledges nothing
        self.decoder = FrameDecoder()
        self.pending = b""  # of the preface
        self.answered = False

    # -- a connection ---------------------------------------------------------------------------------------------

    def connect(self) -> None:
        self.decoder, self.pending, self.answered, self.next = FrameDecoder(), b"", False, 0

    def receive(self, data: bytes) -> bytes:
        """Bytes in, bytes out."""
        out = b""
        if not self.answered:
            self.pending += data
            if len(self.pending) < wire.PREFACE_SIZE:
                return b""
            data = self.pending[wire.PREFACE_SIZE :]
            out += self._answer(*wire.decode_preface(self.pending[: wire.PREFACE_SIZE]))
            self.answered = True
        before = self.received
        for kind, payload in self.decoder.feed(data):
            if kind < wire.NUMBERED_BELOW:
                self.received += wire.HEADER_SIZE + len(payload)
                self.got.append((kind, payload))
            self._frame(kind, payload)
        if self.received != before and not self.mute:
            out += encode_frame(Kind.ACK, struct.pack(">Q", self.received))
        return out + self.flush()

    def _answer(self, token: bytes, session: bytes, mode: int, received: int) -> bytes:
        assert token == self.token
        if mode == Mode.OPEN and self.id is None:
            self.id = session
        if session != self.id:
            return wire.encode_answer(Answer(Status.NO_SESSION, 0, 0, 0))
        if mode == Mode.ATTACH:
            received = self.first
            self.kept = deque(encode_frame(Kind.CREDIT, bytes(4)) if frame[0] == Kind.CREDIT else frame for frame in self.kept)
            for stream, kind in ((1, Kind.OUTPUT), (2, Kind.ERROUT)):
                again = sum(len(frame) - wire.HEADER_SIZE for frame in self.kept if frame[0] == kind)
                self.window[stream] = self.full_window - again
        self._acknowledged(received)
        return wire.encode_answer(Answer(Status.OK, self.received, self.first, self.credit))

    def _acknowledged(self, count: int) -> None:
        while self.first < count:
            self.first += len(self.kept.popleft())
            self.next = max(0, self.next - 1)
        assert self.first == count, "acknowledged within a frame"

    def _frame(self, kind: int, payload: bytes) -> None:
        if kind == Kind.ACK:
            self._acknowledged(*struct.unpack(">Q", payload))
        elif kind == Kind.OPEN:
            self.full_window = int(dict(wire.decode_fields(payload))["window"])
            self.window = dict.fromkeys((1, 2), self.full_window)
            self.keep(Kind.OPENED, encode_fields([("pid", b"7")]))
            if (more := self.full_window - wire.INPUT_WINDOW) > 0:
                self.credit += more
                self.keep(Kind.CREDIT, struct.pack(">I", more))
        elif kind == Kind.INPUT:
            self.credit -= len(payload)
            assert self.credit >= 0, "the client sent more than it was granted"
            self.out += (1, payload), (2, mirrored(payload))
        elif kind == Kind.GRANT:
            stream, size = struct.unpack(">BI", payload)
            self.window[stream] += size
            assert self.window[stream] <= self.full_window
        elif kind == Kind.INPUT_EOF:
            self.input_eof = True

    # -- its process --------------------------------------------------------------------------------------------

    def keep(self, kind: int, payload: bytes = b"") -> None:
        self.kept.append(encode_frame(kind, payload))

    def work(self) -> None:
        """Move what the windows allow; grant what was moved."""
        for _ in range(len(self.out)):
            stream, data = self.out.popleft()
            now, later = data[: self.window[stream]], data[self.window[stream] :]
            if now:
                self.window[stream] -= len(now)
                self.keep(Kind.OUTPUT if stream == 1 else Kind.ERROUT, now)
                if stream == 1:
                    self.credit += len(now)
                    self.keep(Kind.CREDIT, struct.pack(">I", len(now)))
            if later:
                waiting = [entry for entry in self.out if entry[0] != stream]
                rest = [entry for entry in self.out if entry[0] == stream]
                self.out = deque([*waiting, (stream, later), *rest])
        if self.input_eof and not self.out and not self.exited:
            self.exited = True
            self.keep(Kind.EXIT, encode_fields([("code", b"3")]))
            self.keep(Kind.OUTPUT_EOF, b"\x01")
            self.keep(Kind.OUTPUT_EOF, b"\x02")

    def flush(self) -> bytes:
        """Numbered frames for this connection."""
        self.work()
        if not self.answered:
            return b""
        fresh = list(self.kept)[self.next :]
        self.next = len(self.kept)
        return b"".join(fresh)

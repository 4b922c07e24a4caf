"""Where one WebSocket frame ends and the next begins, in what a server sends (RFC 6455, section 5.2)."""

from __future__ import annotations

import struct

HEAD_END = b"\r\n\r\n"
UPGRADED = b"HTTP/1.1 101 "
HEAD_MAX = 65536  # bytes of an answer's head
_LENGTHS = {126: ">H", 127: ">Q"}  # payload length in the second byte → the form of the true length behind it


class Frames:
    """Follows the bytes from a server: the answer to an upgrade, then unmasked frames."""

    def __init__(self) -> None:
        self.upgraded: bool | None = None  # None until the first answer's head is complete
        self._head = b""  # of the answer or the present frame, as far as it is there
        self._payload = 0  # bytes of the present frame still to come

    @property
    def between(self) -> bool:
        """Whether a frame may begin here."""
        return self.upgraded is True and not self._head and not self._payload

    def follow(self, data: bytes, *, stop: bool = False) -> int:
        """Take note of `data`; with `stop`, only up to the first place between two frames. How many bytes were taken."""
        at = 0
        if self.upgraded is None:
            at = self._answer(data)
        if not self.upgraded:
            return len(data)
        while at < len(data) and not (stop and self.between):
            if self._payload:
                step = min(self._payload, len(data) - at)
                self._payload -= step
                at += step
            else:
                self._head += data[at : at + 1]
                at += 1
                self._begin()
        return at

    def _answer(self, data: bytes) -> int:
        before = len(self._head)
        self._head += data
        end = self._head.find(HEAD_END)
        if end < 0:
            if len(self._head) > HEAD_MAX:
                self.upgraded = False
            return len(data)
        self.upgraded = self._head.startswith(UPGRADED)
        self._head = b""
        return end + len(HEAD_END) - before

    def _begin(self) -> None:
        """The frame's head may be complete."""
        head = self._head
        if len(head) < 2:
            return
        length = head[1] & 0x7F
        if form := _LENGTHS.get(length):
            if len(head) < 2 + struct.calcsize(form):
                return
            (length,) = struct.unpack(form, head[2:])
        self._head = b""
        self._payload = length

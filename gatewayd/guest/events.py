"""What a guest session tells its user: plain facts, in the order in which they happened.

Plain classes: `dataclasses` would be most of the import time of the command.
"""

from __future__ import annotations


class Event:
    """Compares and prints by its attributes."""

    __slots__: tuple[str, ...] = ()

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and all(getattr(self, name) == getattr(other, name) for name in self.__slots__)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={getattr(self, name)!r}' for name in self.__slots__)})"


class Opened(Event):
    """The session runs."""

    __slots__ = ("fields",)
    __match_args__ = ("fields",)

    def __init__(self, fields: dict[str, bytes]) -> None:
        self.fields = fields  # by kind: pid, user, tty, local, peer, port, path


class Output(Event):
    """Bytes of a stream, in order; hand the count to `ClientSession.grant` once the consumer has taken them."""

    __slots__ = ("data", "stream")
    __match_args__ = ("stream", "data")

    def __init__(self, stream: int, data: bytes) -> None:
        self.stream = stream  # 1 or 2
        self.data = data  # never empty


class OutputEof(Event):
    """A stream has ended."""

    __slots__ = ("stream",)
    __match_args__ = ("stream",)

    def __init__(self, stream: int) -> None:
        self.stream = stream  # 1 or 2


class InputStopped(Event):
    """Nobody reads the input any more; what is still given to `send_input` is dropped."""


class Credit(Event):
    """More input may be sent."""

    __slots__ = ("size",)
    __match_args__ = ("size",)

    def __init__(self, size: int) -> None:
        self.size = size  # bytes


class Exit(Event):
    """The process has ended; output may still follow. Of a list: that was all."""

    __slots__ = ("code", "core", "signal")
    __match_args__ = ("code", "signal", "core")

    def __init__(self, code: int | None, signal: str, core: bool) -> None:
        self.code = code  # 0-255; None when a signal ended it
        self.signal = signal  # name without SIG; "" when it exited
        self.core = core  # whether a core was dumped


class Failed(Event):
    """The session could not be opened, or has failed: the last event."""

    __slots__ = ("errno", "kind", "message")
    __match_args__ = ("kind", "errno", "message")

    def __init__(self, kind: str, errno: int | None, message: str) -> None:
        self.kind = kind  # usage, not-found, refused, permission, failed
        self.errno = errno  # where there is one
        self.message = message  # one line, without control characters


class Accepted(Event):
    """A listener's: somebody connected. Fetch it with `ClientSession.accepted(id, window)` within 30 seconds."""

    __slots__ = ("id", "peer")
    __match_args__ = ("id", "peer")

    def __init__(self, id: bytes, peer: str) -> None:
        self.id = id  # of the connection's session, 16 bytes
        self.peer = peer  # its address, one line


class Item(Event):
    """A list's: one session."""

    __slots__ = ("fields",)
    __match_args__ = ("fields",)

    def __init__(self, fields: dict[str, bytes]) -> None:
        self.fields = fields  # id, kind, name, pid, command, pty, attached, started, code or signal: not checked


class Detached(Event):
    """Another connection has taken the session over: the last event, do not come back."""

    __slots__ = ("reason",)
    __match_args__ = ("reason",)

    def __init__(self, reason: str) -> None:
        self.reason = reason  # one line

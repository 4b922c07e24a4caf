"""The exceptions of the gateway, all of them.

::

    GatewayError                  what happened, to what, and what to do next; carries a kind
    ├── MuxClosed                 the multiplexed session has ended
    ├── StreamReset               one stream was reset, by the peer or by us
    ├── StreamClosed              local misuse: writing after our own end was closed
    ├── DialRefused               the sandbox answered: nothing listens on that port
    └── ServiceRefused            the service answered with an error status; carries it

A class exists only where a caller branches on it; everything else is a `GatewayError` with the right `kind`. Messages read
``cannot X: cause`` with the values; hints say what to do next. Neither ever holds a secret.
"""

from __future__ import annotations


class GatewayError(Exception):
    """A failure that can be told to a user.

    Attributes:
        kind: one of the names in `gatewayd.api.EXIT_CODES`; decides the exit code of the command.
        message: one sentence, no trailing newline.
        hint: what to do next, or "".
    """

    default_kind = "failed"

    def __init__(self, message: str, *, kind: str = "", hint: str = "") -> None:
        super().__init__(message)
        self.kind = kind or self.default_kind
        self.message = message
        self.hint = hint


class MuxClosed(GatewayError):
    """The multiplexed session ended; every stream on it is gone."""

    default_kind = "unavailable"


class StreamReset(GatewayError):
    """A stream was reset: bytes in flight may be lost, the session lives on."""

    default_kind = "unavailable"


class StreamClosed(GatewayError):
    """Local misuse: a write after our own write_eof, aclose or abort."""

    default_kind = "internal"


class DialRefused(GatewayError):
    """The sandbox is there, the port is not: nothing accepts connections on it."""

    default_kind = "refused"


class ServiceRefused(GatewayError):
    """The service answered a request or a WebSocket upgrade with an error status.

    Attributes:
        status: HTTP status.
        retry_after: seconds the service asks to wait, or None.
    """

    def __init__(self, message: str, *, kind: str, hint: str = "", status: int, retry_after: float | None = None) -> None:
        super().__init__(message, kind=kind, hint=hint)
        self.status = status
        self.retry_after = retry_after


def printable(text: object, limit: int = 500) -> str:
    """Text from elsewhere, fit for a message: no control characters, one line, at most `limit` characters."""
    line = "".join(char if char.isprintable() else " " for char in str(text)[: limit + 1])
    return line if len(line) <= limit else line[: limit - 1] + "…"

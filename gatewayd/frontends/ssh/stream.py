"""A forwarding channel as a byte stream, so that `gatewayd.relay` can join it with one inside the sandbox."""

from __future__ import annotations

import asyncio
from typing import Any

import asyncssh

from gatewayd.errors import StreamClosed, StreamReset
from gatewayd.frontends.ssh.inbox import Inbox


class ChannelStream(asyncssh.SSHTCPSession[bytes], asyncssh.SSHUNIXSession[bytes]):
    """`gatewayd.relay.ByteStream` over an SSH channel of any forwarding kind. One reader and one writer at a time."""

    def __init__(self) -> None:
        self._channel: Any = None  # SSHChannel[bytes]; set by connection_made
        self._inbox = Inbox()
        self._writable = asyncio.Event()  # clear while the channel holds enough
        self._writable.set()
        self._gone: str = ""  # why nothing can be done any more: completes «cannot …: »
        self._ended = False  # write_eof was called
        self._broken: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def __repr__(self) -> str:
        return f"<ChannelStream {self._gone or 'open'}>"

    # --- what the channel tells us ------------------------------------------------------------------------------------

    def connection_made(self, chan: Any) -> None:
        """The channel is open."""
        self._channel = chan
        self._inbox.attach(chan)

    def data_received(self, data: bytes, datatype: int | None) -> None:
        """Bytes came."""
        self._inbox.put(data)

    def eof_received(self) -> bool:
        """The client's direction has ended; ours goes on."""
        self._inbox.end()
        return True

    def pause_writing(self) -> None:
        """The channel holds enough."""
        self._writable.clear()

    def resume_writing(self) -> None:
        """It wants more."""
        self._writable.set()

    def connection_lost(self, exc: Exception | None) -> None:
        """The channel is closed, by whomever."""
        if not self._gone:
            self._gone = "the client closed the channel"
            if not (self._ended and self._inbox.ended):
                self._broken.set_result(None)
        self._inbox.cut()
        self._writable.set()

    # --- ByteStream ---------------------------------------------------------------------------------------------------

    def broken(self) -> asyncio.Future[None]:
        """Done when the client has closed the channel before both directions had ended."""
        return self._broken

    async def read(self, limit: int = 262144) -> bytes:
        """1 to `limit` bytes, b"" at the end.

        Raises:
            StreamReset: the client closed the channel before its direction had ended.
            StreamClosed: after `abort` or `aclose`.
        """
        data = await self._inbox.get(limit)
        if not data and not self._inbox.ended:
            raise (StreamReset if self._broken.done() else StreamClosed)(f"cannot read from an SSH channel: {self._gone}")
        return data

    async def write(self, data: bytes) -> None:
        """All of `data`; waits while the client is slow. Raises StreamReset or StreamClosed."""
        if not self._writable.is_set():
            await self._writable.wait()
        if self._ended or self._gone:
            error = StreamReset if self._broken.done() else StreamClosed
            raise error(f"cannot write to an SSH channel: {self._gone or 'its direction is closed'}")
        try:
            self._channel.write(data)
        except OSError as exc:
            raise StreamReset("cannot write to an SSH channel: it is closing") from exc

    async def write_eof(self) -> None:
        """End our direction; idempotent."""
        if not self._ended and not self._gone:
            self._ended = True
            self._channel.write_eof()

    def abort(self) -> None:
        """Close at once; what the client has not got is dropped. Idempotent."""
        if self._close("it was aborted"):
            self._channel.abort()

    async def aclose(self) -> None:
        """Close; what was written is still delivered. Idempotent."""
        if self._close("it is closed"):
            self._channel.close()

    def _close(self, why: str) -> bool:
        """Whether there is a channel to be closed."""
        self._inbox.close()
        self._writable.set()
        was_open = not self._gone
        self._gone = self._gone or why
        return was_open and self._channel is not None

"""Byte streams (`relay.ByteStream`) over others: with bytes put back in front, and through TLS."""

from __future__ import annotations

import asyncio
import contextlib
import ssl

from gatewayd.relay import ByteStream

_CIPHERTEXT = 256 * 1024  # bytes read at once
_PLAINTEXT = 256 * 1024


class Replayed:
    """A stream some of whose bytes have been read already: they come again, first."""

    def __init__(self, stream: ByteStream, first: bytes) -> None:
        self._stream = stream
        self._first = first  # not read again yet
        self.read_bytes = 0  # by now
        self.written_bytes = 0

    async def read(self, limit: int = _PLAINTEXT) -> bytes:
        """As `ByteStream.read`."""
        if self._first:
            data, self._first = self._first[:limit], self._first[limit:]
        else:
            data = await self._stream.read(limit)
        self.read_bytes += len(data)
        return data

    async def write(self, data: bytes) -> None:
        """As `ByteStream.write`."""
        await self._stream.write(data)
        self.written_bytes += len(data)

    async def write_eof(self) -> None:
        """As `ByteStream.write_eof`."""
        await self._stream.write_eof()

    def abort(self) -> None:
        """As `ByteStream.abort`."""
        self._stream.abort()

    async def aclose(self) -> None:
        """As `ByteStream.aclose`."""
        await self._stream.aclose()


class TlsStream:
    """TLS over a byte stream. One reader and one writer at a time, as of the stream below."""

    def __init__(self, stream: ByteStream, context: ssl.SSLContext, *, server: bool, name: str | None = None) -> None:
        """`name`: the server's, as a client; it is sent, and the certificate is checked against it if the context checks."""
        self._stream = stream
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=server, server_hostname=name)
        self._sending = asyncio.Lock()  # what TLS has to send goes out in its order
        self._ended = False  # our direction

    async def handshake(self) -> None:
        """Raises OSError (ssl.SSLError is one)."""
        while True:
            try:
                self._tls.do_handshake()
            except ssl.SSLWantReadError:
                await self._flush()
                if not await self._fill():
                    raise ConnectionResetError("the connection ended within the TLS handshake") from None
            except ssl.SSLError:
                await self._flush()  # the alert that says why
                raise
            else:
                break
        await self._flush()

    async def read(self, limit: int = _PLAINTEXT) -> bytes:
        """As `ByteStream.read`; a connection that ends without a word of TLS ends like one with it."""
        while True:
            try:
                return self._tls.read(limit)
            except ssl.SSLWantReadError:
                await self._flush()
                if not await self._fill():
                    return b""
            except (ssl.SSLZeroReturnError, ssl.SSLEOFError):
                return b""

    async def write(self, data: bytes) -> None:
        """As `ByteStream.write`."""
        view = memoryview(data)
        while view:
            try:
                view = view[self._tls.write(view[:_PLAINTEXT]) :]
            except ssl.SSLWantReadError:  # TLS 1.2 renegotiates: the reader's next bytes go on with it
                await self._flush()
                if not await self._fill():
                    raise ConnectionResetError("the connection ended") from None
            await self._flush()

    async def write_eof(self) -> None:
        """close_notify: ends our direction only (RFC 8446 section 6.1); idempotent."""
        if not self._ended:
            self._ended = True
            with contextlib.suppress(ssl.SSLError):  # it is queued all the same, or there is nobody to tell
                self._tls.unwrap()
            await self._flush()

    def abort(self) -> None:
        """As `ByteStream.abort`."""
        self._stream.abort()

    async def aclose(self) -> None:
        """As `ByteStream.aclose`."""
        try:
            async with asyncio.timeout(1.0):
                await self.write_eof()
        except (OSError, TimeoutError):
            self._stream.abort()
        await self._stream.aclose()

    async def _fill(self) -> bool:
        """Read ciphertext; False at its end."""
        data = await self._stream.read(_CIPHERTEXT)
        if data:
            self._incoming.write(data)
        else:
            self._incoming.write_eof()
        return bool(data)

    async def _flush(self) -> None:
        if self._outgoing.pending:
            async with self._sending:
                while data := self._outgoing.read(_CIPHERTEXT):
                    await self._stream.write(data)

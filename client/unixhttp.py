"""One HTTP/1.1 request over a connected Unix socket.

`http.client` would cost more than the whole rest of a command's start-up (it brings email, ssl and urllib along), and the
daemon on the other side is known: one request per connection, JSON bodies.
"""

from __future__ import annotations

import _socket

from client.proxy import Failure

HEAD_MAX = 65536  # bytes of status line and headers
BODY_MAX = 64 << 20  # bytes of an answer's body
CHUNK = 65536

_SAFE = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~")


def quote(text: str) -> str:
    """Percent-encoding of everything that is not unreserved (RFC 3986, 2.3), as UTF-8."""
    return "".join(c if c in _SAFE else "".join(f"%{byte:02X}" for byte in c.encode()) for c in text)


def exchange(sock: _socket.socket, method: str, target: str, headers: dict[str, str], body: bytes | None) -> tuple[int, bytes]:
    """Send one request and return the answer's status and body. The connection is of no further use.

    Raises:
        Failure: ``timeout`` when the socket's timeout passes, ``unavailable`` when the connection breaks, ``internal`` for an
            answer that is not HTTP.
    """
    lines = [f"{method} {target} HTTP/1.1", "Host: gatewayd", "Connection: close"]
    if body is not None:
        lines += ["Content-Type: application/json", f"Content-Length: {len(body)}"]
    for name, value in headers.items():
        if not value.isprintable() or not value.isascii():
            raise Failure("usage", f"cannot send {name}: its value has characters that no header can carry")
        lines.append(f"{name}: {value}")
    try:
        sock.sendall("\r\n".join([*lines, "", ""]).encode() + (body or b""))
        return _answer(_Reader(sock))
    except TimeoutError:
        raise Failure("timeout", "the daemon did not answer in time") from None
    except OSError as exc:
        raise Failure("unavailable", f"the connection to the daemon broke: {exc.strerror or exc}") from exc


class _Reader:
    """Buffered reading with limits."""

    def __init__(self, sock: _socket.socket) -> None:
        self._sock = sock
        self._buffer = bytearray()  # received, not yet returned

    def _more(self) -> bool:
        data = self._sock.recv(CHUNK)
        self._buffer += data
        return bool(data)

    def until(self, mark: bytes) -> bytes:
        """Everything before `mark`, which is dropped."""
        while (end := self._buffer.find(mark)) < 0:
            if len(self._buffer) > HEAD_MAX:
                raise Failure("internal", "the daemon's answer makes no sense: its head is too long")
            if not self._more():
                raise Failure("unavailable", "the daemon closed the connection without an answer")
        return self.take(end, len(mark))

    def exactly(self, size: int) -> bytes:
        """`size` bytes."""
        if size > BODY_MAX:
            raise Failure("internal", f"the daemon's answer has {size} bytes, the limit is {BODY_MAX}")
        while len(self._buffer) < size:
            if not self._more():
                raise Failure("unavailable", "the daemon closed the connection in the middle of an answer")
        return self.take(size)

    def rest(self) -> bytes:
        """Everything up to the end of the connection."""
        while self._more():
            if len(self._buffer) > BODY_MAX:
                raise Failure("internal", f"the daemon's answer is longer than {BODY_MAX} bytes")
        return self.take(len(self._buffer))

    def take(self, size: int, skip: int = 0) -> bytes:
        data = bytes(self._buffer[:size])
        del self._buffer[: size + skip]
        return data


def _answer(reader: _Reader) -> tuple[int, bytes]:
    status = 100
    while 100 <= status < 200:  # interim answers (RFC 9110, 15.2)
        head = reader.until(b"\r\n\r\n").decode("latin-1").split("\r\n")
        version, _, rest = head[0].partition(" ")
        if not version.startswith("HTTP/1.") or not (rest[:3].isascii() and rest[:3].isdigit()):
            raise Failure("internal", "the daemon's answer makes no sense: it is not HTTP")
        status = int(rest[:3])
    headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:])}
    if status in (204, 304):
        return status, b""
    if headers.get("transfer-encoding", "").lower() == "chunked":
        return status, _chunks(reader)
    length = headers.get("content-length")
    if length is None:
        return status, reader.rest()
    if not (length.isascii() and length.isdigit()):
        raise Failure("internal", "the daemon's answer makes no sense: its length is not a number")
    return status, reader.exactly(int(length))


def _chunks(reader: _Reader) -> bytes:
    """A chunked body (RFC 9112, 7.1); trailers are read and dropped."""
    body = bytearray()
    while True:
        try:
            size = int(reader.until(b"\r\n").partition(b";")[0], 16)
        except ValueError:
            raise Failure("internal", "the daemon's answer makes no sense: a chunk without a size") from None
        if size < 0 or len(body) + size > BODY_MAX:
            raise Failure("internal", f"the daemon's answer is longer than {BODY_MAX} bytes")
        if size == 0:
            while reader.until(b"\r\n"):
                pass
            return bytes(body)
        body += reader.exactly(size)
        reader.until(b"\r\n")

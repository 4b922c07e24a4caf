"""Docker's Engine API on its Unix socket: one connection a request, the standard library only.

Paths carry no version, so the daemon answers with its own newest one; only fields that every version since 1.40 knows are used.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import re
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any
from urllib.parse import quote, urlencode

from gatewayd.local.runtime.base import RuntimeFailure

log = logging.getLogger(__name__)

DEADLINE = 30.0  # seconds for an ordinary request
_MAX_HEAD = 64 * 1024  # bytes of a response's head
_MAX_BODY = 16 * 1024 * 1024  # bytes of a response's body: the largest is a list of images
_CHUNK = 256 * 1024  # bytes a read
_HOST_PATH = re.compile(r"/[^\s:\"',)]+")  # what must not reach a user of the service


class DockerError(RuntimeFailure):
    """The daemon answered with an error."""

    def __init__(self, what: str, status: int, message: str) -> None:
        super().__init__(f"Docker refuses to {what}: {_HOST_PATH.sub('…', printable(message))}"[:500])
        self.status = status  # of HTTP: 404 no such thing, 409 not in this state, 304 nothing to do


class DockerApi:
    """Requests to one daemon. Holds no connection between them."""

    def __init__(self, socket_path: Path) -> None:
        self._path = socket_path  # of the daemon's Unix socket

    async def request(
        self,
        what: str,
        method: str,
        path: str,
        *,
        query: Mapping[str, str] | None = None,
        body: Any = None,
        upload: IO[bytes] | None = None,
        deadline: float | None = DEADLINE,
    ) -> Any:
        """The decoded JSON answer; None when it is empty; a list for a stream of objects.

        Args:
            what: the purpose, for messages: "start the sandbox".
            path: below the root, its parts already quoted.
            body: sent as JSON.
            upload: sent as a tar archive, from its start to its end.
            deadline: seconds for all of it; None for as long as it takes.

        Raises:
            DockerError: the daemon refused.
            RuntimeFailure: no daemon, no answer in time, or one that makes no sense.
        """
        try:
            async with asyncio.timeout(deadline):
                sock, status, head, data = await self._exchange(method, path, query, body, upload, {"Connection": "close"})
                with sock:
                    data = await self._rest(sock, data)
            return self._decode(what, status, head, data)
        except TimeoutError:
            raise RuntimeFailure(f"cannot {what}: Docker did not answer within {deadline or 0:.0f} s") from None
        except (OSError, ValueError) as exc:
            raise RuntimeFailure(f"cannot {what}: Docker cannot be used: {_reason(exc)}") from exc

    async def hijack(
        self, what: str, path: str, *, query: Mapping[str, str] | None = None, body: Any = None
    ) -> tuple[socket.socket, bytes]:
        """A POST that turns its connection into a byte stream: the socket (non-blocking), and what arrived on it already.

        Raises:
            DockerError, RuntimeFailure: as `request`.
        """
        try:
            async with asyncio.timeout(DEADLINE):
                headers = {"Connection": "Upgrade", "Upgrade": "tcp"}
                sock, status, head, data = await self._exchange("POST", path, query, body, None, headers)
                if status in (101, 200):
                    return sock, data
                with sock:  # refused: an ordinary answer, on a connection that may stay open
                    if "content-length" in head:
                        wanted = min(int(head["content-length"]), _MAX_BODY)
                        while len(data) < wanted and (more := await asyncio.get_running_loop().sock_recv(sock, _CHUNK)):
                            data += more
                    self._decode(what, status, head, data)
                raise RuntimeFailure(f"cannot {what}: Docker answers {status}")
        except TimeoutError:
            raise RuntimeFailure(f"cannot {what}: Docker did not answer within {DEADLINE:.0f} s") from None
        except (OSError, ValueError) as exc:
            raise RuntimeFailure(f"cannot {what}: Docker cannot be used: {_reason(exc)}") from exc

    async def _exchange(
        self,
        method: str,
        path: str,
        query: Mapping[str, str] | None,
        body: Any,
        upload: IO[bytes] | None,
        headers: Mapping[str, str],
    ) -> tuple[socket.socket, int, dict[str, str], bytes]:
        """Send a request; returns the connection, status, headers (names in lower case) and what came of the body."""
        loop = asyncio.get_running_loop()
        content = b"" if body is None else json.dumps(body).encode("utf-8")
        size, kind = len(content), "application/json"
        if upload is not None:
            size, kind = upload.seek(0, 2), "application/x-tar"
            upload.seek(0)
        target = path + ("?" + urlencode(query) if query else "")
        lines = [f"{method} {target} HTTP/1.1", "Host: docker", f"Content-Type: {kind}", f"Content-Length: {size}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.setblocking(False)
            await loop.sock_connect(sock, str(self._path))
            await loop.sock_sendall(sock, "\r\n".join([*lines, "", ""]).encode("ascii") + content)
            while upload is not None and (chunk := upload.read(_CHUNK)):
                await loop.sock_sendall(sock, chunk)
            status, head, data = await self._head(sock)
        except BaseException:
            sock.close()
            raise
        return sock, status, head, data

    @staticmethod
    async def _head(sock: socket.socket) -> tuple[int, dict[str, str], bytes]:
        loop = asyncio.get_running_loop()
        data = b""
        while (end := data.find(b"\r\n\r\n")) < 0:
            if len(data) > _MAX_HEAD:
                raise ValueError("its answer has no end")
            chunk = await loop.sock_recv(sock, 4096)
            if not chunk:
                raise ValueError("it closed the connection")
            data += chunk
        first, *rest = data[:end].decode("latin-1").split("\r\n")
        words = first.split(" ", 2)
        if len(words) < 2 or not words[0].startswith("HTTP/1.") or not words[1].isdecimal():
            raise ValueError("its answer is not HTTP")
        pairs = (line.partition(":") for line in rest)
        return int(words[1]), {name.strip().lower(): value.strip() for name, _, value in pairs}, data[end + 4 :]

    @staticmethod
    async def _rest(sock: socket.socket, data: bytes) -> bytes:
        """Everything until the daemon closes the connection."""
        loop = asyncio.get_running_loop()
        parts = [data]
        size = len(data)
        while chunk := await loop.sock_recv(sock, _CHUNK):
            parts.append(chunk)
            size += len(chunk)
            if size > _MAX_BODY:
                raise ValueError("its answer is too large")
        return b"".join(parts)

    @staticmethod
    def _decode(what: str, status: int, head: Mapping[str, str], data: bytes) -> Any:
        if head.get("transfer-encoding", "").lower() == "chunked":
            data = dechunk(data)
        values = objects(data.decode("utf-8", "replace"))
        if status == 304 or status >= 400:
            message = values[0].get("message") if values and isinstance(values[0], dict) else None
            log.debug("docker: %s: HTTP %d: %s", what, status, printable(str(message)))
            raise DockerError(what, status, str(message or f"HTTP {status}"))
        for value in values:  # a stream of progress ends with its error
            if isinstance(value, dict) and isinstance(value.get("error"), str):
                raise DockerError(what, status, value["error"])
        return values[0] if len(values) == 1 else values or None


def dechunk(data: bytes) -> bytes:
    """The body of a chunked message (RFC 9112, 7.1). Raises ValueError when it is cut short."""
    parts: list[bytes] = []
    at = 0
    while True:
        end = data.find(b"\r\n", at)
        if end < 0:
            raise ValueError("its answer was cut short")
        size = int(data[at:end].split(b";")[0], 16)
        if size == 0:
            return b"".join(parts)
        chunk = data[end + 2 : end + 2 + size]
        if len(chunk) < size:
            raise ValueError("its answer was cut short")
        parts.append(chunk)
        at = end + 2 + size + 2


def objects(text: str) -> list[Any]:
    """The JSON values in `text`, one after the other. Raises ValueError."""
    decoder = json.JSONDecoder()
    values = []
    text = text.strip()
    while text:
        value, end = decoder.raw_decode(text)
        values.append(value)
        text = text[end:].lstrip()
    return values


def part(name: str) -> str:
    """One part of a path, quoted."""
    return quote(name, safe="")


def printable(text: str) -> str:
    """On one line and without control characters: the daemon repeats what a sandbox says."""
    return "".join(char if char.isprintable() else " " for char in text).strip()[:1000]


def _reason(exc: Exception) -> str:
    return (exc.strerror or type(exc).__name__) if isinstance(exc, OSError) else printable(str(exc))


def close(sock: socket.socket) -> None:
    """Close a connection whose end nobody needs to hear about."""
    with contextlib.suppress(OSError):
        sock.close()

"""HTTP answers, whole and byte by byte, and what is no answer."""

from __future__ import annotations

import _socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import unquote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from client.proxy import Failure
from client.unixhttp import BODY_MAX, exchange, quote

OK = b"HTTP/1.1 200 OK\r\n"


@contextmanager
def peer(answer: bytes, *, step: int = 0, hold: bool = False) -> Iterator[tuple[_socket.socket, list[bytes]]]:
    """A connection whose other end reads a request, answers (`step` bytes at a time) and closes (unless `hold`)."""
    ours, theirs = _socket.socketpair()
    ours.settimeout(10)
    seen: list[bytes] = []
    release = threading.Event()

    def serve() -> None:
        data = b""
        while b"\r\n\r\n" not in data:
            data += theirs.recv(65536)
        head, _, body = data.partition(b"\r\n\r\n")
        length = next((int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.startswith(b"Content-Length")), 0)
        while len(body) < length:
            body += theirs.recv(65536)
        seen.append(head + b"\r\n\r\n" + body)
        try:
            for start in range(0, len(answer), step or len(answer) or 1):
                theirs.sendall(answer[start : start + (step or len(answer))])
        except OSError:
            pass  # the reader has seen enough
        if hold:
            release.wait(10)
        theirs.close()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield ours, seen
    finally:
        release.set()
        ours.close()
        thread.join(10)
        assert not thread.is_alive()


ANSWERS = {
    "length": OK + b"Content-Length: 5\r\n\r\nhello",
    "until the end": OK + b"X: y\r\n\r\nhello",
    "chunked": OK + b"Transfer-Encoding: chunked\r\n\r\n2\r\nhe\r\n3;ext=1\r\nllo\r\n0\r\nTrailer: x\r\n\r\n",
    "interim": b"HTTP/1.1 100 Continue\r\n\r\n" + OK + b"content-length: 5\r\n\r\nhello",
}


@pytest.mark.parametrize("step", [0, 1])
@pytest.mark.parametrize("answer", ANSWERS.values(), ids=ANSWERS)
def test_answers(answer: bytes, step: int) -> None:
    with peer(answer, step=step) as (sock, _):
        assert exchange(sock, "GET", "/", {}, None) == (200, b"hello")


def test_what_follows_a_complete_answer_is_not_waited_for() -> None:
    with peer(ANSWERS["length"] + b"trailing", hold=True) as (sock, _):
        assert exchange(sock, "GET", "/", {}, None) == (200, b"hello")


def test_no_content() -> None:
    with peer(b"HTTP/1.1 204 No Content\r\n\r\n", hold=True) as (sock, _):
        assert exchange(sock, "DELETE", "/x", {}, None) == (204, b"")


def test_the_request() -> None:
    with peer(ANSWERS["length"]) as (sock, seen):
        exchange(sock, "POST", "/v1/sandboxes?a=b", {"X-Gatewayd-Profile": "work"}, b'{"a": 1}')
    head, _, body = seen[0].partition(b"\r\n\r\n")
    assert head.split(b"\r\n") == [
        b"POST /v1/sandboxes?a=b HTTP/1.1",
        b"Host: gatewayd",
        b"Connection: close",
        b"Content-Type: application/json",
        b"Content-Length: 8",
        b"X-Gatewayd-Profile: work",
    ]
    assert body == b'{"a": 1}'


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (b"", "unavailable"),
        (b"HTTP/1.1 200", "unavailable"),
        (OK + b"Content-Length: 5\r\n\r\nhell", "unavailable"),
        (OK + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhel", "unavailable"),
        (OK + b"Transfer-Encoding: chunked\r\n\r\nx\r\n\r\n", "internal"),
        (OK + b"Transfer-Encoding: chunked\r\n\r\n-1\r\n\r\n", "internal"),
        (OK + b"Transfer-Encoding: chunked\r\n\r\nffffffffff\r\n\r\n", "internal"),
        (OK + b"Content-Length: x\r\n\r\n", "internal"),
        (OK + b"Content-Length: -1\r\n\r\n", "internal"),
        (OK + b"Content-Length: %d\r\n\r\n" % (BODY_MAX + 1), "internal"),
        (b"SSH-2.0-OpenSSH_9.2\r\n\r\n", "internal"),
        (b"HTTP/1.1 abc\r\n\r\n", "internal"),
        (b"x" * 200_000, "internal"),
    ],
)
def test_what_is_no_answer(answer: bytes, kind: str) -> None:
    with peer(answer) as (sock, _), pytest.raises(Failure) as caught:
        exchange(sock, "GET", "/", {}, None)
    assert caught.value.kind == kind


def test_silence_ends() -> None:
    with peer(OK, hold=True) as (sock, _):
        sock.settimeout(0.05)
        with pytest.raises(Failure) as caught:
            exchange(sock, "GET", "/", {}, None)
    assert caught.value.kind == "timeout"


@pytest.mark.parametrize("value", ["a\r\nX-Injected: 1", "é", "\x7f"])
def test_a_header_value_cannot_become_a_header(value: str) -> None:
    ours, theirs = _socket.socketpair()
    try:
        with pytest.raises(Failure, match="cannot send X-Gatewayd-Api-Key") as caught:
            exchange(ours, "GET", "/", {"X-Gatewayd-Api-Key": value}, None)
        assert value not in caught.value.message
    finally:
        ours.close()
        theirs.close()


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"])))
def test_quote(text: str) -> None:
    quoted = quote(text)
    assert unquote(quoted, errors="strict") == text
    assert quoted.isascii()
    assert not set(quoted) & set(" /?#&=+\r\n")

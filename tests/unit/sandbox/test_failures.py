from __future__ import annotations

import json
import socket
import ssl

import pytest

from gatewayd.config import Profile
from gatewayd.sandbox.failures import connection_failure, origin, parse_envelope, parse_retry_after, refusal

PROFILE = Profile("work", "https://ls.example.com", "secret-key")
URL = "https://user:pw@ls.example.com:8443/path?token=abc"


def chained(cause: BaseException) -> Exception:
    try:
        try:
            raise cause
        except BaseException as exc:
            raise RuntimeError("wrapped") from exc
    except RuntimeError as exc:
        return exc


@pytest.mark.parametrize(
    ("cause", "kind", "text"),
    [
        (ConnectionRefusedError(111, "x"), "unavailable", "refuses connections"),
        (socket.gaierror(-2, "x"), "unavailable", "unknown host ls.example.com"),
        (TimeoutError(), "timeout", "does not answer in time"),
        (ssl.SSLCertVerificationError(1, "x"), "unavailable", "certificate that cannot be verified"),
        (ssl.SSLError(1, "WRONG_VERSION"), "unavailable", "does not speak TLS"),
        (ConnectionResetError(), "unavailable", "closed the connection"),
        (EOFError(), "unavailable", "closed the connection"),
        (OSError(113, "No route to host"), "unavailable", "No route to host"),
        (ValueError("odd\x1b[31m\n"), "unavailable", "wrapped"),
    ],
)
def test_connection_failures(cause: BaseException, kind: str, text: str) -> None:
    error = connection_failure(chained(cause), action="get it", url=URL, profile=PROFILE)
    assert error.kind == kind
    assert error.message.startswith("cannot get it: ")
    assert text in error.message
    assert error.hint
    assert "pw" not in error.message
    assert "token" not in error.message
    assert error.message.isprintable()


def test_a_group_is_looked_into() -> None:
    group = ExceptionGroup("both", [OSError(101, "Network is unreachable"), ConnectionRefusedError(111, "refused")])
    assert "refuses connections" in connection_failure(group, action="x", url=URL, profile=PROFILE).message


def body(kind: str, message: str, **more: str) -> bytes:
    return json.dumps({"detail": {"error": kind, "message": message, **more}}).encode()


@pytest.mark.parametrize(
    ("status", "content", "kind", "text"),
    [
        (400, body("NotReady", "sandbox is stopping"), "unavailable", "sandbox is stopping"),
        (400, body("InvalidRequest", "bad"), "invalid", "bad"),
        (401, b"", "auth", "refuses the API key (HTTP 401)"),
        (403, b"<html>", "auth", "refuses the API key (HTTP 403)"),
        (403, body("Forbidden", "no quota for you"), "auth", "no quota for you"),
        (404, body("NotFound", "whatever"), "not_found", "no sandbox named 'box'"),
        (408, body("Timeout", "not ready"), "timeout", "not ready"),
        (409, body("Conflict", "name is taken"), "conflict", "name is taken"),
        (
            422,
            b'{"detail": [{"loc": ["body", "vcpus"], "msg": "too many", "type": "value_error"}]}',
            "invalid",
            "vcpus: too many",
        ),
        (429, body("RateLimit", "slow"), "unavailable", "limits the rate"),
        (500, b"oops", "unavailable", "HTTP 500"),
        (502, b"<html>bad gateway</html>", "unavailable", "HTTP 502"),
        (503, body("Unschedulable", "no room", error_id="e-1"), "unavailable", "no room (error_id e-1)"),
        (504, b"", "timeout", "HTTP 504"),
        (418, b"", "failed", "HTTP 418"),
        (307, b"", "config", "redirects to https://other"),
    ],
)
def test_refusals(status: int, content: bytes, kind: str, text: str) -> None:
    error = refusal(status, content, action="get it", url=URL, profile=PROFILE, sandbox="box", location="https://other")
    assert (error.status, error.kind) == (status, kind)
    assert text in error.message
    assert "secret-key" not in error.message + error.hint


def test_404_without_a_sandbox_is_a_wrong_endpoint() -> None:
    error = refusal(404, b"", action="list", url=URL, profile=PROFILE)
    assert error.kind == "unavailable"
    assert "endpoint" in error.hint


@pytest.mark.parametrize("profile", ["env", "local", "work"])
def test_the_hint_says_where_the_key_comes_from(profile: str) -> None:
    error = refusal(401, b"", action="x", url=URL, profile=Profile(profile, "https://e"))
    assert {"env": "LANGSMITH_API_KEY", "local": "sandbox down", "work": "'work'"}[profile] in error.hint


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", ("", "")),
        (b"[", ("", "")),
        (b"[" * 70000, ("", "")),
        (b"3", ("", "")),
        (b'{"detail": 3}', ("", "")),
        (b'{"detail": "plain\\u001b[2J"}', ("", "plain [2J")),
        (b'{"detail": [3, {"loc": 3, "msg": null}]}', ("", "invalid value")),
        (body("T", "m"), ("T", "m")),
        (body("T", "m" * 1000), ("T", "m" * 499 + "…")),
    ],
)
def test_envelopes(content: bytes, expected: tuple[str, str]) -> None:
    assert parse_envelope(content) == expected


def test_retry_after() -> None:
    assert parse_retry_after("2.5") == 2.5
    assert all(parse_retry_after(text) is None for text in ("", "soon", "-1", "nan", "inf", "Wed, 21 Oct 2015 07:28:00 GMT"))


def test_origin() -> None:
    assert origin(URL) == "https://ls.example.com:8443"
    assert origin("ws://[::1]:80/x") == "ws://[::1]:80"

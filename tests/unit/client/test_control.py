"""Requests and streams against a real server on real Unix sockets."""

from __future__ import annotations

import socket
from typing import Any

import pytest

from client.control import Control, NotRunning
from client.proxy import Failure
from gatewayd import api

from .conftest import Daemon


def test_a_request(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    daemon.answer("POST", "/sandboxes", {"name": "demo"}, 201)
    assert Control("work").request("POST", "/sandboxes", {"name": "demo"}, {"a b": None, "c": "d&e"}) == {"name": "demo"}
    method, target, body, headers = daemon.requests[0]
    assert (method, target, body) == ("POST", "/v1/sandboxes?c=d%26e", {"name": "demo"})
    assert headers["x-gatewayd-profile"] == "work"
    assert "x-gatewayd-api-key" not in headers


def test_the_environment_s_key_goes_along(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LANGSMITH_API_KEY", "k3y")
    monkeypatch.setenv("LANGSMITH_ENDPOINT", "https://example.com")
    daemon.answer("GET", "/sandboxes", {"sandboxes": []})
    Control().request("GET", "/sandboxes")
    Control("local").request("GET", "/sandboxes")
    assert daemon.requests[0][3]["x-gatewayd-api-key"] == "k3y"
    assert daemon.requests[0][3]["x-gatewayd-endpoint"] == "https://example.com"
    assert "x-gatewayd-api-key" not in daemon.requests[1][3]


def test_no_content(daemon: Daemon) -> None:
    daemon.answer("DELETE", "/sandboxes/demo", None, 204)
    assert Control().sandbox("DELETE", "demo") is None


def test_errors_keep_their_kind(daemon: Daemon) -> None:
    daemon.error("POST", "/sandboxes", 409, "conflict", "cannot create demo: the name is taken", "choose another")
    with pytest.raises(Failure) as caught:
        Control().request("POST", "/sandboxes", {})
    assert (caught.value.kind, caught.value.message, caught.value.hint) == (
        "conflict",
        "cannot create demo: the name is taken",
        "choose another",
    )


@pytest.mark.parametrize(
    "body", [None, [], "x", {"error": "x"}, {"error": {"kind": 7}}, {"error": {"kind": "nonsense", "message": ""}}]
)
def test_errors_that_say_nothing(daemon: Daemon, body: Any) -> None:
    daemon.answer("GET", "/status", body, 500)
    with pytest.raises(Failure, match="status 500") as caught:
        Control().request("GET", "/status")
    assert caught.value.kind == "internal"


def test_the_nearest_name(daemon: Daemon) -> None:
    daemon.answer("GET", "/sandboxes", {"sandboxes": [{"name": "demo"}, {"name": "build"}]})
    for asked, hint in (("dmeo", "did you mean 'demo'?"), ("zzz", "`sandbox list` shows the sandboxes there are")):
        with pytest.raises(Failure) as caught:
            Control().sandbox("GET", asked)
        assert caught.value.hint == hint
    daemon.answer("GET", "/sandboxes", {"sandboxes": []})
    with pytest.raises(Failure) as caught:
        Control().sandbox("GET", "demo")
    assert "there are no sandboxes" in caught.value.hint


def test_a_failing_list_does_not_hide_the_failure(daemon: Daemon) -> None:
    daemon.error("GET", "/sandboxes", 503, "unavailable", "the service is away")
    with pytest.raises(Failure, match="there is no sandbox 'demo'") as caught:
        Control().sandbox("GET", "demo")
    assert caught.value.hint == ""


def test_not_running(home: object) -> None:
    with pytest.raises(NotRunning):
        Control(start=False).request("GET", "/status")


def test_a_stream_begins_right_after_its_line(daemon: Daemon) -> None:
    def serve(request: dict[str, Any], sock: socket.socket) -> None:
        sock.sendall(b'{"notice": "starting demo"}\n{"ok": {"port": 5432}}\n{"not": "ours"}\nbytes')

    daemon.script = serve
    notices: list[str] = []
    sock, ok = Control("work").connect(api.OP_FORWARD, "demo", {"remote_port": 1}, notices.append)
    try:
        assert ok == {"port": 5432}
        assert notices == ["starting demo"]
        data = b""
        while chunk := sock.recv(100):
            data += chunk
        assert data == b'{"not": "ours"}\nbytes'
    finally:
        sock.close()
    assert daemon.lines == [{"op": "forward", "sandbox": "demo", "remote_port": 1, "profile": "work"}]


@pytest.mark.parametrize(
    ("reply", "kind", "says"),
    [
        (b'{"error": {"kind": "refused", "message": "nothing listens on port 1", "hint": "h"}}\n', "refused", "nothing listens"),
        (b"", "unavailable", "without an answer"),
        (b'{"ok": ', "unavailable", "without an answer"),
        (b'{"ok": 1}\n', "internal", "neither ok nor error"),
        (b"[]\n", "internal", "not a JSON line"),
        (b"\xff\n", "internal", "not a JSON line"),
        (b"x" * 100_000, "internal", "longer than"),
        (b'{"notice": "x"}\n' * 1001, "internal", "more than 1000 notices"),
    ],
)
def test_replies_that_are_no_stream(daemon: Daemon, reply: bytes, kind: str, says: str) -> None:
    def serve(request: dict[str, Any], sock: socket.socket) -> None:
        sock.sendall(reply)

    daemon.script = serve
    with pytest.raises(Failure, match=says) as caught:
        Control().connect(api.OP_CONNECT, "demo", {"port": 1}, lambda text: None)
    assert caught.value.kind == kind


def test_a_request_that_is_too_long(daemon: Daemon) -> None:
    with pytest.raises(Failure, match="the limit is 65536") as caught:
        Control().connect(api.OP_EXEC, "demo", {"argv": ["x" * 70_000]}, lambda text: None)
    assert caught.value.kind == "usage"

"""Lists and detached starts, over guests that never come to an end."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from typing import Any

import pytest
from click.testing import CliRunner

from client import guestchannel, guestprocess
from client.cli import cli
from client.control import Control
from client.guestchannel import Channel
from client.proxy import Failure
from gatewayd.api import ErrorKind
from gatewayd.guest import wire
from gatewayd.guest.events import Opened

from .conftest import DEADLINE, Daemon

ITEM = wire.encode_frame(wire.Kind.ITEM, wire.encode_fields([("id", b"a7" * 16), ("kind", b"listen-tcp")]))
OPENED = wire.encode_frame(wire.Kind.OPENED)


def serve(daemon: Daemon, frames: bytes, again: bytes = b"") -> None:
    """A guest that says `frames`, then `again` ever and ever, until the client has gone."""

    def script(request: dict[str, Any], sock: socket.socket) -> None:
        with contextlib.suppress(ConnectionError):
            sock.sendall(b'{"ok":{"status":0,"received":0,"base":0,"credit":0}}\n' + frames)
            sock.settimeout(0.02)
            end = time.monotonic() + DEADLINE
            while time.monotonic() < end:
                with contextlib.suppress(TimeoutError):
                    if not sock.recv(65536):
                        return
                    continue
                sock.sendall(again)

    daemon.script = script


@pytest.mark.parametrize(("frames", "again"), [(b"", b""), (OPENED, ITEM)], ids=["silent", "endless"])
def test_a_list_that_does_not_end(daemon: Daemon, monkeypatch: pytest.MonkeyPatch, frames: bytes, again: bytes) -> None:
    monkeypatch.setattr(guestchannel, "EVENTS_PATIENCE", 0.3)
    serve(daemon, frames, again)
    with pytest.raises(Failure, match=r"within 0\.3 s") as caught:
        guestprocess.sessions(Control(), "demo")
    assert caught.value.kind == ErrorKind.TIMEOUT


def test_a_daemon_that_gives_no_answer_to_a_list(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    def silent(request: dict[str, Any], sock: socket.socket) -> None:
        assert sock.recv(1) == b""

    monkeypatch.setattr(guestchannel, "EVENTS_PATIENCE", 0.3)
    daemon.script = silent
    with pytest.raises(Failure, match="no answer from sandbox 'demo'") as caught:
        guestprocess.sessions(Control(), "demo")
    assert caught.value.kind == ErrorKind.TIMEOUT


def test_every_item_counts(daemon: Daemon) -> None:
    """Not only those that are shown."""
    serve(daemon, OPENED + ITEM * (guestprocess.ITEMS_MAX + 1))
    with pytest.raises(Failure, match=f"more than {guestprocess.ITEMS_MAX} sessions"):
        guestprocess.sessions(Control(), "demo")


def test_a_start_has_its_time_from_the_answer_on(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    """However long the sandbox took to start."""
    monkeypatch.setattr(guestchannel, "EVENTS_PATIENCE", 0.3)

    def script(request: dict[str, Any], sock: socket.socket) -> None:
        with contextlib.suppress(ConnectionError):
            time.sleep(0.6)  # the sandbox starts
            sock.sendall(b'{"ok":{"status":0,"received":0,"base":0,"credit":0}}\n' + OPENED)
            while sock.recv(65536):
                pass

    daemon.script = script
    channel = Channel(Control(), "demo", guestprocess.process(argv=["true"]), wake=True, linger=10)
    events = channel.events()
    assert isinstance(next(events), Opened)
    with pytest.raises(Failure, match=r"within 0\.3 s") as caught:
        list(events)
    assert caught.value.kind == ErrorKind.TIMEOUT
    channel.close()


def test_what_was_not_started_in_time_is_ended(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guestchannel, "EVENTS_PATIENCE", 0.3)
    seen: list[int] = []
    done = threading.Event()

    def script(request: dict[str, Any], sock: socket.socket) -> None:
        decoder = wire.FrameDecoder()
        with contextlib.suppress(ConnectionError):
            sock.sendall(b'{"ok":{"status":0,"received":0,"base":0,"credit":0}}\n')
            while data := sock.recv(65536):
                seen.extend(kind for kind, _ in decoder.feed(data))
        done.set()

    daemon.script = script
    result = CliRunner().invoke(cli, ["exec", "demo", "--detach", "--", "true"])
    assert result.exit_code == 75
    assert done.wait(DEADLINE)
    assert seen == [wire.Kind.OPEN, wire.Kind.INPUT_EOF, wire.Kind.CLOSE]

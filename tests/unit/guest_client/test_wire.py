from __future__ import annotations

import subprocess
import sys

import pytest

from gatewayd.guest import wire
from gatewayd.guest.wire import Answer, FrameDecoder, GuestProtocolError, Kind

TOKEN, ID = bytes(range(32)), bytes(range(16))


def test_preface() -> None:
    data = wire.encode_preface(TOKEN, ID, wire.Mode.RESUME, 1 << 40)
    assert data == b"GWG1" + TOKEN + ID + b"\x01" + (1 << 40).to_bytes(8, "big")
    assert wire.decode_preface(data) == (TOKEN, ID, wire.Mode.RESUME, 1 << 40)


@pytest.mark.parametrize("data", [b"", b"GWG1", b"GWG2" + bytes(57), b"GWG1" + bytes(58)])
def test_prefaces_that_are_none(data: bytes) -> None:
    with pytest.raises(GuestProtocolError):
        wire.decode_preface(data)


@pytest.mark.parametrize(("token", "session"), [(b"", ID), (TOKEN[1:], ID), (TOKEN, ID + b"x")])
def test_tokens_and_ids_of_another_size(token: bytes, session: bytes) -> None:
    with pytest.raises(ValueError, match="32 bytes"):
        wire.encode_preface(token, session, 0, 0)


def test_answer() -> None:
    answer = Answer(0, 5, 1 << 40, 262144)
    data = wire.encode_answer(answer)
    assert data == b"\0" + (5).to_bytes(8, "big") + (1 << 40).to_bytes(8, "big") + b"\0\4\0\0"
    assert wire.decode_answer(data) == answer
    assert answer != Answer(0, 5, 1 << 40, 262143)


@pytest.mark.parametrize("data", [b"", bytes(20), bytes(22), b"\5" + bytes(20), b"\xff" * 21])
def test_answers_that_are_none(data: bytes) -> None:
    with pytest.raises(GuestProtocolError):
        wire.decode_answer(data)


def test_the_longest_frame_and_one_that_is_longer() -> None:
    payload = bytes(wire.PAYLOAD_MAX)
    frame = wire.encode_frame(Kind.OUTPUT, payload)
    decoder = FrameDecoder()
    assert decoder.feed(frame[:100_000]) == []
    assert decoder.feed(frame[100_000:] + b"\x80") == [(Kind.OUTPUT, payload)]
    with pytest.raises(ValueError, match="262145 bytes"):
        wire.encode_frame(Kind.INPUT, payload + b"x")
    with pytest.raises(GuestProtocolError, match="262145 bytes"):
        FrameDecoder().feed(b"\x42\0\4\0\1")


@pytest.mark.parametrize(
    "data",
    [
        b"\1",
        b"\1a\0\0\0",
        b"\1a\0\0\0\1",
        b"\5a\0\0\0\0",
        b"\0\0\0\0\0",
        b"\1\xff\0\0\0\0",
        b"\1a\xff\xff\xff\xff",
    ],
)
def test_fields_that_are_none(data: bytes) -> None:
    with pytest.raises(GuestProtocolError):
        wire.decode_fields(data)


@pytest.mark.parametrize("key", ["", "x" * 256, "ä"])
def test_keys_that_are_none(key: str) -> None:
    with pytest.raises(ValueError):
        wire.encode_fields([(key, b"")])


def test_numbers() -> None:
    assert wire.number(b"65535", 65535) == 65535
    for value in (b"", b"-1", b"+1", b"1_0", b" 1", b"65536", b"9" * 1000, "٣".encode()):
        with pytest.raises(GuestProtocolError):
            wire.number(value, 65535)


def test_text_is_one_line_without_control_characters() -> None:
    assert wire.text(b"a\nb\x1b[31mc\xff") == "a b [31mc\ufffd"
    assert wire.text(b"x" * 1000, 10) == "x" * 9 + "…"


def test_importing_costs_the_command_next_to_nothing() -> None:
    script = "import sys; before = set(sys.modules); import gatewayd.guest.session; print(*set(sys.modules) - before)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) <= {
        "gatewayd",
        "gatewayd.guest",
        "gatewayd.guest.wire",
        "gatewayd.guest.events",
        "gatewayd.guest.session",
        "__future__",
        "struct",
        "_struct",
        "collections",
        "_collections",
        "operator",
        "_operator",
        "keyword",
        "reprlib",
        "itertools",
        "functools",
        "_functools",
        "types",
    }

"""Docker's stream frames and our records in them: whole, byte by byte, and wrong."""

from __future__ import annotations

import pytest

from gatewayd.local.runtime import docker_guest
from gatewayd.local.runtime.docker_api import dechunk, objects
from gatewayd.local.runtime.docker_wire import STDERR, STDOUT, Frames, Record, Records, WireError, new_token

TOKEN = new_token()
RECORD = b"\x1e\xff" + TOKEN.encode() + b" exit 3\x1e"


def frame(stream: int, data: bytes) -> bytes:
    return bytes([stream, 0, 0, 0]) + len(data).to_bytes(4, "big") + data


def parts(data: bytes, size: int) -> list[bytes]:
    return [data[at : at + size] for at in range(0, len(data), size)]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 8, 9, 1000])
def test_frames_come_apart_wherever_they_are_cut(size: int) -> None:
    frames = Frames()
    streams = {0: b"", STDOUT: b"", STDERR: b""}
    wire = frame(1, b"one") + frame(2, b"") + frame(2, b"err" * 50) + frame(0, b"x") + frame(1, b"two")
    for part in parts(wire, size):
        for stream, data in frames.feed(part):
            streams[stream] += data
    assert streams == {0: b"x", STDOUT: b"onetwo", STDERR: b"err" * 50}


@pytest.mark.parametrize("wire", [b"\x03" + bytes(7), b"\x01\x00\x00\x01" + bytes(4), b"unable to find user"])
def test_what_is_no_frame_is_an_error(wire: bytes) -> None:
    with pytest.raises(WireError):
        list(Frames().feed(wire))


@pytest.mark.parametrize("size", [1, 2, 5, 34, 35, 36, 1000])
def test_records_are_found_wherever_they_are_cut(size: int) -> None:
    records = Records(TOKEN)
    output = b""
    found = []
    for part in parts(b"a\x1eb\x1e\xff" + RECORD + b"c" + RECORD + b"\x1e\xff\x1e", size):
        for piece in records.feed(part):
            if isinstance(piece, Record):
                found.append((output, piece.text))
            else:
                output += piece
    before = b"a\x1eb\x1e\xff"
    assert found == [(before, "exit 3"), (before + b"c", "exit 3")]
    assert output + records.flush() == before + b"c\x1e\xff\x1e"


def test_only_what_may_begin_a_record_is_held_back() -> None:
    records = Records(TOKEN)
    assert list(records.feed(b"text\x1e")) == [b"text"]
    assert records.holding
    assert list(records.feed(b"x")) == [b"\x1ex"]
    assert not records.holding


def test_another_processs_record_is_output() -> None:
    foreign = b"\x1e\xff" + new_token().encode() + b" exit 0\x1e"
    records = Records(TOKEN)
    assert b"".join(piece for piece in records.feed(foreign) if isinstance(piece, bytes)) + records.flush() == foreign


def test_an_endless_record_is_output() -> None:
    data = RECORD[:-1] + b"x" * 20_000
    records = Records(TOKEN)
    out = b"".join(piece for part in parts(data, 100) for piece in records.feed(part) if isinstance(piece, bytes))
    assert out + records.flush() == data
    assert len(records.flush()) == 0


def test_paths_are_escaped_to_plain_characters() -> None:
    assert docker_guest.escape("/a b'\n\\\udcff") == "/a\\0040b\\0047\\0012\\0134\\0377"
    with pytest.raises(ValueError, match="NUL"):
        docker_guest.escape("a\0b")
    assert docker_guest.unescape("2f61ff") == b"/a\xff"
    for digits in ("", "61", "2f00", "2f6", "/etc"):
        with pytest.raises(ValueError):
            docker_guest.unescape(digits)


def test_bodies_are_taken_apart() -> None:
    assert dechunk(b"3\r\nabc\r\n1;x=y\r\nd\r\n0\r\n\r\n") == b"abcd"
    assert objects('{"a": 1}\r\n{"b": [2]}\n') == [{"a": 1}, {"b": [2]}]
    assert objects(" ") == []

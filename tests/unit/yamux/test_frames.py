"""The frame reader and the header's layout."""

from __future__ import annotations

import pytest

from gatewayd.yamux.frames import Flag, FrameReader, FrameType, GoAwayCode, Header, ProtocolViolation, encode_header

STREAM = (
    encode_header(FrameType.WINDOW_UPDATE, Flag.SYN, 1, 786432)
    + encode_header(FrameType.DATA, Flag.NONE, 1, 5)
    + b"hello"
    + encode_header(FrameType.PING, Flag.SYN, 0, 0xDEADBEEF)
    + encode_header(FrameType.DATA, Flag.FIN, 1, 0)
    + encode_header(FrameType.GO_AWAY, Flag.NONE, 0, GoAwayCode.INTERNAL_ERROR)
)
HEADERS = [
    Header(FrameType.WINDOW_UPDATE, Flag.SYN, 1, 786432),
    Header(FrameType.DATA, Flag.NONE, 1, 5),
    Header(FrameType.PING, Flag.SYN, 0, 0xDEADBEEF),
    Header(FrameType.DATA, Flag.FIN, 1, 0),
    Header(FrameType.GO_AWAY, Flag.NONE, 0, GoAwayCode.INTERNAL_ERROR),
]


def test_header_bytes_are_those_of_the_specification() -> None:
    assert encode_header(FrameType.DATA, Flag.SYN | Flag.FIN, 3, 256) == bytes.fromhex("00 00 0005 00000003 00000100")
    assert encode_header(FrameType.PING, Flag.ACK, 0, 7) == bytes.fromhex("00 02 0002 00000000 00000007")


def read(*pieces: bytes) -> tuple[list[Header], bytes]:
    reader = FrameReader()
    headers: list[Header] = []
    payload = b""
    for piece in pieces:
        for part in reader.feed(piece):
            if isinstance(part, Header):
                headers.append(part)
            else:
                payload += part
    assert reader.at_boundary
    return headers, payload


def test_whole() -> None:
    assert read(STREAM) == (HEADERS, b"hello")


def test_byte_by_byte() -> None:
    assert read(*(STREAM[i : i + 1] for i in range(len(STREAM)))) == (HEADERS, b"hello")


@pytest.mark.parametrize("cut", range(len(STREAM)))
def test_cut_in_two_anywhere(cut: int) -> None:
    assert read(STREAM[:cut], STREAM[cut:]) == (HEADERS, b"hello")


def test_memoryview_gives_bytes_that_outlive_the_buffer() -> None:
    buffer = bytearray(STREAM)
    reader = FrameReader()
    parts = list(reader.feed(memoryview(buffer)))
    buffer[:] = bytes(len(buffer))
    assert [part for part in parts if isinstance(part, bytes)] == [b"hello"]


def test_trailing_data_waits_for_its_rest() -> None:
    reader = FrameReader()
    assert list(reader.feed(STREAM + b"\x00\x02")) == [*HEADERS[:2], b"hello", *HEADERS[2:]]
    assert not reader.at_boundary
    assert list(reader.feed(encode_header(FrameType.PING, Flag.ACK, 0, 1)[2:])) == [Header(2, 2, 0, 1)]


@pytest.mark.parametrize("garbage", [b"\x01" + bytes(11), b"\x00\x04" + bytes(10), b"GET / HTTP/1.1\r\n"])
def test_unknown_version_or_type_is_a_violation(garbage: bytes) -> None:
    with pytest.raises(ProtocolViolation):
        list(FrameReader().feed(garbage))

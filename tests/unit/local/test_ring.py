"""The ring: exact offsets, whatever is dropped; text that never breaks a character."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from gatewayd.local.ring import Ring, decode_held


@given(st.lists(st.binary(max_size=50)), st.integers(1, 64))
def test_the_ring_is_the_tail_of_what_was_appended(pieces: list[bytes], capacity: int) -> None:
    ring = Ring(capacity)
    whole = b""
    for piece in pieces:
        ring.append(piece)
        whole += piece
        assert ring.end == len(whole)
        assert ring.start == max(0, len(whole) - capacity)
        assert ring.read(ring.start, capacity) == whole[ring.start :]


@given(st.binary(max_size=100), st.integers(1, 64), st.integers(-10, 200), st.integers(0, 50))
def test_reading_from_any_offset(data: bytes, capacity: int, offset: int, limit: int) -> None:
    ring = Ring(capacity)
    ring.append(data)
    at = ring.clamp(offset)
    assert ring.start <= at <= ring.end
    assert at == offset or not ring.start <= offset <= ring.end
    assert ring.read(at, limit) == data[at : at + limit]


@given(st.binary(max_size=200), st.lists(st.integers(0, 200)))
def test_text_is_the_same_however_it_arrives(data: bytes, cuts: list[int]) -> None:
    text = ""
    held = b""
    at = 0
    for cut in [*sorted(min(cut, len(data)) for cut in cuts), len(data)]:
        held += data[at:cut]
        at = cut
        piece, size = decode_held(held, final=False)
        assert len(held) - size <= 3  # never more than an unfinished character is held back
        text += piece
        held = held[size:]
    piece, size = decode_held(held, final=True)
    assert size == len(held)
    assert text + piece == data.decode("utf-8", "replace")


@given(st.text(max_size=60))
def test_offsets_count_bytes(text: str) -> None:
    data = text.encode()
    offset = 0
    got = ""
    for index in range(1, len(data) + 1):
        piece, size = decode_held(data[offset:index], final=False)
        assert size == len(piece.encode())
        got += piece
        offset += size
    assert (got, offset) == (text, len(data))


def test_an_invalid_byte_is_not_waited_for() -> None:
    assert decode_held(b"a\xffb", final=False) == ("a\ufffdb", 3)
    assert decode_held(b"a\xe2\x82", final=False) == ("a", 1)
    assert decode_held(b"a\xe2\x82", final=True) == ("a\ufffd", 3)

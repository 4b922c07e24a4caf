"""The upload's multipart body, however it is cut."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gatewayd.local.envelope import ServiceError
from gatewayd.local.files import FilePart


def body(*parts: tuple[str, bytes]) -> bytes:
    made = b""
    for name, content in parts:
        made += f'--bound\r\nContent-Disposition: form-data; name="{name}"; filename="f"\r\n\r\n'.encode() + content + b"\r\n"
    return made + b"--bound--\r\n"


def parse(data: bytes, cuts: list[int]) -> FilePart | bytes:
    part = FilePart("multipart/form-data; boundary=bound")
    content = b""
    at = 0
    for cut in [*sorted(min(cut, len(data)) for cut in cuts), len(data)]:
        part.feed(data[at:cut])
        content += b"".join(part.take())
        at = cut
    return content if part.complete else part


@given(st.binary(max_size=300), st.lists(st.integers(0, 500), max_size=20))
def test_the_content_survives_any_cut(content: bytes, cuts: list[int]) -> None:
    assert parse(body(("mode", b"0644"), ("file", content), ("file", b"second"), ("x", b"y")), cuts) == content


def test_content_that_looks_like_the_boundary() -> None:
    content = b"\r\n--boun\r\n--bound-\r\n--b"
    assert parse(body(("file", content)), list(range(200))) == content


def test_no_file_part() -> None:
    part = parse(body(("other", b"x")), [])
    assert isinstance(part, FilePart)
    assert not part.found


def test_a_cut_off_body() -> None:
    part = parse(body(("file", b"some content"))[:-14], [])
    assert isinstance(part, FilePart)
    assert part.found


@pytest.mark.parametrize("kind", ["", "text/plain", "multipart/form-data", "multipart/form-data; boundary="])
def test_other_bodies_are_refused(kind: str) -> None:
    with pytest.raises(ServiceError) as caught:
        FilePart(kind)
    assert caught.value.status == 400


def test_malformed_bodies_are_refused() -> None:
    part = FilePart("multipart/form-data; boundary=bound")
    with pytest.raises(ServiceError) as caught:
        part.feed(b"not multipart at all")
    assert caught.value.error == "WriteError"

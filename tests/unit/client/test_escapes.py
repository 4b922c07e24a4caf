"""What is typed after a newline and ~, whole and byte by byte."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from client.escapes import DETACH, HELP, LEAVE, SUSPEND, Escapes

CASES: list[tuple[bytes, list[bytes | str]]] = [
    (b"", []),
    (b"ls\r", [b"ls\r"]),
    (b"~.", [LEAVE]),
    (b"ls\r~.", [b"ls\r", LEAVE]),
    (b"ls\n~d", [b"ls\n", DETACH]),
    (b"~?~?", [HELP, HELP]),
    (b"~?x~.", [HELP, b"x~."]),
    (b"~\x1a~.", [SUSPEND, LEAVE]),
    (b"~~", [b"~"]),
    (b"~~.", [b"~."]),
    (b"cd ~.\r", [b"cd ~.\r"]),
    (b"a~.\r", [b"a~.\r"]),
    (b"~x", [b"~x"]),
    (b"~\r~.", [b"~\r", LEAVE]),
    (b"\r~~\r~.", [b"\r~\r", LEAVE]),
    (b"\x1b[200~\r~.\r~d\x1b[201~", [b"\x1b[200~\r~.\r~d\x1b[201~"]),  # pasted
    (b"\x1b[200~x\r\x1b[201~\r~.", [b"\x1b[200~x\r\x1b[201~\r", LEAVE]),
    (b"\r~\xff\x00", [b"\r~\xff\x00"]),
]


def joined(found: list[bytes | str]) -> list[bytes | str]:
    """Bytes that stand side by side as one."""
    result: list[bytes | str] = []
    for item in found:
        if isinstance(item, bytes) and result and isinstance(result[-1], bytes):
            result[-1] += item
        else:
            result.append(item)
    return result


@pytest.mark.parametrize(("typed", "means"), CASES)
def test_whole_and_byte_by_byte(typed: bytes, means: list[bytes | str]) -> None:
    assert joined(Escapes().feed(typed)) == means
    escapes = Escapes()
    assert joined([item for byte in typed for item in escapes.feed(bytes((byte,)))]) == means


def test_a_tilde_waits_for_its_letter() -> None:
    escapes = Escapes()
    assert escapes.feed(b"\r~") == [b"\r"]
    assert escapes.feed(b"") == []
    assert escapes.feed(b"l") == [b"~l"]


@given(st.lists(st.sampled_from([b"~", b".", b"d", b"\r", b"\n", b"x", b"\x1b[200~", b"\x1b[201~"]), max_size=40), st.data())
def test_any_cut_means_the_same(parts: list[bytes], data: st.DataObject) -> None:
    typed = b"".join(parts)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(typed)), max_size=6)))
    escapes = Escapes()
    pieces = [typed[start:end] for start, end in zip([0, *cuts], [*cuts, len(typed)], strict=True)]
    assert joined([item for piece in pieces for item in escapes.feed(piece)]) == joined(Escapes().feed(typed))

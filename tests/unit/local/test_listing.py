"""Pages and cursors."""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass
from operator import attrgetter

import pytest
from fastapi.exceptions import RequestValidationError

from gatewayd.local.listing import Order


@dataclass(frozen=True)
class Entry:
    id: str
    value: int | str | None


def order(*, descending: bool = False, by: str = "value") -> Order[Entry]:
    return Order(by, descending, attrgetter("value"), attrgetter("id"))


ENTRIES = [Entry("a", 3), Entry("b", None), Entry("c", 1), Entry("d", 1), Entry("e", None), Entry("f", 2)]


@pytest.mark.parametrize("descending", [False, True])
@pytest.mark.parametrize("size", [1, 2, 3, 6, 7])
def test_following_cursors_gives_every_entry_once(descending: bool, size: int) -> None:
    expected = "becdfa"
    seen = ""
    cursor = None
    for _ in range(7):
        page = order(descending=descending).page(ENTRIES, size, cursor=cursor)
        seen += "".join(entry.id for entry in page.entries)
        cursor = page.next_cursor
        if cursor is None:
            break
    assert seen == (expected[::-1] if descending else expected)


def test_what_goes_and_comes_between_pages_hides_and_repeats_nothing() -> None:
    names = [Entry(name, name) for name in ("ant", "bee", "cat", "dog")]
    first = order().page(names, 2)
    assert [entry.id for entry in first.entries] == ["ant", "bee"]
    changed = [Entry("aardvark", "aardvark"), *names[2:], Entry("cow", "cow")]
    second = order().page(changed, 2, cursor=first.next_cursor)
    assert [entry.id for entry in second.entries] == ["cat", "cow"]
    third = order().page(changed, 2, cursor=second.next_cursor)
    assert [entry.id for entry in third.entries] == ["dog"]
    assert third.next_cursor is None


def test_offsets() -> None:
    page = order().page(ENTRIES, 2, offset=1)
    assert ([entry.id for entry in page.entries], page.offset) == (["e", "c"], 1)
    assert page.next_cursor
    assert order().page(ENTRIES, 2, offset=99).entries == []
    assert order().page([], 2).next_cursor is None


def encoded(content: object) -> str:
    return base64.urlsafe_b64encode(json.dumps(content).encode()).decode()


@pytest.mark.parametrize(
    "cursor",
    [
        "",
        "ü",
        "2",
        "not base64!",
        "x" * 2000,
        encoded(5),
        encoded(["value", False, 1]),
        encoded(["value", False, 1, 2]),
        encoded(["value", False, [1], "a"]),
        encoded(["value", True, 1, "a"]),
        encoded(["name", False, 1, "a"]),
        encoded([]) * 3,
    ],
)
def test_other_cursors_are_refused(cursor: str) -> None:
    with pytest.raises(RequestValidationError) as caught:
        order().page(ENTRIES, 2, cursor=cursor)
    assert caught.value.errors()[0]["loc"] == ("query", "cursor")


def test_a_cursor_with_another_kind_of_value_is_only_another_place() -> None:
    assert order().page(ENTRIES, 9, cursor=encoded(["value", False, "text", "a"])).entries == []

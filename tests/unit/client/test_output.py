"""What reaches a person's terminal: harmless text, tables that fit, JSON that stays one document."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from client import output


@pytest.mark.parametrize(
    ("hostile", "shown"),
    [
        ("plain", "plain"),
        ("\x1b[31mred\x1b[0m", "red"),
        ("\x1b]0;title\x07text", "text"),
        ("\x1b]52;c;aGVsbG8=\x1b\\text", "text"),
        ("\x1bPdcs\x1b\\text", "text"),
        ("\x9b31mtext", "text"),
        ("a\rb\nc\td\be", "a b c d e"),
        ("\x1bcreset", "reset"),
        ("abc\x1b", "abc"),
        ("a\u202eb\u2066c", "a b c"),
        ("日本 é", "日本 é"),
        ("\x00\x7f", ""),
    ],
)
def test_clean(hostile: str, shown: str) -> None:
    assert output.clean(hostile) == shown


@given(st.text())
def test_nothing_unprintable_is_left(text: str) -> None:
    assert all(char.isprintable() for char in output.clean(text))


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)
)


@given(values)
def test_json_is_unchanged_and_harmless(value: Any) -> None:
    text = output.as_json(value)
    assert json.loads(text) == value
    assert all(char == "\n" or char.isprintable() for char in text)


def test_a_table_fits() -> None:
    rows: list[list[object]] = [["demo", "ready", "a=1, b=2, " * 10], ["x" * 40, None, ""]]
    for cells in (60, 80, 140):
        text = output.table(["NAME", "STATUS", "LABELS"], rows, cells=cells, colour=False)
        assert all(output.width(line) <= cells for line in text.splitlines())
    assert output.table(["NAME", "STATUS", "LABELS"], rows, cells=40, colour=False).splitlines() == [
        "NAME             STATUS  LABELS",
        "demo             ready   a=1, b=2, a=1,…",
        "xxxxxxxxxxxxxx…  -       -",
    ]


def test_a_table_in_a_narrow_terminal_keeps_its_headers() -> None:
    text = output.table(["NAME", "STATUS"], [["demo-with-a-long-name", "ready"]], cells=5, colour=False)
    assert text.splitlines()[0] == "NAME  STATUS"


def test_wide_characters_keep_the_columns() -> None:
    text = output.table(["A", "B"], [["日本", "x"], ["abc", "y"]], cells=80, colour=False)
    assert text == "A     B\n日本  x\nabc   y\n"


def test_colour_is_only_for_what_the_table_says() -> None:
    text = output.table(["NAME", "STATUS"], [["\x1b[5mblink", "ready"]], cells=80, colour=True)
    assert "\x1b[32mready\x1b[0m" in text
    assert "\x1b[5m" not in text


def test_no_colour_outside_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert "\x1b" not in output.table(["STATUS"], [["ready"]])


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0, "0B"),
        (1 << 20, "1MB"),
        (3 << 29, "1.5GB"),
        (512 << 20, "512MB"),
        (1000 << 20, "1000MB"),
        (None, ""),
        (True, ""),
        ("x", ""),
    ],
)
def test_sizes(value: object, shown: str) -> None:
    assert output.size(value) == shown


@pytest.mark.parametrize(("value", "shown"), [(0, "0s"), (59, "59s"), (60, "1m"), (3661, "1h 1m"), (90061, "1d 1h"), (None, "")])
def test_durations(value: object, shown: str) -> None:
    assert output.duration(value) == shown


def test_ages() -> None:
    then = datetime.now(UTC) - timedelta(hours=2, seconds=5)
    assert output.age(then.isoformat()) == "2h 5s"
    assert output.age(then.isoformat().replace("+00:00", "Z")) == "2h 5s"
    assert output.age("yesterday") == "yesterday"
    assert output.age(None) == ""


def test_facts_leave_out_what_is_not_there() -> None:
    assert (
        output.facts([("name", "demo"), ("status", None), ("message", "\x1b[1mhello")], colour=False)
        == "name     demo\nmessage  hello\n"
    )


def test_formats(capsys: pytest.CaptureFixture[str]) -> None:
    for form, text in (("json", '{\n  "a": 1\n}\n'), ("pretty", "one\n"), ("id", "x\ny z\n")):
        output.show(form, {"a": 1}, lambda: "one", ["x", "y\nz"])
        assert capsys.readouterr().out == text

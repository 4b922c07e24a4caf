"""Sizes, durations, ports, pairs, JSON: what is taken, what is refused, and what an error shows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import pytest
from hypothesis import given
from hypothesis import strategies as st

from client.params import BadWord, Duration, Json, Name, Pair, Port, Size, Timeout


def convert(kind: click.ParamType[Any], text: str) -> Any:
    return kind.convert(text, None, None)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1mb", 1 << 20),
        ("512mb", 512 << 20),
        ("512MB", 512 << 20),
        (" 2gb ", 2 << 30),
        ("1.5gb", 3 << 29),
        ("0.5gb", 1 << 29),
        ("1.25tb", 5 << 38),
        ("1024tb", 1 << 50),
        ("1.0000001mb", (1 << 20)),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert convert(Size(), text) == size


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("512", "needs a unit"),
        ("1.5", "needs a unit"),
        ("512kb", "no unit 'kb'"),
        ("512mib", "no unit 'mib'"),
        ("0.5mb", "at least 1mb"),
        ("0mb", "at least 1mb"),
        ("1025tb", "at most 1024tb"),
        ("-1gb", "a number with a unit"),
        ("1e3mb", "a number with a unit"),
        ("mb", "a number with a unit"),
        ("", "a number with a unit"),
        ("1,5gb", "a number with a unit"),
        ("1 gb", "a number with a unit"),
        ("٣gb", "a number with a unit"),
        ("9" * 100 + "mb", "a number with a unit"),
    ],
)
def test_refused_sizes(text: str, says: str) -> None:
    with pytest.raises(BadWord, match=says) as caught:
        convert(Size(), text)
    assert caught.value.word == text


@given(st.integers(1, 1023), st.integers(0, 999), st.sampled_from(["mb", "gb", "tb"]))
def test_fractions_are_exact(whole: int, thousandths: int, unit: str) -> None:
    factor = {"mb": 20, "gb": 30, "tb": 40}[unit]
    assert convert(Size(), f"{whole}.{thousandths:03}{unit}") == (whole * 1000 + thousandths) * (1 << factor) // 1000


@pytest.mark.parametrize(("text", "seconds"), [("90", 90), ("90s", 90), ("10m", 600), ("2h", 7200), ("1d", 86400), ("0", 0)])
def test_durations(text: str, seconds: int) -> None:
    assert convert(Duration(), text) == seconds


@pytest.mark.parametrize("text", ["", "-1", "1.5h", "10 m", "1w", "x"])
def test_refused_durations(text: str) -> None:
    with pytest.raises(BadWord):
        convert(Duration(), text)


def test_a_duration_may_have_a_step() -> None:
    assert convert(Duration(60), "5m") == 300
    with pytest.raises(BadWord, match="multiple of 60"):
        convert(Duration(60), "90")


def test_timeouts() -> None:
    assert convert(Timeout(), "1.5") == 1.5
    assert convert(Timeout(), "2m") == 120.0
    assert convert(Timeout(zero=True), "0") == 0.0
    for text in ("0", "8d", "-1", "inf", "nan", ""):
        with pytest.raises(BadWord):
            convert(Timeout(), text)


def test_ports() -> None:
    assert convert(Port(), "1") == 1
    assert convert(Port(), "65535") == 65535
    assert convert(Port(zero=True), "0") == 0
    for text in ("0", "65536", "-1", "x", "", "²", "080800"):
        with pytest.raises(BadWord, match="from 1 to 65535"):
            convert(Port(), text)


@pytest.mark.parametrize("name", ["a", "demo", "demo-2", "0", "a" * 63])
def test_names(name: str) -> None:
    assert convert(Name(), name) == name


@pytest.mark.parametrize("name", ["", "-a", "a-", "A", "a_b", "a.b", "a" * 64, "a/b", "../x", "a\n", "é", "%41", "a b", "٣"])
def test_refused_names(name: str) -> None:
    with pytest.raises(BadWord):
        convert(Name(), name)


def test_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    assert convert(Pair(), "K=V=W") == ("K", "V=W")
    assert convert(Pair(), "K=") == ("K", "")
    monkeypatch.setenv("STAGE", "ci")
    assert convert(Pair(inherit=True), "STAGE") == ("STAGE", "ci")
    monkeypatch.delenv("STAGE")
    with pytest.raises(BadWord, match="STAGE is not set"):
        convert(Pair(inherit=True), "STAGE")


@pytest.mark.parametrize("text", ["s3cret", "=s3cret", "K=s3cret\udcff"])
def test_a_refused_pair_shows_no_value(text: str) -> None:
    with pytest.raises(BadWord) as caught:
        convert(Pair(), text)
    assert "s3cret" not in caught.value.message + caught.value.word


def test_json(tmp_path: Path) -> None:
    assert convert(Json(), '{"rules": []}') == {"rules": []}
    file = tmp_path / "proxy.json"
    file.write_text('{"no_proxy": ["*.example.com"]}')
    assert convert(Json(), f"@{file}") == {"no_proxy": ["*.example.com"]}
    file.write_text('{"value": "s3cret",\n}')
    with pytest.raises(BadWord, match="line 2, column 1") as caught:
        convert(Json(), f"@{file}")
    assert caught.value.word == f"@{file}"
    assert "s3cret" not in caught.value.message
    with pytest.raises(BadWord, match="No such file"):
        convert(Json(), f"@{tmp_path}/none")
    file.write_bytes(b"\xff")
    with pytest.raises(BadWord, match="not UTF-8"):
        convert(Json(), f"@{file}")


@pytest.mark.parametrize("text", ['{"value": "s3cret"', '["s3cret"]', '"s3cret"', '{"a":' * 3000])
def test_refused_json_shows_no_value(text: str) -> None:
    with pytest.raises(BadWord) as caught:
        convert(Json(), text)
    assert "s3cret" not in caught.value.message + caught.value.word

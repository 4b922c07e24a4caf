"""Names: one DNS label."""

from __future__ import annotations

import pytest

from gatewayd.local.names import generate_name, name_problem


@pytest.mark.parametrize("name", ["a", "0", "a-b", "my-box-1", "a" * 63, "1a", "a--b"])
def test_labels_are_names(name: str) -> None:
    assert name_problem(name) == ""


@pytest.mark.parametrize("name", ["", "-a", "a-", "A", "a_b", "a.b", "a b", "ä", "a" * 64, "a\n", "../x", "a/b"])
def test_nothing_else_is(name: str) -> None:
    assert name_problem(name)


def test_generated_names_are_names_and_new() -> None:
    taken: set[str] = set()
    for _ in range(500):
        name = generate_name(taken)
        assert name_problem(name) == ""
        assert name not in taken
        taken.add(name)

"""docs/compatibility.md: each conformance run makes its own part of it and compares, or writes it when asked to."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import pytest

DOCUMENT = Path(__file__).parent.parent / "docs" / "compatibility.md"
UPDATE = "GATEWAYD_UPDATE_COMPATIBILITY"  # set in the environment: write the document instead of comparing with it

Row = tuple[str, str, str, str]  # method, sync/async, state, note


def table(rows: Iterable[Row]) -> str:
    """A Markdown table, in the order of the names."""
    lines = ["| method | sync/async | state | note |", "|---|---|---|---|"]
    lines += [f"| `{method}` | {modes} | {state} | {note} |" for method, modes, state, note in sorted(rows)]
    return "\n".join(lines)


def publish(part: str, content: str) -> None:
    """Require that a part of the document is this text; write it there instead when UPDATE is set."""
    begin, end = f"<!-- {part}: written by its conformance run -->\n", f"<!-- {part}: end -->"
    document = DOCUMENT.read_text(encoding="utf-8")
    before, _, rest = document.partition(begin)
    written, found, after = rest.partition(end)
    assert found, f"{DOCUMENT.name} has no part {part!r}"
    made = f"\n{content}\n\n"
    if os.environ.get(UPDATE):
        DOCUMENT.write_text(f"{before}{begin}{made}{end}{after}", encoding="utf-8")
    elif written != made:
        pytest.fail(
            f"docs/{DOCUMENT.name} is not what this run found in part {part!r}; {UPDATE}=1 writes it:\n{made}", pytrace=False
        )

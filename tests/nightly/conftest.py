"""What runs at night: suites of other projects, against real sandboxes. They run when asked for: ``make nightly``."""

from __future__ import annotations

from pathlib import Path

import pytest

HERE = Path(__file__).parent


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """All of it takes minutes."""
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker(pytest.mark.e2e)
            item.add_marker(pytest.mark.slow)
            if "slow" not in config.getoption("markexpr"):
                item.add_marker(pytest.mark.skip(reason="takes minutes: run it with -m slow"))

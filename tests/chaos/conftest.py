"""Services that are hurt, and what must hold afterwards. Needs bubblewrap."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.chaos.remains import adopting
from tests.sdk.conftest import Service

HERE = Path(__file__).parent

Start = Callable[[], Service]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Everything here starts real sandboxes; what takes minutes runs when it is asked for."""
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker(pytest.mark.e2e)
            if shutil.which("bwrap") is None:
                item.add_marker(pytest.mark.skip(reason="bubblewrap is not installed"))
            elif item.get_closest_marker("slow") and "slow" not in config.getoption("markexpr"):
                item.add_marker(pytest.mark.skip(reason="takes minutes: run it with -m slow"))


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start services on one state directory. Their orphans become ours: none is overlooked. What still runs is ended in order."""
    started: list[Service] = []

    def starting() -> Service:
        started.append(service := Service(tmp_path / "state"))
        if len(started) == 1:
            with service.client() as client:  # the layer that all sandboxes share is made with the first of them
                client.create_sandbox(name="first").delete()
        return service

    with adopting():
        yield starting
        for one in started:
            if one.process.poll() is None:
                one.stop()

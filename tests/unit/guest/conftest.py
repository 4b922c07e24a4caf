"""Real guests in processes of their own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.guest.guestclient import Guest


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guest]:
    """One guest for the tests of a file."""
    guest = Guest(tmp_path_factory.mktemp("guest")).start()
    yield guest
    guest.stop()


@pytest.fixture(autouse=True)
def no_guest_is_left() -> Iterator[None]:
    """A test that fails leaves no process behind either."""
    before = set(Guest.running)
    yield
    for guest in Guest.running - before:
        guest.stop()


@pytest.fixture
def guest(shared: Guest) -> Iterator[Guest]:
    """The shared guest; afterwards nothing may be left of any session."""
    yield shared
    shared.end_sessions()
    shared.check_clean()


@pytest.fixture
def own_guest(tmp_path: Path) -> Iterator[Guest]:
    """A guest, not started, for one test alone."""
    guest = Guest(tmp_path)
    yield guest
    guest.stop()

"""A front end whose sandbox is this machine."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator

import pytest

from tests.unit.frontends.ssh.parts import Front, running_front


@pytest.fixture
async def front() -> AsyncIterator[Front]:
    """Serving, until the test ends."""
    if shutil.which("ssh") is None:
        pytest.skip("ssh is not installed")
    async with running_front() as front:
        yield front

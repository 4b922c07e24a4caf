"""When memory is given back, and that FastAPI does without what is spared."""

from __future__ import annotations

import subprocess
import sys

from gatewayd.local.memory import BUSY, Trimmer


def test_memory_is_given_back_once_when_it_has_become_quiet() -> None:
    used = 0.0
    trimmer = Trimmer(lambda: used)
    assert trimmer.look()  # starting was work
    assert not trimmer.look()
    for _ in range(3):
        used += 2 * BUSY
        assert not trimmer.look()
    used += BUSY / 2
    assert trimmer.look()
    assert not trimmer.look()


def test_the_service_starts_without_what_is_spared() -> None:
    script = """
import sys
from gatewayd.local import memory
memory.spare()
from gatewayd.local.app import build_app
from gatewayd.local import httpd
assert sys.modules["pydantic.v1"] is None
assert "gatewayd.local.schemas" not in sys.modules
print(len(build_app(None, None)._app.openapi()["components"]["schemas"]))
"""
    ran = subprocess.run([sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, check=True)
    assert int(ran.stdout) > 20

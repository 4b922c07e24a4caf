"""One sandbox whose times run out for real."""

from __future__ import annotations

import os
import threading
import time
from typing import Any

import pytest
from langsmith.sandbox import ResourceNotFoundError

DEADLINE = 75.0  # seconds for what takes 60


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.skipif(not os.environ.get("CI"), reason="takes two minutes: the shortest TTL is 60 s; set CI=1 to run it")
def test_idle_sandboxes_stop_and_stopped_ones_go(client: Any, name: str) -> None:
    idle = client.create_sandbox(name=name, idle_ttl_seconds=60, delete_after_stop_seconds=60)
    busy = client.create_sandbox(name=f"{name}-busy", idle_ttl_seconds=60)
    running = threading.Thread(target=busy.run, args=("sleep 90",), kwargs={"timeout": 120})
    running.start()
    began = time.monotonic()
    while client.get_sandbox_status(name).status == "ready":
        assert time.monotonic() < began + DEADLINE
        time.sleep(0.5)
    assert time.monotonic() > began + 59
    assert "60 s without use" in client.get_sandbox(idle.name).status_message
    stopped = time.monotonic()
    while True:
        assert time.monotonic() < stopped + DEADLINE
        time.sleep(0.5)
        try:
            client.get_sandbox_status(name)
        except ResourceNotFoundError:
            break
    assert time.monotonic() > stopped + 58
    running.join()
    assert client.get_sandbox_status(busy.name).status == "ready"
    busy.delete()

"""Services that are hurt, and what must hold afterwards: of root, and of a plain user. Needs bubblewrap."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import uvicorn

from tests.chaos.remains import adopting
from tests.isolation.conftest import plain_user
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


@functools.cache
def plain_service() -> type[Service] | str:
    """The service of a plain user, or why there is none: its Python must find what the service is made of."""
    found = plain_user()
    if isinstance(found, str):
        return found
    prefix, interpreter = found
    home = Path(__file__).parents[2]

    class PlainService(Service):
        """The service of a plain user."""

        python = interpreter
        user = tuple(prefix)
        variables = {  # noqa: RUF012 - never changed
            "PYTHONPATH": os.pathsep.join((str(home), str(Path(uvicorn.__file__).parents[1]))),
            "HOME": "/nonexistent",
            "PATH": os.defpath + ":/usr/sbin:/sbin",
        }

    tried = subprocess.run(
        [*prefix, interpreter, "-c", "import gatewayd.local.server, gatewayd.local.app"],
        env=PlainService.variables,
        cwd="/",
        capture_output=True,
        text=True,
        check=False,
    )
    return PlainService if tried.returncode == 0 else f"its Python cannot run the service: {tried.stderr.strip()[-200:]}"


@pytest.fixture(params=["own", "rootless"])
def start(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Start]:
    """Start services on one state directory, as the user of this test run and as a plain one.

    Their orphans become ours: none is overlooked. What still runs is ended in order.
    """
    make: type[Service] = Service
    folder = tmp_path
    if request.param == "rootless":
        found = plain_service()
        if isinstance(found, str):
            pytest.skip(f"no rootless run: {found}")
        make = found
        folder = Path(tempfile.mkdtemp(prefix="chaos-"))  # pytest's own are root's alone
        uid, gid = (int(word.partition("=")[2]) for word in make.user[1:3])
        os.chown(folder, uid, gid)
    started: list[Service] = []

    def starting() -> Service:
        started.append(service := make(folder / "state"))
        if len(started) == 1:
            with service.client() as client:  # the layer that all sandboxes share is made with the first of them
                client.create_sandbox(name="first").delete()
        return service

    try:
        with adopting():
            yield starting
            for one in started:
                if one.process.poll() is None:
                    one.stop()
    finally:
        if folder != tmp_path:
            shutil.rmtree(folder, ignore_errors=True)

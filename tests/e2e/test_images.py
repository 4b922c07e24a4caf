"""Sandboxes on other root file systems: Debian's smallest, with python3-minimal and without any Python."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from . import images
from .conftest import Gateway, make, service_on

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(bool(images.missing), reason=f"not installed: {', '.join(images.missing)}"),
]


@pytest.fixture(scope="module", params=[images.PYTHON, images.PLAIN])
def based(request: pytest.FixtureRequest) -> Iterator[Gateway]:
    with service_on(images.root_filesystem(request.param)) as gateway:
        make(gateway, "box")
        yield gateway


def test_nothing_of_this_machine_is_inside(based: Gateway) -> None:
    assert based.sh("box", "cat /etc/debian_version").startswith("12")
    for program in ("ssh", "git", "psql", "rsync"):  # this machine has them all
        based.sh("box", f"! command -v {program}")


def test_files_stay_over_a_stop(based: Gateway) -> None:
    based.sh("box", "echo kept > /root/note; rm /etc/debian_version")
    based.sandbox("stop", "box", "--wait")
    based.sandbox("start", "box", "--wait")
    assert based.sh("box", "cat /root/note; ls /etc/debian_version 2>&1 || true").split("\n")[0] == "kept"
    based.sh("box", "test ! -e /etc/debian_version; echo 12 > /etc/debian_version")

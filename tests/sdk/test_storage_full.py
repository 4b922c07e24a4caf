"""The disk under the state directory fills up: errors that say so, nothing half-made, and the service goes on."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from langsmith.sandbox import SandboxClientError, SandboxOperationError

if TYPE_CHECKING:
    from tests.sdk.conftest import Service

pytestmark = pytest.mark.skipif(os.geteuid() != 0 or shutil.which("unshare") is None, reason="a disk of its own takes root")

SIZE = 48 << 20
WRAPPER = [
    "unshare",
    "--mount",
    "sh",
    "-ec",
    f'mkdir -m 700 -p "$0" && mount -t tmpfs -o size={SIZE},mode=700 none "$0" && exec "$@"',
]


class SmallDisk:
    """A service whose state directory is a small disk of its own."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.state = Path(f"/proc/{service.process.pid}/root{service.state_dir}")  # as the service sees it
        self._filling = self.state / "filling"

    def fill(self) -> None:
        """Take all that is left."""
        with self._filling.open("ab", buffering=0) as file:
            try:
                while True:
                    file.write(b"\xff" * 65536)
            except OSError:
                pass
            try:
                while True:
                    file.write(b"\xff")
            except OSError:
                pass

    def free(self) -> None:
        """Give it back."""
        self._filling.unlink()


@pytest.fixture
def small(own_service: Callable[..., Service], tmp_path: Path) -> Iterator[SmallDisk]:
    service = own_service(wrapper=[*WRAPPER, str(tmp_path / "state")])
    yield SmallDisk(service)
    service.stop()  # in order, with no traceback in its log


def test_creating(small: SmallDisk, name: str) -> None:
    with small.service.client() as client, small.service.http() as http:
        first = client.create_sandbox(name=name)
        first.write("kept", "x")
        small.fill()
        for wait in (True, False):
            answer = http.post("/v2/sandboxes/boxes", json={"name": f"{name}-no", "wait_for_ready": wait})
            detail = answer.json()["detail"]
            if wait or answer.status_code != 200:
                assert (answer.status_code, detail["error"]) == (507, "StorageFull")
                assert "free some" in detail["message"]
                assert detail["error_id"] in small.service.text()
        for sandbox in client.list_sandboxes():
            if sandbox.name == f"{name}-no":
                sandbox.delete()
        with pytest.raises(SandboxClientError, match="no space is left"):
            client.create_sandbox(name=f"{name}-sdk")
        assert [sandbox.name for sandbox in client.list_sandboxes()] == [name]
        assert [path.name for path in (small.state / "boxes").iterdir()] == [first.id]
        assert first.run("cat kept").stdout == "x"
        assert first.read("kept") == b"x"
        small.free()
        with client.sandbox(name=f"{name}-no") as second:
            assert second.run("echo works").stdout == "works\n"


def test_writing(small: SmallDisk, name: str) -> None:
    with small.service.client() as client, client.sandbox(name=name) as made:
        made.write("file", "old")
        with pytest.raises(SandboxOperationError, match="No space left"):
            made.write("file", b"x" * (SIZE + 1))
        assert made.read("file") == b"old"
        assert made.run("ls -A /root | grep -v '^[.][bp]'").stdout == "file\n"  # no half of it beside it
        made.write("file", b"x" * (SIZE // 2))  # room again
        ran = made.run("head -c 100M /dev/zero > filler; echo $?")
        assert ran.stdout == "1\n"
        assert made.run("rm filler; cat file | wc -c").stdout == f"{SIZE // 2}\n"


def test_stopping_and_deleting_work_without_room(small: SmallDisk, name: str) -> None:
    with small.service.client() as client:
        one, two = client.create_sandbox(name=name), client.create_sandbox(name=f"{name}-2")
        one.write("file", "x")
        small.fill()
        for number in range(40):  # until the state file has no room for one more change
            try:
                client.update_sandbox(name, idle_ttl_seconds=60 * (number + 2))
            except SandboxClientError:
                break
        one.stop()
        assert client.get_sandbox(name).status == "stopped"
        two.delete()
        small.free()
        assert [sandbox.name for sandbox in client.list_sandboxes()] == [name]
        assert one.read("file") == b"x"


def test_starting_the_service_without_room(own_service: Callable[..., Service], tmp_path: Path) -> None:
    fill = 'i=0; head -c 1G /dev/zero > "$0/filling" 2>/dev/null || true; exec "$@"'
    wrapper = [*WRAPPER[:-1], WRAPPER[-1].replace('exec "$@"', fill), str(tmp_path / "state")]
    with pytest.raises(AssertionError, match="No space left on device"):
        own_service(wrapper=wrapper)
    assert "Traceback" not in (tmp_path / "state.log").read_text()

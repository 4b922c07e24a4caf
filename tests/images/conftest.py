"""Images, registries and the embedded service as real processes."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.images.maker import Image, Layer, busybox
from tests.images.registry import Authority, Registry
from tests.sdk.conftest import Service, client, name, own_service, service, wait_until

__all__ = ["client", "name", "own_service", "service"]

HERE = Path(__file__).parent
PROGRAMS = ("bwrap", "skopeo", "busybox", "zstd")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything here runs other programs."""
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker(pytest.mark.interop)
            if missing:
                item.add_marker(pytest.mark.skip(reason=f"not installed: {', '.join(missing)}"))


@pytest.fixture(scope="session")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("tls") / "ca")


def _registry(factory: pytest.TempPathFactory, kind: str, **options: Any) -> Iterator[Registry]:
    if shutil.which("docker-registry") is None or shutil.which("htpasswd") is None:
        pytest.skip("docker-registry and htpasswd are not installed")
    made = Registry(factory.mktemp("registry") / kind, **options)
    try:
        yield made
    finally:
        made.stop()


@pytest.fixture(scope="session")
def private(tmp_path_factory: pytest.TempPathFactory, authority: Authority) -> Iterator[Registry]:
    """With accounts and TLS."""
    yield from _registry(tmp_path_factory, "private", authority=authority)


@pytest.fixture(scope="session")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    """Open, and without TLS."""
    yield from _registry(tmp_path_factory, "plain", accounts=False)


@pytest.fixture(scope="session")
def base() -> bytes:
    """A layer with a shell and a few programs."""
    return busybox().content()


@pytest.fixture(scope="session")
def app(base: bytes) -> Image:
    """An image of several layers, which says how it wants to be run."""
    second = Layer().folder("srv", "srv/old").add("srv/kept", b"kept\n").add("srv/gone", b"gone\n").add("srv/old/a", b"a\n")
    third = Layer().add("srv/.wh.gone").add("srv/old/.wh..wh..opq").add("srv/old/b", b"b\n")
    config = {
        "Env": ["PATH=/bin:/opt/bin", "STAGE=image", "EMPTY="],
        "User": "app",
        "WorkingDir": "/work/here",
        "Entrypoint": ["/bin/never"],
        "Cmd": ["started"],
        "Labels": {"team": "image", "origin": "here"},
    }
    return Image([base, second.content(), third.content()], config)


@pytest.fixture
def http(service: Service) -> Iterator[Any]:
    with service.http() as made:
        yield made


class Snaps:
    """Builds by plain HTTP, and what they leave on disk."""

    def __init__(self, http: Any, service: Service) -> None:
        self._http = http
        self._service = service

    def build(self, name: str, image: str, **fields: Any) -> dict[str, Any]:
        """Build, and wait for how it ends."""
        body = {"name": name, "docker_image": image, "fs_capacity_bytes": 256 << 20, **fields}
        answer = self._http.post("/v2/sandboxes/snapshots", json=body)
        assert answer.status_code == 200, answer.text
        return self.ended(answer.json()["id"])

    def ended(self, identity: str) -> dict[str, Any]:
        """The snapshot when it is not being made any more."""

        def look() -> Any:
            found = self._http.get(f"/v2/sandboxes/snapshots/{identity}").json()
            return found if found["status"] != "building" else None

        found: dict[str, Any] = wait_until(look, "the snapshot is made", 60)
        return found

    def delete(self, *found: dict[str, Any]) -> None:
        for one in found:
            assert self._http.delete(f"/v2/sandboxes/snapshots/{one['id']}").status_code == 204

    def on_disk(self) -> list[str]:
        """Layers, and what is under way."""
        return stray(self._service.state_dir)


def stray(state: Path) -> list[str]:
    """What of layers and builds is in a state folder."""
    folders = [state / folder for folder in ("layers", "builds", "trash")]
    return sorted(str(entry.relative_to(state)) for folder in folders if folder.is_dir() for entry in folder.iterdir())


@pytest.fixture
def snaps(http: Any, service: Service) -> Snaps:
    return Snaps(http, service)


Archive = Callable[..., str]


@pytest.fixture
def archive(tmp_path: Path) -> Archive:
    """Write an image as an archive; returns how to ask for it."""
    count = 0

    def write(image: Image) -> str:
        nonlocal count
        count += 1
        return f"oci-archive:{image.archive(tmp_path / f'image-{count}.tar')}"

    return write

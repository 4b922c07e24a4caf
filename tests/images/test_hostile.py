"""Images that lie, break off or do not end: a `failed` snapshot that says why, and not one stray file."""

from __future__ import annotations

import contextlib
import gzip
import http.server
import os
import signal
import socket
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from tests.images.conftest import Snaps, stray
from tests.images.maker import Image, Layer, digest_of
from tests.sdk.conftest import descendants, wait_until
from tests.sdk.test_storage_full import WRAPPER, SmallDisk

if TYPE_CHECKING:
    from tests.images.conftest import Archive
    from tests.images.registry import Registry
    from tests.sdk.conftest import Service

MIB = 1 << 20
GOOD = Layer().add("a", b"a" * 100_000).content()
ZEROS = bytes(40 * MIB)
Endless = tuple[str, threading.Event]  # an image that never comes to an end, and what is set when it has begun to come

WRONG: dict[str, tuple[Callable[[], Image], str]] = {
    "a name that leads out": (lambda: Image([Layer().add("../out", b"x").content()]), "leads out of the image"),
    "a link that leads out": (
        lambda: Image([Layer().add("l", kind=tarfile.SYMTYPE, linkname="/etc").add("l/passwd/x", b"x").content()]),
        "cannot unpack",
    ),
    "a hard link to nothing": (
        lambda: Image([Layer().add("a", kind=tarfile.LNKTYPE, linkname="/etc/shadow").content()]),
        "cannot unpack",
    ),
    "a layer cut short": (lambda: Image([GOOD], compression="none", spoil={"cut": 50_000}), "not what its digest says"),
    "a damaged layer": (lambda: Image([GOOD], spoil={"flip": True}), "not what its digest says"),
    "a wrong diff id": (lambda: Image([GOOD], spoil={"diff_ids": [digest_of(b"other")]}), "not what the image says"),
    "too few diff ids": (lambda: Image([GOOD], spoil={"diff_ids": []}), "names"),
    "no archive": (lambda: Image([b"not an archive at all" * 1000]), "not an archive"),
    "a bomb of zeros": (lambda: Image([Layer().add("zeros", ZEROS).content()]), "larger than it may be"),
    "a bomb by zstd": (lambda: Image([Layer().add("zeros", ZEROS).content()], compression="zstd"), "larger than it may be"),
    "another machine": (lambda: Image([GOOD], machine="mips"), "it is for mips"),
}


@pytest.mark.parametrize("case", WRONG)
def test_images_that_are_wrong(snaps: Snaps, archive: Archive, name: str, case: str) -> None:
    make, message = WRONG[case]
    before = snaps.on_disk()
    failed = snaps.build(name, archive(make()), fs_capacity_bytes=32 * MIB)
    assert failed["status"] == "failed"
    assert failed["status_message"].startswith("ImagePull: oci-archive:")
    assert message in failed["status_message"]
    assert snaps.on_disk() == before
    snaps.delete(failed)


def test_a_blob_that_the_registry_swaps(http: Any, snaps: Snaps, plain: Registry, name: str) -> None:
    image = plain.push(Image([Layer().add("f", os.urandom(1000)).content()]), "swapped/app:1")
    http.post("/v2/sandboxes/registries", json={"name": name, "url": plain.url})
    layer = max(plain.blobs().glob("*/*/data"), key=lambda path: path.stat().st_mtime_ns * (path.read_bytes()[:2] == b"\x1f\x8b"))
    layer.write_bytes(gzip.compress(b"something else" * 100))
    failed = snaps.build(name, image, registry_id=name)
    assert failed["status"] == "failed"
    assert snaps.on_disk() == []
    snaps.delete(failed)


class _Endless(http.server.BaseHTTPRequestHandler):
    """A registry whose one layer never ends."""

    protocol_version = "HTTP/1.1"
    started: threading.Event  # set on the subclass made for a test
    manifest: bytes
    pause: float

    def do_GET(self) -> None:
        if "/manifests/" in self.path:
            kind, content = "application/vnd.oci.image.manifest.v1+json", self.manifest
        elif "/blobs/" in self.path:
            self.send_response(200)
            self.send_header("Content-Length", str(1 << 40))
            self.end_headers()
            with contextlib.suppress(OSError):
                while True:
                    self.wfile.write(os.urandom(65536))
                    self.started.set()
                    time.sleep(self.pause)  # so that it does not come to its limit before it has been looked at
            return
        else:
            kind, content = "application/json", b"{}"
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_HEAD = do_GET  # noqa: N815 - as the base class wants it

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def endless(tmp_path: Path) -> Iterator[Endless]:
    """An image that never comes to an end: how to ask for it, and what is set when it has begun."""
    with serving(tmp_path, pause=0.05) as found:
        yield found


@contextlib.contextmanager
def serving(tmp_path: Path, pause: float) -> Iterator[Endless]:
    """The same, with that many seconds between 64 KiB."""
    layout = Image([GOOD]).layout(tmp_path / "endless")
    newest = max((layout / "blobs/sha256").iterdir(), key=lambda path: b'"layers"' in path.read_bytes())
    manifest = newest.read_bytes().replace(str(len(gzip.compress(GOOD, 1, mtime=0))).encode(), str(40 * MIB).encode())
    begun = threading.Event()
    handler = type("Handler", (_Endless,), {"manifest": manifest, "started": begun, "pause": pause})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"127.0.0.1:{server.server_port}", begun
        server.shutdown()


def begin(http: Any, name: str, host: str) -> str:
    """Begin to build from the endless registry."""
    assert http.post("/v2/sandboxes/registries", json={"name": name, "url": f"http://{host}"}).status_code == 200
    body = {"name": name, "docker_image": f"{host}/app:1", "registry_id": name, "fs_capacity_bytes": 1 << 40}
    answer = http.post("/v2/sandboxes/snapshots", json=body)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["id"])


def pulling(service: Service) -> list[psutil.Process]:
    """The programs of this service that fetch images."""
    return [process for process in descendants(service.process.pid) if process.name() == "skopeo"]


def test_a_layer_without_an_end(http: Any, snaps: Snaps, service: Service, tmp_path: Path, name: str) -> None:
    with serving(tmp_path, pause=0) as (host, _):
        failed = snaps.ended(begin(http, name, host))
    assert failed["status"] == "failed"
    assert "larger than it may be, or than it said" in failed["status_message"]
    assert (snaps.on_disk(), pulling(service)) == ([], [])
    snaps.delete(failed)


def test_a_build_that_is_given_up(http: Any, snaps: Snaps, service: Service, endless: Endless, name: str) -> None:
    host, begun = endless
    identity = begin(http, name, host)
    assert begun.wait(20)
    seen = http.get(f"/v2/sandboxes/snapshots/{identity}").json()
    assert (seen["status"], seen["progress"]["phase"]) == ("building", "pulling")
    refused = http.post("/v2/sandboxes/boxes", json={"snapshot_id": identity})
    assert (refused.status_code, "is not ready: building" in refused.text) == (422, True)
    assert http.delete(f"/v2/sandboxes/snapshots/{identity}").status_code == 204
    assert http.get(f"/v2/sandboxes/snapshots/{identity}").status_code == 404
    assert (snaps.on_disk(), pulling(service)) == ([], [])


def test_a_service_that_is_killed_while_it_pulls(own_service: Callable[..., Service], endless: Endless, name: str) -> None:
    host, begun = endless
    first = own_service()
    with first.http() as http:
        identity = begin(http, name, host)
        assert begun.wait(20)
        [skopeo] = wait_until(lambda: pulling(first), "skopeo runs")
    first.kill()
    wait_until(lambda: not psutil.pid_exists(skopeo.pid), "skopeo ends with the service")
    assert stray(first.state_dir) != []
    second = own_service()
    assert stray(second.state_dir) == []
    with second.http() as http:
        found = http.get(f"/v2/sandboxes/snapshots/{identity}").json()
        assert (found["status"], found["status_message"]) == ("failed", "the service ended while it was made")
        assert http.delete(f"/v2/sandboxes/snapshots/{identity}").status_code == 204


@pytest.mark.skipif(os.geteuid() != 0, reason="a disk of its own takes root")
def test_a_full_disk(own_service: Callable[..., Service], tmp_path: Path, archive: Archive, base: bytes, name: str) -> None:
    small = SmallDisk(own_service(wrapper=[*WRAPPER, str(tmp_path / "state")]))
    large = archive(Image([Layer().add("large", os.urandom(60 * MIB)).content()]))
    tight = archive(Image([Layer().add(f"f{number}", b"\xff" * (15 * MIB)).content() for number in range(4)]))
    with small.service.http() as http:
        snaps = Snaps(http, small.service)
        for image in (large, tight):
            failed = snaps.build(name, image)
            assert failed["status"] == "failed"
            assert "no space is left" in failed["status_message"] or "larger than it may be" in failed["status_message"]
            assert stray(small.state) == []
            snaps.delete(failed)
        made = snaps.build(name, archive(Image([base])))
        assert made["status"] == "ready", made
        box = http.post("/v2/sandboxes/boxes", json={"name": name, "snapshot": name, "wait_for_ready": True}).json()
        layers = stray(small.state)
        run = {"command": "head -c 20000000 /dev/zero | tr '\\0' x > /root/file", "shell": "/bin/sh"}
        assert http.post(f"/dataplane/{box['id']}/execute", json=run).json()["exit_code"] == 0
        small.fill()
        answer = http.post(f"/v2/sandboxes/boxes/{name}/snapshot", json={"name": f"{name}-full"})
        if answer.status_code == 200:
            failed = snaps.ended(answer.json()["id"])
            assert failed["status"] == "failed"
            assert "no space is left" in failed["status_message"]
        else:
            assert answer.status_code == 507
        assert stray(small.state) == layers
        small.free()


def test_a_sigterm_while_it_pulls(own_service: Callable[..., Service], endless: Endless, name: str) -> None:
    host, begun = endless
    first = own_service()
    with first.http() as http:
        begin(http, name, host)
        assert begun.wait(20)
        running = pulling(first)
    first.stop(signal.SIGINT)
    assert not [process for process in running if process.is_running()]
    assert stray(first.state_dir) == []


def test_nobody_else_is_told_a_password(http: Any, name: str) -> None:
    """The image's host decides: credentials of one registry are never shown to another."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        host = f"127.0.0.1:{other.getsockname()[1]}"
        account = {"name": name, "url": "registry.example.com", "username": "u", "password": "secret"}
        assert http.post("/v2/sandboxes/registries", json=account).status_code == 200
        body = {"name": name, "docker_image": f"{host}/app", "registry_id": name, "fs_capacity_bytes": MIB}
        assert http.post("/v2/sandboxes/snapshots", json=body).status_code == 422
        moved = http.patch(f"/v2/sandboxes/registries/{name}", json={"url": f"http://{host}"})
        assert moved.status_code == 200
    http.delete(f"/v2/sandboxes/registries/{name}")

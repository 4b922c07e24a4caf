"""Files in and out."""

from __future__ import annotations

import hashlib
import os
import socket
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import pytest
from langsmith.sandbox import ResourceNotFoundError, SandboxOperationError

if TYPE_CHECKING:
    from tests.sdk.conftest import Service


@pytest.mark.parametrize("content", [b"", b"x", bytes(range(256)) * 1000, "grüße\n".encode()])
def test_what_is_written_is_read(sandbox: Any, content: bytes) -> None:
    sandbox.write("file", content)
    assert sandbox.read("file") == content
    assert sandbox.read("/root/file") == content


def test_paths(sandbox: Any) -> None:
    sandbox.write("new/folders/inside/file", "deep")
    assert sandbox.run("cat ~/new/folders/inside/file").stdout == "deep"
    sandbox.write("/srv/ä b&c=d?.txt", "odd name")
    assert sandbox.read("/srv/ä b&c=d?.txt") == b"odd name"
    sandbox.run("ln -s /root/file link; echo target > file")
    assert sandbox.read("link") == b"target\n"


def test_a_file_is_replaced_not_rewritten(sandbox: Any) -> None:
    sandbox.run("echo old > replaced; chmod 755 replaced; exec 3<replaced; (sleep 5; cat <&3 > kept) &")
    sandbox.write("replaced", "new")
    assert sandbox.read("replaced") == b"new"


def test_large_files_are_streamed(service: Service, sandbox: Any) -> None:
    size = 48 << 20
    content = os.urandom(1 << 20) * (size >> 20)
    before = _peak(service)
    sandbox.write("large", content, timeout=60)
    digest = hashlib.sha256(content).hexdigest()
    assert sandbox.run("sha256sum < large").stdout.split()[0] == digest
    with service.http() as http, http.stream("GET", f"{sandbox.dataplane_url}/download", params={"path": "large"}) as answer:
        got = hashlib.sha256()
        for chunk in answer.iter_bytes():
            got.update(chunk)
        assert answer.headers["content-length"] == str(size)
    assert got.hexdigest() == digest
    assert _peak(service) - before < 24 << 20
    sandbox.run("rm large")


def _peak(service: Service) -> int:
    """The most memory the service ever had, bytes."""
    with open(f"/proc/{service.process.pid}/status") as status:  # noqa: PTH123 - no Path for /proc
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))


def test_reading_what_is_not_there(sandbox: Any) -> None:
    with pytest.raises(ResourceNotFoundError, match="File 'nowhere' not found"):
        sandbox.read("nowhere")
    with pytest.raises(ResourceNotFoundError):
        sandbox.stat("nowhere/deeper")
    with pytest.raises(SandboxOperationError) as caught:
        sandbox.read("/srv")
    assert caught.value.operation == "read"
    with pytest.raises(SandboxOperationError) as caught:
        sandbox.read("/dev/zero")
    assert caught.value.operation == "read"


def test_writing_where_it_cannot_be(sandbox: Any) -> None:
    for path in ("/srv", "/usr/bin/new-file", "/proc/new-file", "/root/.bashrc/below-a-file"):
        with pytest.raises(SandboxOperationError) as caught:
            sandbox.write(path, "x")
        assert caught.value.operation == "write"
        assert caught.value.error_type == "WriteError"


def test_stat_and_ranges(sandbox: Any) -> None:
    sandbox.write("numbers.txt", "0123456789")
    stat = sandbox.stat("numbers.txt")
    assert (stat.size_bytes, stat.content_type.split(";")[0]) == (10, "text/plain")
    middle = sandbox.read_range("numbers.txt", start=2, end=4)
    assert (middle.content, middle.start, middle.total_bytes, middle.partial) == (b"234", 2, 10, True)
    assert sandbox.read_range("numbers.txt", start=7).content == b"789"
    assert sandbox.read_range("numbers.txt", suffix_bytes=2).content == b"89"
    assert sandbox.read_range("numbers.txt", start=7, if_range=stat.etag).partial
    assert sandbox.read_range("numbers.txt", start=0, if_none_match=stat.etag).unchanged
    with pytest.raises(SandboxOperationError, match="past the end"):
        sandbox.read_range("numbers.txt", start=10)
    sandbox.write("numbers.txt", "abc")
    whole = sandbox.read_range("numbers.txt", start=2, if_range=stat.etag)
    assert (whole.content, whole.partial) == (b"abc", False)


@pytest.fixture
def raw(service: Service) -> Iterator[socket.socket]:
    """A connection to the service, without a client's manners."""
    address = urlsplit(service.endpoint)
    with socket.create_connection((address.hostname, address.port), timeout=10) as sock:
        yield sock


def _upload_head(service: Service, sandbox: Any, path: str, length: int) -> bytes:
    target = urlsplit(sandbox.dataplane_url)
    return (
        f"POST {target.path}/upload?path={path} HTTP/1.1\r\nHost: {target.netloc}\r\nX-Api-Key: {service.key}\r\n"
        f"Content-Type: multipart/form-data; boundary=b\r\nContent-Length: {length}\r\n\r\n"
        '--b\r\nContent-Disposition: form-data; name="file"; filename="f"\r\n\r\n'
    ).encode()


def test_an_upload_that_breaks_off_changes_nothing(service: Service, sandbox: Any, raw: socket.socket) -> None:
    sandbox.run("mkdir -p broken")
    sandbox.write("broken/file", "old")
    raw.sendall(_upload_head(service, sandbox, "broken/file", 50_000_000) + b"x" * 3_000_000)
    assert sandbox.read("broken/file") == b"old"
    raw.close()
    assert sandbox.run("while [ $(ls -A broken | wc -l) != 1 ]; do sleep 0.02; done; cat broken/file", timeout=10).stdout == "old"


def test_an_upload_that_is_cut_off_in_order(service: Service, sandbox: Any, raw: socket.socket) -> None:
    sandbox.write("cut", "old")
    head = _upload_head(service, sandbox, "cut", 0)
    body_length = len(head.partition(b"\r\n\r\n")[2]) + 5
    raw.sendall(_upload_head(service, sandbox, "cut", body_length) + b"short")
    answer = b""
    while b"WriteError" not in answer:
        answer += (received := raw.recv(65536))
        assert received
    assert sandbox.read("cut") == b"old"


def test_uploads_that_are_none(service: Service, sandbox: Any) -> None:
    url = f"{sandbox.dataplane_url}/upload"
    with service.http() as http:
        for answer in (
            http.post(url, params={"path": "x"}, content=b"plain"),
            http.post(url, params={"path": "x"}, files={"other": b"data"}),
            http.post(url, params={"path": "x"}, files={"file": b"data"}, headers={"Content-Type": "multipart/form-data"}),
        ):
            assert (answer.status_code, answer.json()["detail"]["error"]) == (400, "WriteError")
        assert http.post(url, files={"file": b"data"}).status_code == 422
        assert http.post(url, params={"path": "a\0b"}, files={"file": b"data"}).status_code == 422
        answer = http.post(url, params={"path": "ok"}, files={"file": b"12345"})
        assert answer.json() == {"path": "ok", "size_bytes": 5}

"""What users write for images and registries, and what skopeo is told."""

from __future__ import annotations

import pytest

from gatewayd.local.references import parse, parse_registry

DIGEST = "sha256:" + "0" * 64


@pytest.mark.parametrize(
    ("text", "source"),
    [
        ("debian", "docker://docker.io/library/debian:latest"),
        ("python:3.12-slim", "docker://docker.io/library/python:3.12-slim"),
        ("team/app", "docker://docker.io/team/app:latest"),
        ("docker.io/debian:12", "docker://docker.io/library/debian:12"),
        ("ghcr.io/team/app:1", "docker://ghcr.io/team/app:1"),
        ("localhost/app", "docker://localhost/app:latest"),
        ("127.0.0.1:5000/a/b/c:v", "docker://127.0.0.1:5000/a/b/c:v"),
        ("[::1]:5000/app", "docker://[::1]:5000/app:latest"),
        ("docker://quay.io/app", "docker://quay.io/app:latest"),
        (f"app@{DIGEST}", f"docker://docker.io/library/app@{DIGEST}"),
        (f"app:tag@{DIGEST}", f"docker://docker.io/library/app@{DIGEST}"),
        ("docker-archive:/a/b.tar", "docker-archive:/a/b.tar"),
        ("oci-archive:/a b.tar:app:1", "oci-archive:/a b.tar:app:1"),
        ("docker-daemon:app", "docker-daemon:app:latest"),
        ("docker-daemon:team/app:2", "docker-daemon:team/app:2"),
    ],
)
def test_references(text: str, source: str) -> None:
    assert parse(text).source() == source


@pytest.mark.parametrize(
    "text",
    [
        *("", " debian", "Debian", "a//b", "a:b:c", "a@sha256:1", "-rf", "--help", "a\nb", "http://x/y", "x" * 5000),
        *("docker-archive:relative.tar", "oci-archive:/a/../b", "oci-archive:", "docker-daemon:", f"docker-daemon:a@{DIGEST}"),
        *("oci:/etc", "dir:/etc", "registry.example.com:port/app", "docker-daemon:-x"),
    ],
)
def test_what_is_no_reference(text: str) -> None:
    with pytest.raises(ValueError):
        parse(text)


def test_another_digest_is_asked_for_only_in_registries() -> None:
    assert parse("ghcr.io/app:1").source(DIGEST) == f"docker://ghcr.io/app@{DIGEST}"
    assert parse("docker-archive:/a.tar").source(DIGEST) == "docker-archive:/a.tar"


@pytest.mark.parametrize(
    ("url", "host", "plain"),
    [
        ("registry.example.com", "registry.example.com", False),
        ("https://Registry.example.com:5000/", "registry.example.com:5000", False),
        ("http://127.0.0.1:5000", "127.0.0.1:5000", True),
        ("https://index.docker.io/v1/", "docker.io", False),
        ("ghcr.io/team", "ghcr.io", False),
    ],
)
def test_registries(url: str, host: str, plain: bool) -> None:
    found = parse_registry(url)
    assert (found.host, found.plain) == (host, plain)


@pytest.mark.parametrize("url", ["", "ftp://x", "https://user:secret@x", "https://x?y", "http://", "https://a b"])
def test_what_is_no_registry(url: str) -> None:
    with pytest.raises(ValueError):
        parse_registry(url)

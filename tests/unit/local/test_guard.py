"""The door: which Host names and keys come in."""

from __future__ import annotations

import pytest

from gatewayd.local.envelope import ServiceError
from gatewayd.local.guard import Guard, host_of

KEY = "a-secret-of-some-length"


def headers(host: str, key: str | None = KEY) -> list[tuple[bytes, bytes]]:
    found = [(b"Host", host.encode())]
    if key is not None:
        found.append((b"X-Api-Key", key.encode()))
    return found


@pytest.mark.parametrize("host", ["127.0.0.1:80", "127.9.9.9", "localhost:1234", "LOCALHOST", "[::1]:80", "[::1]"])
def test_loopback_is_answered(host: str) -> None:
    Guard(KEY, "127.0.0.1").check(headers(host))


@pytest.mark.parametrize("host", ["", "evil.example", "localhost.evil.example", "10.0.0.1", "127.0.0.1.evil.example", "[::2]"])
def test_other_names_are_not(host: str) -> None:
    with pytest.raises(ServiceError) as caught:
        Guard(KEY, "127.0.0.1").check(headers(host))
    assert caught.value.status == 403


def test_the_bound_address_is_answered() -> None:
    Guard(KEY, "10.0.0.1").check(headers("10.0.0.1:80"))
    Guard(KEY, "box.example").check(headers("box.example:80"))
    Guard(KEY, "0.0.0.0").check(headers("192.0.2.1:80"))
    with pytest.raises(ServiceError):
        Guard(KEY, "0.0.0.0").check(headers("evil.example"))


@pytest.mark.parametrize("key", [None, "", "wrong", KEY + "x", KEY[:-1], "ä"])
def test_only_the_key_opens(key: str | None) -> None:
    with pytest.raises(ServiceError) as caught:
        Guard(KEY, "127.0.0.1").check(headers("localhost", key))
    assert caught.value.status == 401
    assert KEY not in caught.value.message


def test_hosts() -> None:
    assert host_of("[::1]:80") == "::1"
    assert host_of("A.b:80") == "a.b"
    assert host_of("[broken") == "broken"

"""Whom a registry's password is told to."""

from __future__ import annotations

from pathlib import Path

import pytest

from gatewayd.local.clock import Clock
from gatewayd.local.envelope import ServiceError
from gatewayd.local.imagemodels import RegistryBody, RegistryPatch
from gatewayd.local.records import RegistryRecord
from gatewayd.local.references import parse
from gatewayd.local.registries import Registries
from gatewayd.local.store import Store

IMAGE = parse("registry.test/team/app:1")
CA = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"
OTHER_CA = CA.replace("AAAA", "BBBB")


def made(folder: Path, url: str = "https://registry.test") -> Registries:
    registries = Registries(Store(folder / "state.db"), folder, Clock())
    registries.create(RegistryBody(name="own", url=url, username="me", password="s3cret", ca_cert=CA))
    return registries


def patch(registries: Registries, **fields: str) -> RegistryRecord:
    return registries.update("own", RegistryPatch.model_validate(fields))


@pytest.mark.parametrize("fields", [{"url": "http://registry.test"}, {"url": "https://elsewhere.test"}, {"ca_cert": OTHER_CA}])
def test_a_password_that_would_be_exposed_is_forgotten(tmp_path: Path, fields: dict[str, str]) -> None:
    registries = made(tmp_path)
    assert not patch(registries, **fields).secret
    image = parse("elsewhere.test/app:1") if "elsewhere" in fields.get("url", "") else IMAGE
    with pytest.raises(ServiceError, match="give it again with PATCH"):
        registries.access("own", image)
    patch(registries, **dict.fromkeys(fields, fields.get("url", CA)))  # a second change, or the way back, brings nothing back
    with pytest.raises(ServiceError, match="give it again with PATCH"):
        registries.access("own", image)
    patch(registries, password="again")
    assert registries.access("own", image).password == "again"


@pytest.mark.parametrize("fields", [{"url": "http://registry.test"}, {"ca_cert": OTHER_CA}])
def test_a_password_that_comes_with_the_change_is_used(tmp_path: Path, fields: dict[str, str]) -> None:
    registries = made(tmp_path)
    patch(registries, password="new", **fields)
    assert registries.access("own", IMAGE).password == "new"


@pytest.mark.parametrize("fields", [{"url": "registry.test"}, {"ca_cert": CA}, {"name": "own"}, {"username": "you"}])
def test_what_exposes_nothing_keeps_the_password(tmp_path: Path, fields: dict[str, str]) -> None:
    registries = made(tmp_path)
    patch(registries, **fields)
    assert registries.access("own", IMAGE).password == "s3cret"


def test_leaving_plain_http_keeps_the_password(tmp_path: Path) -> None:
    registries = made(tmp_path, "http://registry.test")
    patch(registries, url="https://registry.test")
    assert registries.access("own", IMAGE).password == "s3cret"


def test_who_never_had_a_password_is_not_asked_for_it(tmp_path: Path) -> None:
    registries = Registries(Store(tmp_path / "state.db"), tmp_path, Clock())
    registries.create(RegistryBody(name="own", url="https://registry.test", username="me", password=""))
    patch(registries, url="http://registry.test")
    assert registries.access("own", IMAGE).password == ""

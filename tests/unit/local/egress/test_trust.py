"""The key store that is made for Java."""

from __future__ import annotations

from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import pkcs12

from gatewayd.local.egress import trust
from gatewayd.local.egress.authority import Authority


def _pem(folder: Path) -> bytes:
    """A certificate of an authority of its own."""
    folder.mkdir()
    return Authority(folder).pem.encode()


def _inside(store: bytes) -> list[x509.Certificate]:
    return [one.certificate for one in pkcs12.load_pkcs12(store, b"changeit").additional_certs]


def test_java_gets_the_own_certificate_and_a_limited_number_of_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own, *others = [_pem(tmp_path / str(at)) for at in range(4)]
    parsed = [x509.load_pem_x509_certificate(pem) for pem in (own, *others)]
    junk = b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"
    assert _inside(trust._for_java(own, junk + b"".join(others))) == parsed
    assert _inside(trust._for_java(own, b"".join(others) + own)) == parsed  # once, wherever it was
    assert _inside(trust._for_java(own, b"")) == parsed[:1]
    monkeypatch.setattr(trust, "_MAX_CERTIFICATES", 3)
    trust._for_java.cache_clear()
    assert _inside(trust._for_java(own, junk + b"".join(others))) == parsed[:2]  # what cannot be read counts too

"""The certificate authority of one installation: made at its first use, trusted inside its sandboxes and nowhere else.

Its key lies in the state directory for its owner's eyes alone, and is never told. What it signs are short-lived certificates for
the hosts whose connections are intercepted; their one private key is in this process's memory only.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import ssl
import threading
import time
from collections import OrderedDict
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

_CERTIFICATE, _KEY = "egress-ca.pem", "egress-ca.key"
_NAME = "gatewayd local, for sandboxes of this machine"
_YEARS = 10
_LEAF_DAYS = 30
_LEAF_AGE = 86400.0  # seconds a leaf's context is used
_MAX_LEAVES = 256  # kept


class AuthorityError(Exception):
    """The authority cannot be used; the message says why."""


class Authority:
    """Makes certificates in the name of hosts. Raises AuthorityError when its files cannot be used."""

    def __init__(self, folder: Path) -> None:
        self._lock = threading.Lock()
        try:
            self._key, self._certificate = _load(folder) or _make(folder)
        except (OSError, ValueError) as exc:
            raise AuthorityError(f"cannot use {_KEY} and {_CERTIFICATE} in the state directory: {exc}") from exc
        self._leaf_key = ec.generate_private_key(ec.SECP256R1())  # of all leaves
        self._contexts: OrderedDict[str, tuple[float, ssl.SSLContext]] = OrderedDict()  # host → (made at, context)

    @property
    def pem(self) -> str:
        """The authority's own certificate."""
        return self._certificate.public_bytes(serialization.Encoding.PEM).decode("ascii")

    def context(self, host: str) -> ssl.SSLContext:
        """For the server's side of a connection in the name of a host (canonical)."""
        now = time.monotonic()
        with self._lock:
            known = self._contexts.pop(host, None)
            if known is None or known[0] + _LEAF_AGE < now:
                known = (now, self._context(host))
            self._contexts[host] = known
            if len(self._contexts) > _MAX_LEAVES:
                self._contexts.popitem(last=False)
            return known[1]

    def _context(self, host: str) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.set_alpn_protocols(["http/1.1"])
        key = self._leaf_key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        chain = self._leaf(host).public_bytes(serialization.Encoding.PEM) + self.pem.encode()
        fd = os.memfd_create("leaf", os.MFD_CLOEXEC)  # ssl reads keys from files only: this one never touches a disk
        try:
            os.write(fd, key + chain)
            context.load_cert_chain(f"/proc/self/fd/{fd}")
        finally:
            os.close(fd)
        return context

    def _leaf(self, host: str) -> x509.Certificate:
        try:
            name: x509.GeneralName = x509.IPAddress(ip_address(host))
        except ValueError:
            name = x509.DNSName(host)
        builder = _builder(self._certificate.subject, _common_name("egress"), self._leaf_key.public_key(), _LEAF_DAYS)
        builder = builder.add_extension(x509.SubjectAlternativeName([name]), critical=False)
        builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        builder = builder.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        builder = builder.add_extension(_usage(digital_signature=True), critical=True)
        issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key())
        return builder.add_extension(issuer, critical=False).sign(self._key, hashes.SHA256())


def _common_name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _usage(**which: bool) -> x509.KeyUsage:
    names = ("digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement")
    all_names = (*names, "key_cert_sign", "crl_sign", "encipher_only", "decipher_only")
    return x509.KeyUsage(**{name: which.get(name, False) for name in all_names})


def _builder(issuer: x509.Name, subject: x509.Name, key: ec.EllipticCurvePublicKey, days: int) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    builder = x509.CertificateBuilder().issuer_name(issuer).subject_name(subject).public_key(key)
    builder = builder.serial_number(x509.random_serial_number())
    builder = builder.not_valid_before(now - datetime.timedelta(days=1)).not_valid_after(now + datetime.timedelta(days=days))
    return builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)


def _load(folder: Path) -> tuple[ec.EllipticCurvePrivateKey, x509.Certificate] | None:
    try:
        key: Any = serialization.load_pem_private_key((folder / _KEY).read_bytes(), None)
        certificate = x509.load_pem_x509_certificate((folder / _CERTIFICATE).read_bytes())
    except FileNotFoundError:
        return None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or certificate.public_key() != key.public_key():
        raise ValueError("they do not belong together: remove both")
    left = certificate.not_valid_after_utc - datetime.datetime.now(datetime.UTC)
    return (key, certificate) if left > datetime.timedelta(days=_LEAF_DAYS) else None


def _make(folder: Path) -> tuple[ec.EllipticCurvePrivateKey, x509.Certificate]:
    key = ec.generate_private_key(ec.SECP256R1())
    name = _common_name(_NAME)
    builder = _builder(name, name, key.public_key(), 366 * _YEARS)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    builder = builder.add_extension(_usage(key_cert_sign=True, crl_sign=True), critical=True)
    certificate = builder.sign(key, hashes.SHA256())
    secret = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    _write(folder / _KEY, secret)
    _write(folder / _CERTIFICATE, certificate.public_bytes(serialization.Encoding.PEM))
    return key, certificate


def _write(path: Path, content: bytes) -> None:
    draft = path.with_suffix(path.suffix + ".new")
    with contextlib.suppress(FileNotFoundError):
        draft.unlink()
    fd = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(fd)
    draft.rename(path)

"""Making a sandbox trust the authority that intercepts its connections: files inside, and variables that name them."""

from __future__ import annotations

import asyncio
import functools
import os
import threading
import warnings
from collections.abc import Mapping
from typing import Any

from gatewayd.local.runtime.base import Box, RuntimeFailure

_FOLDER = "/run/gatewayd"  # not on the sandbox's disk: made anew at each start
_OWN, _ALL, _JAVA = f"{_FOLDER}/ca.pem", f"{_FOLDER}/ca-bundle.pem", f"{_FOLDER}/truststore.p12"
_JAVA_PASSWORD = "changeit"  # noqa: S105 - Java's own default: the file holds certificates only
_STORES = (  # of Debian, Fedora, Alpine and others; the first that exists
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",
    "/etc/ssl/cert.pem",
)
_MAX_STORE = 4 << 20  # bytes
_MAX_CERTIFICATES = 1000  # that are looked at for Java; the largest stores have some hundreds
_one_at_a_time = threading.Lock()  # of the filters for warnings, which are the whole process's


def environment(config: Mapping[str, Any] | None) -> dict[str, str]:
    """The variables of every command in a sandbox with this stored proxy_config."""
    rules = [rule for rule in (config or {}).get("rules", ()) if rule.get("enabled", True)]
    made: dict[str, str] = {}
    if any(rule.get("headers") and rule.get("match_hosts") for rule in rules):
        for name in ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "GIT_SSL_CAINFO", "AWS_CA_BUNDLE"):
            made[name] = _ALL
        made["NODE_EXTRA_CA_CERTS"] = made["DENO_CERT"] = _OWN
        made["JAVA_TOOL_OPTIONS"] = (
            f"-Djavax.net.ssl.trustStore={_JAVA} -Djavax.net.ssl.trustStoreType=PKCS12 "
            f"-Djavax.net.ssl.trustStorePassword={_JAVA_PASSWORD}"
        )
    for rule in rules:
        made.update(rule.get("env_vars") or {})
    return made


async def install(box: Box, pem: str) -> None:
    """Put the authority's certificate where programs look. Raises OSError, RuntimeFailure."""
    store, content = await _store(box)
    own = pem.encode()
    everything = content if own.strip() in content else content.rstrip(b"\n") + b"\n" + own
    await _write(box, _OWN, own)
    await _write(box, _ALL, everything)
    await _write(box, _JAVA, await asyncio.to_thread(_for_java, own, content))  # parses what the sandbox chose
    if store is not None and everything is not content:
        await _write(box, store, everything)  # for programs that are started without the variables


async def _store(box: Box) -> tuple[str | None, bytes]:
    """The sandbox's own trust store, if it has one."""
    for path in _STORES:
        try:
            fd, info = await box.open_read(path, "root")
        except (OSError, RuntimeFailure):
            continue
        try:
            if info.st_size <= _MAX_STORE:
                return path, await asyncio.to_thread(os.pread, fd, _MAX_STORE, 0)
        finally:
            os.close(fd)
    return None, b""


async def _write(box: Box, path: str, content: bytes) -> None:
    writer = await box.open_write(path, "root")
    try:
        os.fchmod(writer.fd, 0o644)
        view = memoryview(content)
        while view:
            view = view[os.write(writer.fd, view) :]
        await writer.commit()
    except BaseException:
        await writer.abort()
        raise


@functools.lru_cache(maxsize=4)  # most sandboxes have the same
def _for_java(own: bytes, others: bytes) -> bytes:
    """The certificates as the key store that Java reads: `own`, and as many of the others as are looked at. Blocks."""
    bundle = own + b"\n" + others.replace(own.strip(), b"")  # first: it is never what is left out
    with _one_at_a_time:
        return _key_store(bundle)


def _key_store(bundle: bytes) -> bytes:
    from cryptography import x509
    from cryptography.hazmat.primitives.serialization import BestAvailableEncryption
    from cryptography.hazmat.primitives.serialization.pkcs12 import PKCS12Certificate, serialize_java_truststore

    found: list[PKCS12Certificate] = []
    for part in bundle.split(b"-----END CERTIFICATE-----", _MAX_CERTIFICATES)[:-1]:
        block = b"-----BEGIN CERTIFICATE-----" + part.rpartition(b"-----BEGIN CERTIFICATE-----")[2]
        try:
            with warnings.catch_warnings():  # about certificates that are older than the rules for them
                warnings.simplefilter("ignore")
                certificate = x509.load_pem_x509_certificate(block + b"-----END CERTIFICATE-----\n")
        except ValueError:
            continue  # the sandbox's own store may hold anything
        found.append(PKCS12Certificate(certificate, f"ca-{len(found)}".encode()))
    return serialize_java_truststore(found, BestAvailableEncryption(_JAVA_PASSWORD.encode())) if found else b""

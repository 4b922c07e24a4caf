"""Debian's docker-registry on loopback: with accounts, with TLS from an authority of the test's own, or plain and open."""

from __future__ import annotations

import datetime
import http.client
import ipaddress
import json
import socket
import ssl
import subprocess
import time
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from tests.images.maker import PASSED, Image, skopeo

USER, PASSWORD = "robot", "correct horse"
_DEADLINE = 15.0  # seconds


class Authority:
    """A certificate authority, and one server's certificate by it."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.ca = folder / "ca.pem"
        self.certificate = folder / "server.pem"
        self.key = folder / "server.key"
        own, server = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
        issuer = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test authority")])
        now = datetime.datetime.now(datetime.UTC)

        def certificate(name: x509.Name, key: ec.EllipticCurvePublicKey, *extensions: x509.ExtensionType) -> bytes:
            builder = x509.CertificateBuilder().subject_name(name).issuer_name(issuer).public_key(key)
            builder = builder.serial_number(x509.random_serial_number())
            builder = builder.not_valid_before(now - datetime.timedelta(hours=1))
            builder = builder.not_valid_after(now + datetime.timedelta(days=2))
            for extension in extensions:
                builder = builder.add_extension(extension, critical=isinstance(extension, x509.BasicConstraints))
            return builder.sign(own, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)

        self.ca.write_bytes(certificate(issuer, own.public_key(), x509.BasicConstraints(ca=True, path_length=0)))
        names = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1")), x509.DNSName("localhost")])
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
        self.certificate.write_bytes(certificate(subject, server.public_key(), names))
        plain = serialization.NoEncryption()
        pem = server.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain)
        self.key.write_bytes(pem)


class Registry:
    """A registry in a process of its own."""

    def __init__(self, folder: Path, authority: Authority | None = None, *, accounts: bool = True) -> None:
        folder.mkdir()
        self._folder = folder
        self._authority = authority
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            self.port = sock.getsockname()[1]
        self.host = f"127.0.0.1:{self.port}"
        self.url = f"{'https' if authority else 'http'}://{self.host}"
        self._accounts = accounts
        config: dict[str, object] = {
            "version": 0.1,
            "log": {"level": "error"},
            "storage": {"filesystem": {"rootdirectory": str(folder / "data")}},
            "http": {"addr": self.host},
        }
        if authority is not None:
            tls = {"certificate": str(authority.certificate), "key": str(authority.key)}
            config["http"] = {"addr": self.host, "tls": tls}
        if accounts:
            words = ["htpasswd", "-nbB", "-C", "4", USER, PASSWORD]
            (folder / "htpasswd").write_bytes(subprocess.run(words, check=True, capture_output=True).stdout)
            config["auth"] = {"htpasswd": {"realm": "test", "path": str(folder / "htpasswd")}}
        (folder / "config.yml").write_text(json.dumps(config))  # JSON is YAML
        with (folder / "log").open("wb") as log:
            command = ["docker-registry", "serve", str(folder / "config.yml")]
            self.process = subprocess.Popen(command, env=PASSED, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        self._wait()

    def _wait(self) -> None:
        context = ssl.create_default_context(cafile=str(self._authority.ca)) if self._authority else None
        end = time.monotonic() + _DEADLINE
        while True:
            try:
                if context is None:
                    connection = http.client.HTTPConnection(self.host, timeout=2)
                else:
                    connection = http.client.HTTPSConnection(self.host, timeout=2, context=context)
                connection.request("GET", "/v2/")
                connection.getresponse().read()
                connection.close()
            except OSError:
                assert time.monotonic() < end, (self._folder / "log").read_text()
                assert self.process.poll() is None, (self._folder / "log").read_text()
                time.sleep(0.05)
            else:
                return

    def push(self, image: Image, name: str) -> str:
        """Push an image; returns how to ask for it."""
        layout = image.layout(self._folder / f"push-{name.replace('/', '-').replace(':', '-')}")
        words = ["--dest-creds", f"{USER}:{PASSWORD}"] if self._accounts else []
        reference = f"{self.host}/{name}"
        skopeo("copy", "--dest-tls-verify=false", *words, f"oci:{layout}:image", f"docker://{reference}")
        return reference

    def blobs(self) -> Path:
        """Where its blobs lie."""
        return self._folder / "data/docker/registry/v2/blobs/sha256"

    def stop(self) -> None:
        """End it."""
        self.process.kill()
        self.process.wait()

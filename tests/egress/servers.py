"""Real HTTPS and HTTP servers of the test's own, on an address of this machine, with certificates of a CA made for the test."""

from __future__ import annotations

import base64
import contextlib
import datetime
import hashlib
import json
import socket
import ssl
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

NAMES = ("api.test", "other.test", "*.wild.test", "xn--bcher-kva.test")  # what the servers' certificate is for
_WEBSOCKET = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"  # RFC 6455 section 1.3


def own_address() -> str:
    """An address of this machine that is not its loopback; "" where there is none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, contextlib.suppress(OSError):
        probe.connect(("198.51.100.1", 9))
        return str(probe.getsockname()[0])
    return ""


def certificates(folder: Path) -> tuple[Path, Path]:
    """A CA's certificate, and a server's key and certificate in one file."""
    now = datetime.datetime.now(datetime.UTC)
    keys = [ec.generate_private_key(ec.SECP256R1()) for _ in range(2)]
    issuer = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "CA of a test")])
    made = []
    for key, ca in zip(keys, (True, False), strict=True):
        subject = issuer if ca else x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "server")])
        builder = x509.CertificateBuilder().issuer_name(issuer).subject_name(subject).public_key(key.public_key())
        builder = builder.serial_number(x509.random_serial_number())
        builder = builder.not_valid_before(now - datetime.timedelta(days=1)).not_valid_after(now + datetime.timedelta(days=2))
        builder = builder.add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
        if not ca:
            names = x509.SubjectAlternativeName([x509.DNSName(name) for name in NAMES])
            builder = builder.add_extension(names, critical=False)
        made.append(builder.sign(keys[0], hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
    ca_file, server_file = folder / "ca.pem", folder / "server.pem"
    ca_file.write_bytes(made[0])
    plain = serialization.NoEncryption()
    server_file.write_bytes(keys[1].private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain) + made[1])
    return ca_file, server_file


class Handler(BaseHTTPRequestHandler):
    """Records what it is asked; answers by the path."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Server

    def log_message(self, format: str, *args: Any) -> None:
        """Silent."""

    def do_GET(self) -> None:
        """/stream: two chunks, the second when the test says so; /ws: a WebSocket; else a short text."""
        self._note(b"")
        path = self.path.partition("?")[0]
        if path == "/ws":
            self._upgrade()
        elif path == "/stream":
            self.send_response(200)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            self.wfile.write(b"5\r\nfirst\r\n")
            self.server.go_on.wait(20)
            self.wfile.write(b"6\r\nsecond\r\n0\r\n\r\n")
        elif path == "/close":
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"until the end")
            self.close_connection = True
        elif path == "/big":
            self.send_response(200)
            self.send_header("Content-Length", str(8 << 20))
            self.end_headers()
            for _ in range(8):
                self.wfile.write(b"x" * (1 << 20))
        elif path in self.server.files:
            self._answer(self.server.files[path])
        else:
            self._answer(f"hello {path}".encode())

    do_DELETE = do_HEAD = do_GET  # noqa: N815 - as the base class names them

    def do_POST(self) -> None:
        """The body again."""
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline().split(b";")[0], 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            while self.rfile.readline().strip():
                pass
        else:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self._note(body)
        self._answer(body)

    do_PUT = do_POST  # noqa: N815

    def _note(self, body: bytes) -> None:
        entry = {"method": self.command, "path": self.path, "headers": dict(self.headers.items()), "body": body[:200]}
        self.server.seen.append(entry | {"size": len(body), "peer": self.client_address[1]})
        self.server.asked.set()

    def _answer(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _upgrade(self) -> None:
        key = self.headers["Sec-WebSocket-Key"] + _WEBSOCKET
        accept = base64.b64encode(hashlib.sha1(key.encode()).digest()).decode()  # noqa: S324 - as the RFC has it
        self.send_response(101)
        for name, value in (("Upgrade", "websocket"), ("Connection", "Upgrade"), ("Sec-WebSocket-Accept", accept)):
            self.send_header(name, value)
        self.end_headers()
        while data := self.connection.recv(65536):
            self.connection.sendall(data[::-1])
        self.close_connection = True


class Server(ThreadingHTTPServer):
    """One server. Its attributes are for the test."""

    daemon_threads = True

    def __init__(self, address: str, certificate: Path | None) -> None:
        super().__init__((address, 0), Handler)
        self.seen: list[dict[str, Any]] = []  # requests, in order
        self.asked = threading.Event()  # set by the first request
        self.go_on = threading.Event()  # lets /stream end
        self.files: dict[str, bytes] = {}  # by path
        self.names: list[str | None] = []  # what clients called it in TLS
        self.context: ssl.SSLContext | None = None
        if certificate is not None:
            self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            self.context.load_cert_chain(certificate)
            self.context.sni_callback = lambda _sock, name, _context: self.names.append(name)
        self.port: int = self.server_address[1]

    def finish_request(self, request: Any, client_address: Any) -> None:
        """TLS in the connection's own thread, then as always."""
        request.settimeout(30)
        try:
            # a connection that is reset before it says anything: wrap_socket would leave its descriptor open
            if not request.recv(1, socket.MSG_PEEK):
                return
            if self.context is not None:
                request = self.context.wrap_socket(request, server_side=True)
            super().finish_request(request, client_address)
        except OSError:
            pass  # the client has gone
        finally:
            with contextlib.suppress(OSError):
                request.close()

    def headers(self, name: str) -> list[str | None]:
        """One header of every request so far, in any case."""
        return [next((v for k, v in one["headers"].items() if k.lower() == name.lower()), None) for one in self.seen]

    def text(self) -> str:
        """All it has seen."""
        return json.dumps(self.seen, default=repr)


@contextlib.contextmanager
def serving(address: str, certificate: Path | None) -> Iterator[Server]:
    """A server for the length of a block."""
    server = Server(address, certificate)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.go_on.set()
        server.shutdown()
        server.server_close()
        thread.join(5)

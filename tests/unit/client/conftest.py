"""A daemon's two sockets, served by threads: the standard library's HTTP server on control.sock, scripts on connect.sock."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import ThreadingUnixStreamServer
from typing import Any

import pytest

PROJECT = Path(__file__).parents[3]
DEADLINE = 20.0  # seconds for anything in these tests

Answer = tuple[int, Any]
Script = Callable[[dict[str, Any], socket.socket], None]


class Daemon:
    """What the tests configure and look at."""

    def __init__(self, runtime: Path) -> None:
        self.runtime = runtime
        self.requests: list[tuple[str, str, Any, dict[str, str]]] = []  # method, target, decoded body, headers in lower case
        self.answers: dict[tuple[str, str], Answer | Callable[[Any], Answer]] = {}  # (method, path) → status and body
        self.script: Script | None = None  # serves one connection of connect.sock
        self.lines: list[dict[str, Any]] = []  # request lines of connect.sock

    def answer(self, method: str, path: str, body: Any, status: int = 200) -> None:
        """Answer `method` on `path` (without /v1 and query)."""
        self.answers[method, path] = (status, body)

    def error(self, method: str, path: str, status: int, kind: str, message: str, hint: str = "") -> None:
        """Answer with an error."""
        self.answer(method, path, {"error": {"kind": kind, "message": message, "hint": hint}}, status)


class _Handler(BaseHTTPRequestHandler):
    daemon: Daemon
    protocol_version = "HTTP/1.1"

    def _serve(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = json.loads(self.rfile.read(length)) if length else None
        self.daemon.requests.append((self.command, self.path, body, {k.lower(): v for k, v in self.headers.items()}))
        path = self.path.partition("?")[0].removeprefix("/v1")
        found = self.daemon.answers.get((self.command, path))
        if found is None:
            name = path.split("/")[2] if path.count("/") > 1 else path
            found = (404, {"error": {"kind": "not_found", "message": f"there is no sandbox {name!r}", "hint": ""}})
        status, value = found(body) if callable(found) else found
        data = b"" if value is None else json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_POST = do_PATCH = do_DELETE = _serve  # noqa: N815 - the server's own names

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing."""

    def address_string(self) -> str:
        """Unix sockets have none."""
        return ""


class _Server(ThreadingUnixStreamServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that has left before its answer is part of some tests."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


@pytest.fixture
def home(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A private environment with a short path: Unix sockets have little room for names."""
    directory = Path(tempfile.mkdtemp(prefix="gw-"))
    for name in list(os.environ):
        if name.startswith(("LANGSMITH_", "GATEWAYD_", "XDG_", "SSH_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(directory))
    monkeypatch.setenv("GATEWAYD_RUNTIME_DIR", str(directory / "run"))
    monkeypatch.setenv("GATEWAYD_STATE_DIR", str(directory / "state"))
    monkeypatch.setenv("NO_COLOR", "1")
    yield directory
    shutil.rmtree(directory)


@pytest.fixture
def daemon(home: Path) -> Iterator[Daemon]:
    """A daemon in that environment."""
    runtime = home / "run"
    runtime.mkdir(mode=0o700)
    served = Daemon(runtime)
    control = _Server(str(runtime / "control.sock"), type("Handler", (_Handler,), {"daemon": served}))
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(runtime / "connect.sock"))
    listener.listen(8)

    def connection(sock: socket.socket) -> None:
        with sock:
            line = b""
            while not line.endswith(b"\n"):
                byte = sock.recv(1)
                if not byte:
                    return
                line += byte
            request = json.loads(line)
            served.lines.append(request)
            if served.script is not None:
                served.script(request, sock)

    def accept() -> None:
        while True:
            try:
                sock, _ = listener.accept()
            except OSError:
                return
            sock.settimeout(DEADLINE)
            threading.Thread(target=connection, args=(sock,), daemon=True).start()

    threads = [threading.Thread(target=control.serve_forever, args=(0.02,)), threading.Thread(target=accept)]
    for thread in threads:
        thread.start()
    yield served
    control.shutdown()
    control.server_close()
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    for thread in threads:
        thread.join(DEADLINE)
        assert not thread.is_alive()


Spawn = Callable[..., "subprocess.Popen[bytes]"]


@pytest.fixture
def spawn(home: Path) -> Iterator[Spawn]:
    """Starts ``sandbox ARGS…`` as a process of its own, with pipes unless told otherwise; ends what is left over."""
    running: list[subprocess.Popen[bytes]] = []

    def start(*args: str, **options: Any) -> subprocess.Popen[bytes]:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "cwd": PROJECT}
        process = subprocess.Popen([sys.executable, "-m", "client", *args], **{**pipes, **options})
        running.append(process)
        return process

    yield start
    for process in running:
        if process.poll() is None:
            process.kill()
        process.communicate(timeout=DEADLINE)

"""A small blocking client of the guest protocol, written from docs/guest-protocol.md: it shares no code with either side."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ClassVar

GUEST = Path(__file__).parents[3] / "gatewayd" / "guest" / "guest.py"
DEADLINE = 20.0  # seconds for anything to happen

OPEN, INPUT, INPUT_EOF, GRANT, SIGNAL, RESIZE, STOP_OUTPUT, CLOSE = range(1, 9)
OPENED, OUTPUT, ERROUT, OUTPUT_EOF, CREDIT, EXIT, ERROR, ACCEPTED, INPUT_STOP, ITEM = range(0x41, 0x4B)
ACK, DETACHED = 0x80, 0x81


def fields(*pairs: tuple[str, str | bytes | int]) -> bytes:
    parts = []
    for key, value in pairs:
        raw = value if isinstance(value, bytes) else str(value).encode()
        parts.append(bytes([len(key)]) + key.encode() + struct.pack(">I", len(raw)) + raw)
    return b"".join(parts)


def parse(data: bytes) -> dict[str, bytes]:
    found = {}
    while data:
        key, data = data[1 : 1 + data[0]].decode("ascii"), data[1 + data[0] :]
        (size,) = struct.unpack(">I", data[:4])
        found[key], data = data[4 : 4 + size], data[4 + size :]
    return found


def until(what: Callable[[], object], message: str = "it did not happen") -> None:
    """Wait until `what` is true."""
    end = time.monotonic() + DEADLINE
    while not what():
        assert time.monotonic() < end, message
        time.sleep(0.005)


class Guest:
    """A guest of a test's own: a copy of the file with a content, hence a state folder, of its own."""

    running: ClassVar[set[Guest]] = set()  # started and not stopped

    def __init__(
        self, folder: Path, replace: tuple[str, str] = ("", ""), python: tuple[str, ...] = (sys.executable, "-I", "-S")
    ) -> None:
        source = GUEST.read_text()
        assert replace[0] in source
        self.path = folder / f"guest-{os.urandom(4).hex()}.py"
        source = source.replace(*replace) if replace[0] else source
        self.path.write_text(f"{source}# {os.urandom(8).hex()}\n")
        self.path.chmod(0o644)
        self.command = (*python, str(self.path))
        self.env: dict[str, str] | None = None  # of `start`
        self.port = 0
        self.token = b""
        self.pid = 0
        self.clients: list[Client] = []  # made by the present test
        self.open_at_start = 0  # descriptors of the idle guest

    def run_start(self) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*self.command, "start"],
            capture_output=True,
            text=True,
            timeout=30,
            env=self.env,
            stdin=subprocess.DEVNULL,
            check=False,
        )

    def start(self) -> Guest:
        done = self.run_start()
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        magic, version, port, token, pid = done.stdout.split()
        assert (magic, version, len(token)) == ("GATEWAYD-GUEST", "1", 64)
        self.port, self.token, self.pid = int(port), bytes.fromhex(token), int(pid)
        self.open_at_start = self.open_files()
        self.running.add(self)
        return self

    def open_files(self) -> int:
        return len(list(Path(f"/proc/{self.pid}/fd").iterdir()))

    def children(self) -> list[int]:
        return [int(pid) for pid in Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()]

    def folder(self) -> Path:
        found = [fd.readlink() for fd in Path(f"/proc/{self.pid}/fd").iterdir()]
        return next(path.parent for path in found if path.name == "alive")

    def dial(self) -> socket.socket:
        sock = socket.create_connection(("127.0.0.1", self.port), timeout=DEADLINE)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return sock

    def end_sessions(self) -> None:
        """Close what a test has left, or a failed one could not close."""
        for client in self.clients:
            client.cut()
        self.clients.clear()
        listing = Client(self).open(("kind", "list"))
        listing.wait(EXIT)
        for item in listing.items():
            left = Client(self, bytes.fromhex(item["id"].decode()))
            left.connect(2)
            left.send(CLOSE)
            left.cut()
        listing.close()
        self.clients.clear()

    def check_clean(self) -> None:
        """Nothing is left of the sessions: no child, no zombie, no descriptor."""
        until(lambda: self.children() == [], "children are left")
        until(lambda: self.open_files() <= self.open_at_start, "descriptors are left")

    def stop(self) -> None:
        if self not in self.running:
            return
        self.running.discard(self)
        if self.alive():
            folder = self.folder()
            os.kill(self.pid, signal.SIGTERM)
            until(lambda: not self.alive())
            shutil.rmtree(folder)

    def alive(self) -> bool:
        try:
            return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
        except (FileNotFoundError, ProcessLookupError):
            return False


class Refused(Exception):
    """The answer's status was not 0."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


class Client:
    """A session seen by its client. `connect` again after any break."""

    def __init__(self, guest: Guest, session_id: bytes | None = None, window: int = 1 << 20) -> None:
        self.guest = guest
        guest.clients.append(self)
        self.id = session_id or os.urandom(16)
        self.window = window
        self.sock: socket.socket | None = None
        self.received = 0  # numbered bytes that came whole
        self.acked = 0
        self.unacked: list[tuple[int, bytes]] = []  # (number of the first byte, frame)
        self.sent = 0  # numbered bytes queued
        self.buffer = bytearray()  # a frame that has not come whole
        self.credit = 262144
        self.most = max(window, 262144)  # credit that may never be exceeded
        self.allowed = {1: window, 2: window}
        self.output = {1: bytearray(), 2: bytearray()}
        self.eof: set[int] = set()
        self.events: list[tuple[int, bytes]] = []  # what is neither output nor credit nor ACK, in order
        self.auto_grant = True
        self.auto_ack = True

    def connect(self, mode: int = 0, token: bytes | None = None) -> Client:
        """Raises Refused, or ConnectionError when the guest closes without an answer."""
        self.cut()
        sock = self.guest.dial()
        sock.sendall(struct.pack(">4s32s16sBQ", b"GWG1", token or self.guest.token, self.id, mode, self.received))
        answer = b""
        while len(answer) < 21:
            data = sock.recv(21 - len(answer))
            if not data:
                sock.close()
                raise ConnectionError
            answer += data
        status, received, base, credit = struct.unpack(">BQQI", answer)
        if status:
            assert sock.recv(1) == b""
            sock.close()
            raise Refused(status)
        self.sock, self.buffer = sock, bytearray()
        if mode == 2:
            self.sent, self.received, self.credit = received, base, credit
            self.allowed = {1: 1 << 24, 2: 1 << 24}
            self.most = 1 << 24  # the session's window is not known
        else:
            assert base == self.received
        self.unacked = [(start, frame) for start, frame in self.unacked if start + len(frame) > received]
        assert not self.unacked or self.unacked[0][0] == received
        for _, frame in self.unacked:
            sock.sendall(frame)
        return self

    def cut(self) -> None:
        """The connection breaks."""
        if self.sock is not None:
            self.sock.close()
            self.sock = None

    def send(self, kind: int, payload: bytes = b"") -> None:
        frame = struct.pack(">BI", kind, len(payload)) + payload
        if kind < 0x80:
            self.unacked.append((self.sent, frame))
            self.sent += len(frame)
        if self.sock is not None:
            try:
                self.sock.sendall(frame)
            except OSError:
                self.cut()

    def open(self, *pairs: tuple[str, str | bytes | int]) -> Client:
        self.send(OPEN, fields(("window", self.window), *pairs))
        return self.connect() if self.sock is None else self

    def process(self, *args: str | bytes, **options: str | bytes | int) -> Client:
        return self.open(("kind", "process"), *(("arg", arg) for arg in args), *options.items())

    def opened(self) -> dict[str, bytes]:
        return self.wait(OPENED)

    def input(self, data: bytes) -> None:
        """Within the credit; reads frames while it waits for more."""
        view = memoryview(data)
        while view:
            while self.credit <= 0:
                self.pump()
            piece = view[: min(self.credit, 262144)]
            self.credit -= len(piece)
            self.send(INPUT, bytes(piece))
            view = view[len(piece) :]

    def ack(self) -> None:
        self.acked = self.received
        self.send(ACK, struct.pack(">Q", self.received))

    def pump(self) -> None:
        """Receive once. Raises ConnectionError when the connection is over."""
        assert self.sock is not None, "there is no connection"
        try:
            data = self.sock.recv(1 << 18)
        except ConnectionResetError:
            data = b""
        if not data:
            self.cut()
            raise ConnectionError
        self.feed(data)

    def feed(self, data: bytes) -> None:
        self.buffer += data
        while len(self.buffer) >= 5:
            kind, size = struct.unpack(">BI", self.buffer[:5])
            assert size <= 262144
            if len(self.buffer) < 5 + size:
                break
            payload = bytes(self.buffer[5 : 5 + size])
            del self.buffer[: 5 + size]
            if kind < 0x80:
                self.received += 5 + size
            self.frame(kind, payload)
        if self.auto_ack and self.received - self.acked >= 65536:
            self.ack()

    def frame(self, kind: int, payload: bytes) -> None:
        if kind in (OUTPUT, ERROUT):
            stream = kind - OUTPUT + 1
            assert stream not in self.eof
            self.allowed[stream] -= len(payload)
            assert self.allowed[stream] >= 0, "more output than was granted"
            self.output[stream] += payload
            if self.auto_grant:
                self.grant(stream, len(payload))
        elif kind == OUTPUT_EOF:
            assert payload[0] not in self.eof
            self.eof.add(payload[0])
        elif kind == CREDIT:
            self.credit += struct.unpack(">I", payload)[0]
            assert self.credit <= self.most
        elif kind == ACK:
            (count,) = struct.unpack(">Q", payload)
            assert count <= self.sent
            self.unacked = [(start, frame) for start, frame in self.unacked if start + len(frame) > count]
        else:
            self.events.append((kind, payload))

    def grant(self, stream: int, size: int) -> None:
        self.allowed[stream] += size
        self.send(GRANT, struct.pack(">BI", stream, size))

    def find(self, kind: int) -> dict[str, bytes] | None:
        return next((parse(payload) for each, payload in self.events if each == kind), None)

    def wait(self, kind: int) -> dict[str, bytes]:
        """The fields of the first such frame."""
        while (found := self.find(kind)) is None:
            assert kind == ERROR or self.find(ERROR) is None, self.find(ERROR)
            self.pump()
        return found

    def wait_until(self, what: Callable[[], object]) -> None:
        while not what():
            assert self.find(ERROR) is None, self.find(ERROR)
            self.pump()

    def wait_output(self, text: bytes, stream: int = 1) -> None:
        self.wait_until(lambda: text in self.output[stream])

    def wait_eof(self, *streams: int) -> None:
        self.wait_until(lambda: self.eof >= set(streams))

    def finish(self) -> dict[str, bytes]:
        """Everything up to the end of a process; its EXIT."""
        found = self.wait(EXIT)
        self.wait_eof(1, 2)
        return found

    def close(self) -> None:
        """CLOSE, and the guest's word that it came."""
        if self.sock is None:
            try:
                self.connect(1)
            except Refused:
                return
        self.send(CLOSE)
        with contextlib.suppress(ConnectionError):
            self.drain()
        assert not self.unacked

    def drain(self) -> None:
        """Receive until the guest closes the connection. Raises ConnectionError then."""
        while True:
            self.pump()

    def items(self) -> Iterator[dict[str, bytes]]:
        return (parse(payload) for kind, payload in self.events if kind == ITEM)

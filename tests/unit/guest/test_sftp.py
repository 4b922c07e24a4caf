"""SFTP as OpenSSH's client sees it, and what that client never does."""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.guest.guestclient import CLOSE, GUEST, Client, Guest, until

needs_sftp = pytest.mark.skipif(not shutil.which("sftp"), reason="needs OpenSSH's sftp")


def sftp(folder: Path, *commands: str) -> subprocess.CompletedProcess[str]:
    """Run commands in a batch; the first that fails ends it, unless it begins with '-'."""
    return subprocess.run(
        ["sftp", "-q", "-b", "-", "-D", f"{sys.executable} -I -S {GUEST} sftp"],
        input="\n".join(commands) + "\n",
        capture_output=True,
        text=True,
        timeout=120,
        cwd=folder,
        check=False,
    )


def good(folder: Path, *commands: str) -> str:
    done = sftp(folder, *commands)
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout


@needs_sftp
def test_files_go_both_ways(tmp_path: Path) -> None:
    data = os.urandom(50_000_000)
    (tmp_path / "a").write_bytes(data)
    (tmp_path / "a").chmod(0o640)
    os.utime(tmp_path / "a", (1_000_000_000, 1_100_000_000))
    good(tmp_path, f"put -p a {tmp_path}/b", f"get -p {tmp_path}/b c")
    for name in ("b", "c"):
        assert hashlib.sha256((tmp_path / name).read_bytes()).digest() == hashlib.sha256(data).digest()
        found = (tmp_path / name).stat()
        assert (found.st_mtime, found.st_mode & 0o7777) == (1_100_000_000, 0o640)


@needs_sftp
def test_an_interrupted_transfer_goes_on(tmp_path: Path) -> None:
    data = os.urandom(3_000_000)
    (tmp_path / "a").write_bytes(data)
    (tmp_path / "b").write_bytes(data[:1_234_567])
    good(tmp_path, f"reput a {tmp_path}/b")
    assert (tmp_path / "b").read_bytes() == data
    (tmp_path / "c").write_bytes(data[:7])
    good(tmp_path, f"reget {tmp_path}/a c")
    assert (tmp_path / "c").read_bytes() == data


@needs_sftp
def test_folders_go_both_ways(tmp_path: Path) -> None:
    for number in range(300):
        path = tmp_path / "tree" / f"d{number % 7}" / f"Näme {number}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(str(number))
    good(tmp_path, f"put -r tree {tmp_path}/copy", f"get -r {tmp_path}/copy back")
    done = subprocess.run(["diff", "-r", tmp_path / "tree", tmp_path / "back"], capture_output=True, check=False)
    assert done.returncode == 0, done.stdout
    big = tmp_path / "big"
    big.mkdir()
    for number in range(1500):
        (big / f"{number}").touch()
    assert len(good(tmp_path, f"ls -1 {big}").split()) == 1500 + 4  # and the command that sftp repeats


@needs_sftp
def test_names_links_and_modes(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("a")
    (tmp_path / "taken").write_text("taken")
    good(
        tmp_path,
        f"cd {tmp_path}",
        "rename a b",
        "ln -s b link",
        "ln b hard",
        "chmod 4711 b",
        "mkdir sub",
        "rename b sub/b",
        "rm hard",
        "mkdir empty",
        "rmdir empty",
    )
    assert str((tmp_path / "link").readlink()) == "b"
    assert (tmp_path / "sub/b").stat().st_mode & 0o7777 == 0o4711
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "sub", "taken"]
    good(tmp_path, f"cd {tmp_path}", "rename sub/b taken")  # as rename(2), over what is there
    assert (tmp_path / "taken").read_text() == "a"


@needs_sftp
def test_listings(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(12345))
    (tmp_path / "file").chmod(0o604)
    (tmp_path / "link").symlink_to("file")
    os.utime(tmp_path / "file", (1_000_000_000, 1_000_000_000))
    lines = {line.split()[-1]: line for line in good(tmp_path, f"ls -l {tmp_path}").splitlines()[1:]}
    words = lines[f"{tmp_path}/file"].split() if f"{tmp_path}/file" in lines else lines["file"].split()
    assert words[0] == "-rw----r--"
    assert words[4] == "12345"
    assert words[5:8] == ["Sep", "9", "2001"]
    assert "%" in good(tmp_path, f"df {tmp_path}")
    assert Path(good(tmp_path, f"cd {tmp_path}", "cd ..", "pwd").split()[-1]) == tmp_path.parent


@needs_sftp
@pytest.mark.parametrize(
    "command", ["get none", "cd none", "rmdir full", "mkdir full", "rm none", "put x none/x", "chmod 600 none"]
)
def test_failures_are_told(tmp_path: Path, command: str) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    (tmp_path / "x").touch()
    done = sftp(tmp_path, f"cd {tmp_path}", command)
    assert done.returncode == 1
    assert done.stderr.strip()


@needs_sftp
@pytest.mark.skipif(os.geteuid() == 0, reason="root may do everything")
def test_what_may_not_be_read(tmp_path: Path) -> None:
    (tmp_path / "secret").touch(mode=0)
    assert "ermission denied" in sftp(tmp_path, f"get {tmp_path}/secret x").stderr


class Raw:
    """Requests one by one."""

    def __init__(self) -> None:
        command: list[str | Path] = [sys.executable, "-I", "-S", GUEST, "sftp"]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.number = 0
        self.send(b"\x01" + struct.pack(">I", 3))
        assert self.receive()[:5] == b"\x02\0\0\0\x03"

    def send(self, packet: bytes) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(struct.pack(">I", len(packet)) + packet)
        self.process.stdin.flush()

    def receive(self) -> bytes:
        assert self.process.stdout is not None
        (size,) = struct.unpack(">I", self.process.stdout.read(4))
        return self.process.stdout.read(size)

    def ask(self, kind: int, *parts: bytes | int) -> tuple[int, bytes]:
        """Type and body of the answer; strings get their length, numbers are 32 bits."""
        self.number += 1
        body = b""
        for part in parts:
            body += struct.pack(">I", part) if isinstance(part, int) else struct.pack(">I", len(part)) + part
        self.send(bytes([kind]) + struct.pack(">I", self.number) + body)
        answer = self.receive()
        assert struct.unpack(">I", answer[1:5])[0] == self.number
        return answer[0], answer[5:]

    def status(self, kind: int, *parts: bytes | int) -> int:
        answer, body = self.ask(kind, *parts)
        assert answer == 101
        return int(struct.unpack(">I", body[:4])[0])

    def open(self, path: Path, flags: int) -> bytes:
        answer, body = self.ask(3, os.fsencode(path), flags, 0)
        assert answer == 102, body
        return body[4:]

    def u64(self, value: int) -> tuple[int, int]:
        return value >> 32, value & 0xFFFFFFFF


@pytest.fixture
def raw() -> Iterator[Raw]:
    raw = Raw()
    yield raw
    assert raw.process.stdin is not None
    assert raw.process.stdout is not None
    raw.process.stdin.close()
    assert raw.process.stdout.read() == b""
    raw.process.stdout.close()
    raw.process.wait(20)


def test_rename_is_not_over_what_is_there(raw: Raw, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_text(name)
        (tmp_path / f"d{name}").mkdir()
    names = {path.name: os.fsencode(path) for path in tmp_path.iterdir()}
    assert raw.status(18, names["a"], names["b"]) == 4
    assert raw.status(18, names["da"], names["db"]) == 4
    assert (tmp_path / "b").read_text() == "b"
    assert raw.status(18, names["a"], names["a"] + b"2") == 0
    assert raw.status(18, names["da"], names["da"] + b"2") == 0
    assert raw.status(200, b"posix-rename@openssh.com", names["a"] + b"2", names["b"]) == 0
    assert (tmp_path / "b").read_text() == "a"


def test_status_codes(raw: Raw, tmp_path: Path) -> None:
    path = os.fsencode(tmp_path)
    assert raw.status(17, path + b"/none") == 2
    assert raw.status(17, b"/etc/passwd/x") == 2
    assert raw.status(17, b"x" * 300) == 5
    assert raw.status(17, b"a\0b") == 5
    assert raw.status(99) == 8
    assert raw.status(200, b"no-such@example.org") == 8
    assert raw.status(4, b"\0\0\0\x09") == 4
    assert raw.status(4, b"what") == 4
    assert raw.status(12, b"") == 4
    raw.open(tmp_path / "x", 2 | 8 | 32)
    assert raw.status(3, path + b"/x", 2 | 8 | 32, 0) == 4  # exclusive


def test_a_fifo_stops_nothing(raw: Raw, tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    assert raw.status(3, os.fsencode(fifo), 2, 0) == 4
    handle = raw.open(fifo, 1)
    assert raw.status(5, handle, 0, 0, 100) == 1
    assert raw.status(4, handle) == 0


def test_reads_and_writes(raw: Raw, tmp_path: Path) -> None:
    path = tmp_path / "file"
    handle = raw.open(path, 1 | 2 | 8 | 16)
    assert raw.status(6, handle, *raw.u64(5_000_000_000), b"far") == 0
    assert raw.status(6, handle, 0, 0, b"near") == 0
    assert raw.ask(5, handle, 0, 0, 4) == (103, b"\0\0\0\x04near")
    assert raw.ask(5, handle, *raw.u64(5_000_000_000), 1000) == (103, b"\0\0\0\x03far")
    assert raw.status(5, handle, *raw.u64(5_000_000_003), 1000) == 1
    assert len(raw.ask(5, handle, 0, 0, 0xFFFFFFFF)[1]) == 261_120 + 4
    assert raw.status(200, b"fsync@openssh.com", handle) == 0
    attrs = raw.ask(8, handle)[1]
    assert struct.unpack(">IQ", attrs[:12]) == (15, 5_000_000_003)
    assert raw.status(10, handle, 1, *raw.u64(2)) == 0
    assert path.stat().st_size == 2
    assert raw.status(4, handle) == 0
    assert raw.status(4, handle) == 4
    handle = raw.open(path, 2 | 4)
    assert raw.status(6, handle, 0, 0, b"end") == 0  # appended, whatever the offset
    assert path.read_bytes() == b"neend"


def test_many_requests_at_once(raw: Raw, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(range(256)) * 400)
    handle = raw.open(tmp_path / "file", 1)
    for number in range(400):
        raw.send(b"\x05" + struct.pack(">II4sQI", number, 4, handle, number * 256, 256))
    for number in range(400):
        answer = raw.receive()
        assert struct.unpack(">BII", answer[:9]) == (103, number, 256)
        assert answer[9:] == bytes(range(256))


def test_attributes(raw: Raw, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(100))
    name = os.fsencode(path)
    assert raw.status(9, name, 1 | 4 | 8, *raw.u64(10), 0o100640, 1_000, 2_000) == 0
    found = path.stat()
    assert (found.st_size, found.st_mode & 0o7777, found.st_atime, found.st_mtime) == (10, 0o640, 1_000, 2_000)
    link = tmp_path / "link"
    link.symlink_to(path)
    assert raw.status(200, b"lsetstat@openssh.com", os.fsencode(link), 8, 5_000, 6_000) == 0
    assert (link.lstat().st_mtime, path.stat().st_mtime) == (6_000, 2_000)
    assert raw.status(200, b"lsetstat@openssh.com", os.fsencode(link), 2, os.getuid(), os.getgid()) == 0
    assert raw.status(9, name, 0x80000000, 1, b"ext", b"data") == 0
    mode = struct.unpack(">IQIII", raw.ask(7, os.fsencode(link))[1][:24])[4]
    assert stat.S_ISLNK(mode)


def test_paths(raw: Raw, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    base = os.fsencode(tmp_path.resolve())

    def name(kind: int, *parts: bytes) -> bytes:
        answer, body = raw.ask(kind, *parts)
        assert answer == 104, body
        (size,) = struct.unpack(">I", body[4:8])
        return body[8 : 8 + size]

    assert name(16, base + b"/link/../real/new") == base + b"/real/new"
    assert raw.status(16, base + b"/none/none") == 2
    assert name(16, b"") == os.fsencode(Path.cwd())
    home = os.fsencode(Path("~").expanduser().resolve())
    assert name(200, b"expand-path@openssh.com", b"~") == home
    assert name(200, b"expand-path@openssh.com", b"~/new") == home + b"/new"
    assert name(200, b"home-directory", b"") == home
    assert name(19, base + b"/link") == b"real"
    assert raw.status(20, b"target first", base + b"/made") == 0
    assert str((tmp_path / "made").readlink()) == "target first"
    odd = base + b"/\xff\xfe"
    assert raw.status(14, odd, 4, 0o700) == 0
    assert name(16, odd) == odd


def test_copies_within(raw: Raw, tmp_path: Path) -> None:
    data = os.urandom(1_000_000)
    (tmp_path / "a").write_bytes(data)
    source, target = raw.open(tmp_path / "a", 1), raw.open(tmp_path / "b", 2 | 8)
    assert raw.status(200, b"copy-data", source, 0, 0, 0, 0, target, 0, 0) == 0
    assert (tmp_path / "b").read_bytes() == data
    assert raw.status(200, b"copy-data", source, 0, 10, 0, 5, target, 0, 0) == 0
    assert (tmp_path / "b").read_bytes()[:6] == data[10:15] + data[5:6]
    assert raw.status(200, b"copy-data", source, 0, 0, 0, 0, source, 0, 0) == 4


def test_names_of_ids(raw: Raw) -> None:
    answer, body = raw.ask(200, b"users-groups-by-id@openssh.com", struct.pack(">II", 0, 4_000_000_000), struct.pack(">I", 0))
    assert answer == 201
    assert body == b"\0\0\0\x0c\0\0\0\x04root\0\0\0\0" + b"\0\0\0\x08\0\0\0\x04root"


def test_limits(raw: Raw, tmp_path: Path) -> None:
    answer, body = raw.ask(200, b"limits@openssh.com")
    packet, read, write, handles = struct.unpack(">4Q", body)
    assert (answer, packet, read, write) == (201, 262144, 261120, 261120)
    assert handles >= 128
    (tmp_path / "x").touch()
    opened = [raw.open(tmp_path / "x", 1) for _ in range(handles)]
    assert raw.status(3, os.fsencode(tmp_path / "x"), 1, 0) == 4
    assert raw.status(11, os.fsencode(tmp_path)) == 4
    assert raw.status(4, opened[5]) == 0
    assert raw.open(tmp_path / "x", 1) not in opened


@pytest.mark.parametrize(
    "data",
    [
        bytes(4),
        b"\xff\xff\xff\xff",
        b"\0\x04\0\x01",
        b"\0\0\0\x03\x05\0\0",
        b"\0\0\0\x09\x11\0\0\0\x01\0\0\0\x09",
    ],
)
def test_bad_packets_end_it(data: bytes) -> None:
    done = subprocess.run([sys.executable, "-I", "-S", GUEST, "sftp"], input=data, capture_output=True, timeout=30, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (11, b"", b"")


# -- as a session of the guest


def test_a_session(guest: Guest, tmp_path: Path) -> None:
    client = Client(guest).open(("kind", "sftp"), ("cwd", str(tmp_path)), ("linger", 60))
    client.opened()
    client.input(b"\0\0\0\x05\x01\0\0\0\x03")
    client.wait_output(b"copy-data")
    client.cut()
    client.connect(1)
    client.input(b"\0\0\0\x0a\x10\0\0\0\x01\0\0\0\x01.")
    client.wait_output(os.fsencode(tmp_path.resolve()))
    assert 2 in client.eof
    client.close()


def test_its_worker_holds_nothing_of_the_guest_s(guest: Guest) -> None:
    other = Client(guest).process("cat", pty=1)
    other.opened()
    client = Client(guest).open(("kind", "sftp"))
    pid = int(client.opened()["pid"])
    assert sorted(path.name for path in Path(f"/proc/{pid}/fd").iterdir()) == ["0", "1", "2"]
    client.send(CLOSE)
    until(lambda: pid not in guest.children())
    other.close()
    client.cut()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to run as somebody else")
def test_as_another_user(guest: Guest) -> None:
    client = Client(guest).open(("kind", "sftp"), ("user", "nobody"))
    client.input(b"\0\0\0\x05\x01\0\0\0\x03" + b"\0\0\0\x18\x0b\0\0\0\x01\0\0\0\x0f/root/.ssh/none")
    client.wait_output(b"ermission denied")
    client.close()

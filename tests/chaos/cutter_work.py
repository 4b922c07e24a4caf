"""What runs while links are cut: each work notices a byte that is lost, repeated or out of order, in either direction."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import threading
from collections.abc import Iterator
from pathlib import Path

from tests.chaos.cutter_talk import DEADLINE, Talk
from tests.chaos.cutter_world import World
from tests.e2e.conftest import BIN, Tunnel

BLOCK = 65536  # bytes
BATCH = 20  # lines, or rows, of one round
PACE = 0.02  # seconds between two blocks or rounds of what would use the whole machine

NUMBERS = """
import sys, threading
lock, over = threading.Lock(), threading.Event()
def say(text):
    with lock:
        sys.stdout.write(text + "\\n")
        sys.stdout.flush()
def count():
    number = 0
    while not over.wait(0.01):
        number += 1
        say("tick %d" % number)
    say("ticks %d" % number)
counter = threading.Thread(target=count)
counter.start()
for line in iter(sys.stdin.readline, "quit\\n"):
    say("echo " + line[:-1])
over.set()
counter.join()
sys.exit(7)
"""


START_NUMBERS = "stty -echo -onlcr; exec python3 /root/numbers.py"


class Work(threading.Thread):
    """Goes on, round after round, until `over`; then one round more: it is still alive."""

    label = ""  # what it is, for messages
    patience = DEADLINE  # seconds without a sign of life after which it has failed

    def __init__(self, world: World, box: str, seed: int) -> None:
        super().__init__(name=self.label)
        self.world = world
        self.box = box
        self.random = random.Random(f"{seed} {self.label}")  # noqa: S311 - repeatable, not secret
        self.folder = world.gateway.root / "work" / box / self.label
        self.folder.mkdir(parents=True)
        self.over = threading.Event()  # the links are left alone from now on
        self.begun = threading.Event()  # its session is up
        self.rounds = 0  # that are done
        self.error: BaseException | None = None  # why it ended before its time

    def run(self) -> None:
        try:
            with self.going():
                self.begun.set()
                more = True
                while more:
                    more = not self.over.is_set()
                    self.once()
                    self.rounds += 1
                    self.over.wait(PACE)
                self.finish()
        except BaseException as exc:  # noqa: BLE001 - told by the thread that waits
            self.error = exc

    @contextlib.contextmanager
    def going(self) -> Iterator[None]:
        """Around everything."""
        yield

    def once(self) -> None:
        """One round."""
        raise NotImplementedError

    def finish(self) -> None:
        """The orderly end."""

    def talk(self, *argv: str | Path, terminal: bool = False) -> Talk:
        errors = self.folder / "stderr"
        return Talk(argv, self.world.gateway.env, errors, terminal=terminal, patience=self.patience)


class Terminal(Work):
    """An interactive pty: numbered lines come, numbered lines go and are echoed."""

    label = "terminal"

    @contextlib.contextmanager
    def going(self) -> Iterator[None]:
        self.ticks = self.typed = 0
        self.world.gateway.sandbox("exec", self.box, "--", "sh", "-c", "cat > /root/numbers.py", stdin=NUMBERS)
        with self.open() as self.program:
            while not self.program.line().endswith("tick 1"):  # behind what a shell says
                pass
            self.ticks = 1
            yield

    def open(self) -> Talk:
        """The program with a terminal in the sandbox."""
        return self.talk(*self.world.ssh.argv("-tt", self.box, START_NUMBERS))

    def once(self) -> None:
        for _ in range(BATCH):
            self.typed += 1
            text = f"{self.typed} {'x' * self.random.randrange(150)}"
            self.program.send(f"{text}\n".encode())
            assert self.other_line() == f"echo {text}"

    def finish(self) -> None:
        self.program.send(b"quit\n")
        assert self.other_line() == f"ticks {self.ticks}"
        assert self.program.ended() == 7

    def other_line(self) -> str:
        """The next one that is not counted by itself."""
        while (line := self.program.line()).startswith("tick "):
            self.ticks += 1
            assert line == f"tick {self.ticks}"
        return line


class Console(Terminal):
    """The same by `sandbox console`."""

    label = "console"

    def open(self) -> Talk:
        console = self.talk(BIN / "sandbox", "console", self.box, "--shell", "/bin/sh", terminal=True)
        console.prompted()
        console.send(f"{START_NUMBERS}\n".encode())
        return console


class Files(Work):
    """sftp: a large file there and back, over one session."""

    label = "sftp"
    size = 8 << 20  # bytes of the file

    @contextlib.contextmanager
    def going(self) -> Iterator[None]:
        with self.talk(*self.world.ssh.argv("-b", "-", self.box, program="sftp")) as self.sftp:
            self.sftp.send(b"pwd\n")
            while not self.sftp.line().startswith("Remote working directory"):
                pass
            yield

    def once(self) -> None:
        source, copy = self.folder / "source", self.folder / "copy"
        size = min(self.size, 1 << 20) if self.over.is_set() else self.size  # the last one is a sign of life
        digest = write_random(source, size, self.random)
        copy.unlink(missing_ok=True)
        orders = f"put {source} /root/file\nget /root/file {copy}\n!echo done {self.rounds}\n"
        self.sftp.send(orders.encode())
        while self.sftp.line() != f"done {self.rounds}":
            pass
        assert digest_of(copy) == digest

    def finish(self) -> None:
        self.sftp.send(b"rm /root/file\n")
        self.sftp.close_input()
        assert self.sftp.ended() == 0


class Tree(Work):
    """rsync: a tree there and back."""

    label = "rsync"
    size = 4 << 20  # bytes of its large file
    count = 200  # of its small files

    def once(self) -> None:
        source, copy = self.folder / "source", self.folder / "copy"
        for number in range(self.count):
            path = source / str(number % 7) / f"file {number}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(self.random.randbytes(self.random.randrange(3000)))
        write_random(source / "large", self.size, self.random)
        self.rsync(f"{source}/", f"{self.box}:/root/tree/")
        self.rsync(f"{self.box}:/root/tree/", f"{copy}/")
        assert tree_of(copy) == tree_of(source)

    def rsync(self, source: str, target: str) -> None:
        shell = f"ssh -F {self.world.ssh.config}"
        with self.talk("rsync", "-a", "--delete", "--ignore-times", "-e", shell, source, target) as rsync:
            assert rsync.ended() == 0, rsync.said


class Binary(Work):
    """`sandbox exec`: every byte value, both ways at the same time, in one stream."""

    label = "exec"
    ahead = 32  # blocks on their way

    @contextlib.contextmanager
    def going(self) -> Iterator[None]:
        self.expected = random.Random(self.random.random())  # noqa: S311 - repeatable, not secret
        self.sender = random.Random()  # noqa: S311
        self.sender.setstate(self.expected.getstate())
        self.room = threading.Semaphore(self.ahead)
        with self.talk(BIN / "sandbox", "exec", self.box, "--", "cat") as self.process:
            self.rest = b""
            yield

    def once(self) -> None:
        """A burst there, read back meanwhile."""
        feeder = threading.Thread(target=self.feed)
        feeder.start()
        try:
            for _ in range(self.ahead):
                block = self.rest
                while len(block) < BLOCK:
                    data = self.process.some()
                    assert data, self.process.said
                    block += data
                self.rest = block[BLOCK:]
                assert block[:BLOCK] == self.expected.randbytes(BLOCK)
        finally:
            feeder.join(DEADLINE)
        assert not self.rest

    def feed(self) -> None:
        with contextlib.suppress(OSError):  # the reader learns of it
            for _ in range(self.ahead):
                self.process.send(self.sender.randbytes(BLOCK))

    def finish(self) -> None:
        self.process.close_input()
        assert self.process.some() == b""
        assert self.process.ended() == 0


class Rows(Work):
    """psql through a resumable forward: one session, numbered inserts."""

    label = "psql"

    def __init__(self, world: World, box: str, seed: int, tunnel: Tunnel) -> None:
        super().__init__(world, box, seed)
        self.tunnel = tunnel
        self.number = 0  # of the last row

    @contextlib.contextmanager
    def going(self) -> Iterator[None]:
        options = ("-h", "127.0.0.1", "-U", "demo", "-d", "postgres", "-v", "ON_ERROR_STOP=1", "-qAt")
        with self.talk("psql", "-p", str(self.tunnel.port), *options) as self.psql:
            self.psql.send(b"create table numbers (id serial, n int, filler text);\nselect pg_backend_pid();\n")
            self.backend = self.psql.line()
            yield

    def once(self) -> None:
        for _ in range(BATCH):
            self.number += 1
            filler = self.random.randbytes(500).hex()
            order = f"insert into numbers (n, filler) values ({self.number}, '{filler}') returning n, filler;\n"  # noqa: S608 - hex
            self.psql.send(order.encode())
            assert self.psql.line() == f"{self.number}|{filler}"

    def finish(self) -> None:
        self.psql.send(b"select count(*), max(n), bool_and(n = id) from numbers;\nselect pg_backend_pid();\n")
        assert self.psql.line() == f"{self.number}|{self.number}|t"
        assert self.psql.line() == self.backend
        self.psql.close_input()
        assert self.psql.ended() == 0


def write_random(path: Path, size: int, source: random.Random) -> str:
    """A file of that size; its SHA-256."""
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for start in range(0, size, 1 << 20):
            data = source.randbytes(min(1 << 20, size - start))
            digest.update(data)
            file.write(data)
    return digest.hexdigest()


def digest_of(path: Path) -> str:
    """Its SHA-256."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tree_of(root: Path) -> dict[str, tuple[int, int, str]]:
    """Every path below: mode, time of change, content."""
    found = {}
    for path in sorted(root.rglob("*")):
        info = path.lstat()
        found[os.fspath(path.relative_to(root))] = (
            info.st_mode,
            int(info.st_mtime) if path.is_file() else 0,
            digest_of(path) if path.is_file() else "",
        )
    return found

"""The link between daemon and service is broken in every way a network knows, while everything runs over it."""

from __future__ import annotations

import contextlib
import os
import random
import secrets
import shutil
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.chaos.cutter import Cut
from tests.chaos.cutter_talk import DEADLINE, Talk
from tests.chaos.cutter_work import Binary, Console, Files, Rows, Terminal, Tree, Work
from tests.chaos.cutter_world import World, world
from tests.e2e.conftest import BIN, Tunnel, make, serve, wait_until
from tests.e2e.test_databases import START_POSTGRES

NEEDED = ("bwrap", "ssh", "sftp", "rsync", "psql")
pytestmark = [
    pytest.mark.skipif(not all(map(shutil.which, NEEDED)), reason=f"needs {', '.join(NEEDED)}"),
    pytest.mark.skipif(not list(Path("/usr/lib/postgresql").glob("*/bin/postgres")), reason="needs PostgreSQL's server"),
]

SEED = "GATEWAYD_CHAOS_SEED"  # in the environment: repeat a run
POSTGRES = 5432
ECHO = 9000  # port
SERVE_ECHO = ["socat", f"TCP-LISTEN:{ECHO},fork,reuseaddr", "EXEC:cat"]


def seeded() -> int:
    """The seed of this run, printed."""
    seed = int(os.environ.get(SEED) or secrets.randbits(32))
    print(f"{SEED}={seed}")
    return seed


def plan(rng: random.Random, count: int, longest: float, frozen: float) -> list[tuple[Cut, float]]:
    """Cuts and how long they last: of every kind equally many, in a random order; one freeze of `frozen` seconds."""
    cuts = [list(Cut)[number % len(Cut)] for number in range(count)]
    rng.shuffle(cuts)
    lengths = [rng.uniform(0.1, longest) if cut.lasts else 0.0 for cut in cuts]
    lengths[cuts.index(Cut.FREEZE)] = frozen
    return list(zip(cuts, lengths, strict=True))


@pytest.fixture(scope="module")
def quick() -> Iterator[World]:
    """Dead links are noticed within two seconds."""
    with world(interval=0.5, timeout=1.5) as made:
        yield made


@pytest.fixture(scope="module")
def echo(quick: World) -> str:
    """A sandbox with an echo server."""
    box = make(quick.gateway, "echo")
    serve(quick.gateway, box, ECHO, SERVE_ECHO)
    return box


def check(works: list[Work]) -> None:
    """Whatever went wrong, all of it."""
    wrong = [f"{work.label}, round {work.rounds}: {type(work.error).__name__}: {work.error}" for work in works if work.error]
    assert not wrong, "\n".join(wrong)


def chaos(quick: World, works: list[Work], cuts: list[tuple[Cut, float]], rng: random.Random) -> None:
    """Strike while the works run."""
    with running(works):
        for number, (cut, seconds) in enumerate(cuts):
            check(works)
            wait_until(lambda: quick.cutter.live, "there is a link to cut", DEADLINE)
            rounds = {work.label: work.rounds for work in works}
            hit = quick.cutter.strike(cut, seconds)
            print(f"{time.strftime('%T')} cut {number}: {cut.value} {seconds:.1f} s, {hit} links, {rounds}")
            works[0].over.wait(rng.uniform(0.05, 1.0))
    quick.cutter.heal()


@contextlib.contextmanager
def running(works: list[Work]) -> Iterator[None]:
    """Start the works, and afterwards see how they have come out of it."""
    for work in works:
        work.start()
    try:
        wait_until(lambda: all(work.begun.is_set() or work.error for work in works), "everything runs", DEADLINE)
        yield
    finally:
        for work in works:
            work.over.set()
        for work in works:
            work.join(work.patience)
    check(works)
    assert not [work.label for work in works if work.is_alive()]
    print({work.label: work.rounds for work in works})


@pytest.mark.parametrize(
    ("count", "size", "longest", "frozen"),
    [(12, 4 << 20, 1.0, 2.5), pytest.param(100, 1 << 30, 6.0, 30.0, marks=[pytest.mark.slow, pytest.mark.timeout(3000)])],
)
def test_nothing_is_lost_while_links_break(quick: World, count: int, size: int, longest: float, frozen: float) -> None:
    seed = seeded()
    rng = random.Random(seed)  # noqa: S311 - repeatable, not secret
    box = make(quick.gateway, f"box-{count}")
    quick.gateway.sh(box, START_POSTGRES)
    with quick.gateway.tunnel(box, POSTGRES, "--resumable") as tunnel:
        files = Files(quick, box, seed)
        files.size, files.patience = size, 1500.0
        works: list[Work] = [files, *(work(quick, box, seed) for work in (Terminal, Tree, Binary))]
        works.append(Rows(quick, box, seed, tunnel))
        chaos(quick, works, plan(rng, count, longest, frozen), rng)
        assert tunnel.complaints == []


ENDS = [cut for cut in Cut if cut is not Cut.FREEZE]  # what a connection that cannot be resumed does not survive


@pytest.mark.parametrize("cut", ENDS, ids=[cut.name.lower() for cut in ENDS])
def test_a_plain_forward_ends(quick: World, echo: str, cut: Cut) -> None:
    """Whoever uses it sees the end, or a reset, instead of waiting for ever; and can connect again."""
    with quick.gateway.tunnel(echo, ECHO) as tunnel, tunnel.connect() as sock:
        sock.settimeout(DEADLINE)
        sock.sendall(b"before")
        assert sock.recv(6, socket.MSG_WAITALL) == b"before"
        if not cut.lasts:
            quick.cutter.strike(cut)
            ended(sock)
        else:
            quick.cutter.begin(cut)
            ended(sock)
            quick.cutter.end(cut)
        with tunnel.connect() as again:
            again.settimeout(DEADLINE)
            again.sendall(b"after")
            assert again.recv(5, socket.MSG_WAITALL) == b"after"
    quick.cutter.heal()


def test_a_plain_forward_outlasts_a_short_freeze(quick: World, echo: str) -> None:
    with quick.gateway.tunnel(echo, ECHO) as tunnel, tunnel.connect() as sock:
        sock.settimeout(DEADLINE)
        sock.sendall(b"before")
        quick.cutter.strike(Cut.FREEZE, 0.5)
        sock.sendall(b"after")
        assert sock.recv(11, socket.MSG_WAITALL) == b"beforeafter"


def test_exec_and_console_come_through_restarts(quick: World) -> None:
    """Of the daemon, killed or stopped in order, ten times."""
    seed = seeded()
    rng = random.Random(seed)  # noqa: S311 - repeatable, not secret
    box = make(quick.gateway, "restarts")
    works: list[Work] = [Binary(quick, box, seed), Console(quick, box, seed)]
    with running(works):
        for number in range(10):
            pid = quick.gateway.daemon_pid
            print(f"{time.strftime('%T')} restart {number}: { ({work.label: work.rounds for work in works}) }")
            if rng.random() < 0.5:
                os.kill(pid, signal.SIGKILL)
            else:
                quick.gateway.sandbox("down", "--keep-local")
            before = {work: work.rounds for work in works}
            wait_until(lambda: go_on(before), "both go on", DEADLINE)  # noqa: B023 - called here
            check(works)
            assert quick.gateway.daemon_pid != pid, number


def go_on(before: dict[Work, int]) -> bool:
    """Whether every work has done a whole round since `before`, or cannot."""
    return all(work.rounds > rounds + 1 or work.error for work, rounds in before.items())


def test_sessions_end_with_their_sandbox(quick: World) -> None:
    """Each says so, and nothing starts it again."""
    box = make(quick.gateway, "halted")
    serve(quick.gateway, box, ECHO, SERVE_ECHO)
    folder = quick.gateway.root / "endings"
    folder.mkdir()
    command = "echo up; exec sleep 1000"
    ssh, sandbox = quick.ssh.argv, BIN / "sandbox"
    commands: dict[str, list[str | Path]] = {
        "command": [*ssh(box, command)],
        "terminal": [*ssh("-tt", box, command)],
        "sftp": [*ssh("-b", "-", box, program="sftp")],
        "exec": [sandbox, "exec", box, "--", "sh", "-c", command],
        "console": [sandbox, "console", box, "--shell", "/bin/sh"],
    }
    with contextlib.ExitStack() as stack:
        talks = {
            name: stack.enter_context(Talk(argv, quick.gateway.env, folder / name, terminal=name == "console"))
            for name, argv in commands.items()
        }
        info = ("--log-level", "info")
        tunnels = [stack.enter_context(quick.gateway.tunnel(box, ECHO, *info, *more)) for more in ((), ("--resumable",))]
        socks = [stack.enter_context(tunnel.connect()) for tunnel in tunnels]
        for sock in socks:
            sock.settimeout(DEADLINE)
            sock.sendall(b"up\n")
            assert sock.recv(3, socket.MSG_WAITALL) == b"up\n"
        talks["sftp"].send(b"pwd\n")
        for talk in talks.values():
            talk.prompted()
        quick.gateway.sandbox("stop", box)
        for name, talk in talks.items():
            wait_until(lambda talk=talk: " stopped" in talk.said, f"{name} says so")  # type: ignore[misc]
            assert box in talk.said
            if name == "sftp":  # it looks after its ssh when it has something to do, and then fails in one of two ways
                talk.send(b"ls /\n")
            codes = {"sftp": (255, -signal.SIGPIPE), "exec": (69,), "console": (69,)}.get(name, (255,))
            assert talk.ended() in codes, (name, talk.said)
        for sock, tunnel in zip(socks, tunnels, strict=True):
            ended(sock)
            wait_until(lambda tunnel=tunnel: said_by(tunnel, "closed"), "the tunnel says so")  # type: ignore[misc]
        assert said_by(tunnels[1], "was stopped")
        assert quick.gateway.json("status", box)["status"] == "stopped"


def said_by(tunnel: Tunnel, word: str) -> bool:
    """Whether it has used that word."""
    return any(word in line for line in tunnel.complaints)


def ended(sock: socket.socket) -> None:
    """Wait for the end of the stream, or a reset."""
    with contextlib.suppress(ConnectionResetError):
        assert sock.recv(1) == b""

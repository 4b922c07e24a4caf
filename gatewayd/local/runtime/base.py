"""The seam between the embedded service and whatever really runs a sandbox.

A `Runtime` makes and removes boxes; a `Box` is one running sandbox: it spawns processes, connects to ports and opens files
*inside* the sandbox's own namespaces, and hands plain descriptors out. Everything a box says comes from hostile ground.
"""

from __future__ import annotations

import asyncio
import os
import re
import socket
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol


class RuntimeFailure(Exception):
    """The runtime cannot do what was asked: the message is fit for a user, without host paths."""


class PortRefused(Exception):
    """Nothing accepts connections on that port inside the sandbox."""


@dataclass(frozen=True)
class Network:
    """Which addresses a sandbox's way out leads to, before the service looks at a connection: all but those closed."""

    closed: tuple[str, ...]  # CIDR; refused at once, as if nobody listened there
    opened: tuple[str, ...] = ()  # CIDR; exceptions from that


@dataclass(frozen=True)
class BoxSpec:
    """What a sandbox is made of, fixed for one run (from start to stop)."""

    id: str  # stable identity: names the directory on disk
    hostname: str  # the sandbox's name, a DNS label
    vcpus: float | None = None  # CPUs' worth of time; None: no limit
    mem_bytes: int | None = None  # memory limit; None: no limit
    fs_capacity_bytes: int | None = None  # size of the writable disk; None: no limit. Grows at a start, never shrinks
    layers: tuple[str, ...] = ()  # what a new disk lies on, topmost first; empty: the default snapshot
    network: Network | None = None  # a way out by way of the service; None: none


@dataclass(frozen=True)
class SpawnSpec:
    """One process to start inside a sandbox."""

    argv: Sequence[str]  # argv[0] is looked up in env's PATH inside the sandbox
    env: Mapping[str, str] = field(default_factory=dict)  # laid over the box's base environment (PATH, HOME, USER, LANG…)
    cwd: str | None = None  # None: the user's home
    user: str | None = None  # name, uid, name:group or uid:gid; None: root
    pty: bool = False  # a controlling terminal instead of three pipes
    cols: int = 80
    rows: int = 24


@dataclass(frozen=True)
class Finding:
    """One thing that a runtime needs of this machine, and whether it is there."""

    what: str  # short name: "user namespaces"
    ok: bool  # False: sandboxes do not start, or one of their limits is not enforced; `detail` says which
    detail: str  # what was found
    remedy: str = ""  # what to do about it, when not ok: one line, a command if there is one


class Process(Protocol):
    """A process inside a sandbox, leader of its own session and process group."""

    pid: int  # as seen inside the sandbox
    stdin: int  # descriptor to write to, non-blocking; with a pty, the same descriptor as stdout. The caller closes them all
    stdout: int  # descriptor to read from, non-blocking; a pty master reads EIO at its end
    stderr: int | None  # None with a pty
    exited: asyncio.Future[int]  # exit code; 128+N for a process ended by signal N

    async def signal(self, number: int) -> None:
        """Signal the whole process group; no error when it is already gone."""

    async def resize(self, cols: int, rows: int) -> None:
        """Set the terminal's size; nothing without a pty."""


class FileWriter(Protocol):
    """A file being replaced: bytes go to a temporary neighbour until `commit`."""

    fd: int  # open for writing, blocking regular file; owned by the writer

    async def commit(self) -> None:
        """Put the new content in place atomically and close. Raises OSError."""

    async def abort(self) -> None:
        """Drop the new content and close; idempotent."""


class UnixListener(Protocol):
    """A Unix socket inside a sandbox, on which the service listens."""

    path: str  # absolute, as seen inside; only the user it was made for (and root) can connect

    def close(self) -> None:
        """Accept no more, and have the socket and its folder removed; idempotent. Nothing of this process stays open."""

    async def removed(self) -> None:
        """Wait, for a few seconds at most, until both are removed. Call after `close`; never raises for the sandbox's sake."""


class Box(Protocol):
    """One running sandbox."""

    spec: BoxSpec
    limits_note: str  # what of the spec's limits this machine cannot enforce, "" when all is
    # what `spec.network` asked for: a listening TCP socket and a UDP socket for each address family, which every connection and
    # DNS query from inside ends at (with SO_ORIGINAL_DST). Empty: there is no way out. Whoever takes them empties the list
    gates: list[socket.socket]
    ended: asyncio.Future[str]  # resolves with the reason when the sandbox has ended, however that came

    async def spawn(self, spec: SpawnSpec) -> Process:
        """Start a process. Raises OSError (as execve or chdir would, errno set) or RuntimeFailure."""

    async def connect(self, port: int) -> socket.socket:
        """A connected non-blocking TCP socket to a port on the sandbox's loopback.

        127.0.0.1 is tried first, then ::1. Raises PortRefused, or RuntimeFailure when the sandbox has ended.
        """

    async def open_read(self, path: str, user: str | None = None) -> tuple[int, os.stat_result]:
        """Open a regular file for reading; relative to the user's home. Raises OSError with errno."""

    async def open_write(self, path: str, user: str | None = None) -> FileWriter:
        """Begin replacing a file, creating parent folders; relative to the user's home. Raises OSError with errno."""

    async def listen_unix(self, user: str | None, on_connection: Callable[[socket.socket], None]) -> UnixListener:
        """Listen on a Unix stream socket in a new folder with a random name, the user's alone.

        Args:
            user: whose the socket is; as in `SpawnSpec`.
            on_connection: takes each connection, non-blocking, at most a few per pass of the event loop. Its caller closes it.

        Raises:
            OSError: no such user, or no place for it; errno as of the call inside that failed.
            RuntimeFailure: the sandbox has ended, or its image has not what this takes.
        """

    async def stop(self, grace: float = 2.0) -> None:
        """SIGTERM to all, SIGKILL after `grace` seconds; returns when nothing of the box is left running. Idempotent."""


@dataclass(frozen=True)
class LayerSource:
    """One layer of an image, as a file."""

    path: Path
    digest: str  # "sha256:…" of the file
    diff_id: str  # "sha256:…" of the tar archive in it
    compression: str  # "none", "gzip" or "zstd"


@dataclass(frozen=True)
class Finish:
    """What the topmost layer of an image is completed with, so that a sandbox can stand on it."""

    work_dir: str = ""  # a folder that must exist; "": none


@dataclass(frozen=True)
class Captured:
    """The files of a sandbox, as layers."""

    layers: tuple[str, ...]  # topmost first
    made: str  # the one of them that was made for this
    size: int  # its bytes


class Layers(Protocol):
    """Folders of files that lie read-only under sandboxes' writable ones, each with a name."""

    def has(self, name: str) -> bool:
        """Whether there is such a layer."""

    async def unpack(
        self,
        name: str,
        sources: Sequence[LayerSource],
        below: Sequence[str],
        *,
        max_bytes: int,
        finish: Finish | None = None,
        on_done: Callable[[int], None] = lambda done: None,
    ) -> int:
        """Make a layer from parts of an image, lowest first.

        Args:
            below: the layers that it is to lie on, topmost first.
            max_bytes: of content, more is refused.
            finish: complete it with this, after all sources.
            on_done: called with the number of sources done.

        Returns:
            The bytes of content.

        Raises:
            RuntimeFailure: a source is not what it should be, or the disk is full; nothing is left behind.
        """

    async def capture(self, box_id: str, box: Box | None) -> Captured:
        """Make a layer of what a box has written: of a running one (`box`) as it is at one moment; /tmp is not part of it.

        Raises:
            RuntimeFailure: the disk is full, or the box ended meanwhile; nothing is left behind.
        """

    async def keep_only(self, names: Collection[str]) -> None:
        """Remove all other layers, and what was half made; boxes' own layers stay."""


class Runtime(Protocol):
    """Makes boxes on this machine."""

    name: str  # "native", …
    reaches_network: bool  # whether `BoxSpec.network` is heeded

    @property
    def layers(self) -> Layers | None:
        """What snapshots are made of; None: there is the default snapshot and no other."""

    async def check(self) -> list[Finding]:
        """What this machine offers and what it lacks, for people to read. Changes nothing, never raises."""

    async def recover(self) -> None:
        """Remove what a killed service left behind (processes, cgroups, half-deleted disks). Call once, before anything else."""

    async def start(self, spec: BoxSpec) -> Box:
        """Start a sandbox, on its existing disk or a fresh one. Raises RuntimeFailure; nothing is left behind then."""

    async def remove(self, box_id: str) -> None:
        """Delete a stopped sandbox's disk; no error when there is none."""

    async def disks(self) -> set[str]:
        """Ids of the boxes that have a disk."""

    async def aclose(self) -> None:
        """Release what the runtime itself holds. Boxes must have been stopped."""


SOCKET_PATH = re.compile(r"/tmp/gatewayd-[0-9a-f]{16}/socket")  # noqa: S108 - where `Box.listen_unix` makes its sockets, inside
DEFAULT_SHELL = "/bin/bash"
STATE_MODE = 0o700  # every directory of state is the user's alone


def box_dir(state_dir: Path, box_id: str) -> Path:
    """Where one sandbox's disk lives."""
    return state_dir / "boxes" / box_id

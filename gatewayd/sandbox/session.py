"""One program in a sandbox, whatever carries its bytes: what the front ends see of the guest and of ``/execute/ws``."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

STDOUT, STDERR = 1, 2  # the streams of `Session.read`
ABSENCE = 86_400  # seconds ssh's sessions, and all connections and listeners, go on without a network: laptops sleep over night


@dataclass(frozen=True)
class ProcessSpec:
    """What to run: `argv`, or else `command`, or else a login shell. Text may hold surrogate escapes: it is bytes inside."""

    argv: tuple[str, ...] = ()  # run as it is, found in PATH
    command: str = ""  # for the user's login shell, with -c
    env: Mapping[str, str] = field(default_factory=dict)  # added to the user's own
    cwd: str = ""  # "": the user's home
    user: str = ""  # "": whom the image runs as; another one needs an image that runs as root
    pty: bool = False  # on a terminal of its own: one output stream, and signals by keys
    term: str = ""  # TERM
    cols: int = 0  # of the terminal; 0: not told
    rows: int = 0
    xpixel: int = 0
    ypixel: int = 0
    modes: bytes = b""  # encoded terminal modes (RFC 4254, section 8)
    name: str = ""  # for `sandbox ps`
    linger: int = 300  # seconds it goes on while no connection can be made
    overflow: str = "block"  # or "drop": what happens to output meanwhile


@dataclass(frozen=True)
class ExitStatus:
    """How a program ended."""

    code: int | None  # 0-255; None when a signal ended it, or nobody knows
    signal: str = ""  # name without SIG
    core: bool = False  # whether it dumped a core


class Session(Protocol):
    """A running program, or a subsystem of the guest. One reader for each stream, one writer."""

    pid: int  # inside the sandbox; 0 where there is none
    input_stopped: asyncio.Future[None]  # done once nobody reads the input any more; what is written afterwards is dropped

    async def read(self, stream: int = STDOUT, limit: int = 262144, /) -> bytes:
        """1 to `limit` bytes of a stream; b"" at its end, and at once for one that there is not (2 on a terminal).

        Raises:
            GatewayError: the session was lost. What had arrived is delivered first.
        """
        ...

    async def write(self, data: bytes, /) -> None:
        """Input; returns when all is on its way, and waits while the program does not read.

        What is written after the program closed its input, or ended, is dropped.

        Raises:
            StreamClosed: after `write_eof` or `aclose`.
            GatewayError: the session was lost; kind unsupported, when this carrier cannot carry these bytes.
        """

    def write_eof(self) -> None:
        """No more input; idempotent."""

    def resize(self, cols: int, rows: int, xpixel: int = 0, ypixel: int = 0, /) -> None:
        """The terminal's new size."""

    def signal(self, name: str, /) -> None:
        """Send a signal, name without SIG, to what runs in front of the terminal, else to the program's process group.

        Nothing happens for a program that has ended.

        Raises:
            GatewayError: kind usage, when that is no name; unsupported, when this carrier cannot.
        """

    def stop_output(self, stream: int, /) -> None:
        """Nobody reads this stream any more: a program that writes to it learns of it. Idempotent."""

    async def wait(self) -> ExitStatus:
        """How the program ended; output may still follow.

        Raises:
            GatewayError: the session was lost, and nobody knows.
        """
        ...

    async def aclose(self) -> None:
        """End the program if it still runs (HUP, then KILL), release everything; idempotent."""

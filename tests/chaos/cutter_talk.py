"""A program on pipes that is talked to with deadlines."""

from __future__ import annotations

import errno
import os
import pty
import select
import subprocess
import time
import tty
from collections.abc import Mapping, Sequence
from pathlib import Path

DEADLINE = 100.0  # seconds for anything; a link comes back within a few


class Talk:
    """A running program. Close it, or use it as a context."""

    def __init__(
        self,
        argv: Sequence[str | Path],
        env: Mapping[str, str],
        errors: Path,
        *,
        terminal: bool = False,
        patience: float = DEADLINE,
    ) -> None:
        """
        Args:
            errors: where its standard error goes.
            terminal: its input and output are a terminal.
            patience: seconds without a sign of life after which it is given up.
        """
        self.errors = errors
        self._patience = patience
        self._came = b""  # read and not asked for yet
        streams: tuple[int, int] = (subprocess.PIPE, subprocess.PIPE)
        if terminal:
            master, slave = pty.openpty()
            tty.setraw(slave)
            streams = slave, slave
        with errors.open("wb") as file:
            self._process = subprocess.Popen(argv, env=env, stdin=streams[0], stdout=streams[1], stderr=file, bufsize=0)
        if terminal:
            os.close(slave)
            self._to, self._from = master, os.dup(master)
        else:
            assert self._process.stdin is not None
            assert self._process.stdout is not None
            self._to, self._from = os.dup(self._process.stdin.fileno()), os.dup(self._process.stdout.fileno())
            self._process.stdin.close()
            self._process.stdout.close()

    def __enter__(self) -> Talk:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait(DEADLINE)
        self.close_input()
        os.close(self._from)

    def send(self, data: bytes) -> None:
        """All of `data`. Fails when the program takes none of it for too long."""
        view = memoryview(data)
        poll = select.poll()
        poll.register(self._to, select.POLLOUT)
        while view:
            assert poll.poll(self._patience * 1000), f"takes no input: {self.said}"
            view = view[os.write(self._to, view[: select.PIPE_BUF]) :]

    def close_input(self) -> None:
        """Nothing more is sent; idempotent."""
        if self._to >= 0:
            os.close(self._to)
            self._to = -1

    def some(self) -> bytes:
        """What there is; b"" at the end."""
        if came := self._came:
            self._came = b""
            return came
        poll = select.poll()
        poll.register(self._from, select.POLLIN)
        assert poll.poll(self._patience * 1000), f"says nothing: {self.said}"
        try:
            return os.read(self._from, 1 << 20)
        except OSError as exc:
            if exc.errno == errno.EIO:  # a terminal that nobody holds open any more
                return b""
            raise

    def line(self) -> str:
        """The next line, without its end. Fails at the end of the output."""
        end = time.monotonic() + self._patience
        while b"\n" not in self._came:
            before, self._came = self._came, b""
            data = self.some()
            assert data, f"ended: {self.said}"
            assert time.monotonic() < end, f"ends no line: {self.said}"
            self._came = before + data
        line, _, self._came = self._came.partition(b"\n")
        return line.decode("utf-8", "replace")

    def prompted(self) -> None:
        """Wait until it has said something, which stays to be read."""
        self._came = self.some()

    def ended(self) -> int:
        """Wait for its end; the exit code."""
        return self._process.wait(self._patience)

    @property
    def running(self) -> bool:
        """Whether it has not ended."""
        return self._process.poll() is None

    @property
    def said(self) -> str:
        """On standard error, so far."""
        return self.errors.read_text(errors="replace")[-2000:]

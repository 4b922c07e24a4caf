"""Signals as something a poll loop can wait for."""

from __future__ import annotations

import os
import signal
from collections import deque
from collections.abc import Iterable
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Any

PENDING_MAX = 64  # signals kept until they are taken; more of them say nothing new


class Signals:
    """While entered, the signals given are collected instead of acting; `fd` is readable when there are any.

    One that was ignored when the program was started (nohup, a background job without job control) stays ignored.
    """

    def __init__(self, numbers: Iterable[signal.Signals]) -> None:
        self._numbers = tuple(numbers)
        self._before: dict[signal.Signals, Any] = {}  # handlers to be put back
        self._seen: deque[int] = deque(maxlen=PENDING_MAX)  # caught and not taken
        self._pipe = (-1, -1)  # its read end is `fd`; Python writes the number of each signal into the other one
        self._wakeup = -1  # the wake-up descriptor to be put back

    def __enter__(self) -> Signals:
        read, write = os.pipe()
        os.set_blocking(read, False)
        os.set_blocking(write, False)
        self._pipe = (read, write)
        self._wakeup = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        for number in self._numbers:
            handler = signal.getsignal(number)
            if handler is not signal.SIG_IGN:
                self._before[number] = handler
                signal.signal(number, self._caught)
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup)
        for fd in self._pipe:
            os.close(fd)

    def _caught(self, number: int, frame: FrameType | None) -> None:
        del frame
        self._seen.append(number)

    @property
    def fd(self) -> int:
        """Readable while there is something to take."""
        return self._pipe[0]

    def take(self) -> list[int]:
        """The signals that came since the last call, in order."""
        with suppress(BlockingIOError):
            os.read(self._pipe[0], 4096)
        taken = list(self._seen)
        self._seen.clear()
        return taken


def name_of(number: int) -> str:
    """A signal's name without SIG, as the guest knows it."""
    return signal.Signals(number).name.removeprefix("SIG")


def exit_code(name: str) -> int:
    """What a shell makes of a process that the signal `name` (without SIG) has ended; 255 for one that this system has not."""
    try:
        return 128 + signal.Signals[f"SIG{name}"].value
    except KeyError:
        return 255

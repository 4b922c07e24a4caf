"""What the service holds of the machine's memory while it has nothing to do.

Measured by benchmarks/service_idle.py.
"""

from __future__ import annotations

import ctypes
import gc
import sys
import time
from collections.abc import Callable

BUSY = 0.02  # seconds of processor time in one look at the clock that mean: something is going on
_M_ARENA_MAX = -8  # malloc.h


def spare() -> None:
    """Set the process up to hold little. Call before FastAPI is imported.

    FastAPI looks whether a class is one of pydantic's version 1, and loads that one's code (2 MB) to do so. No class here is, and
    FastAPI takes it well when that part of pydantic is missing.
    """
    sys.modules.setdefault("pydantic.v1", None)  # type: ignore[arg-type]  # None: an import fails
    _libc("mallopt", _M_ARENA_MAX, 1)  # work on threads is short and rare: what they free, others can use


class Trimmer:
    """Gives memory back to the machine when the service has been busy and is so no more."""

    def __init__(self, used: Callable[[], float] = time.process_time) -> None:
        self._used = used  # processor time of this process so far, seconds
        self._seen = used()  # at the last look
        self._wanted = True  # it was busy since memory was given back; starting is being busy

    def look(self) -> bool:
        """Call every few seconds; whether memory was given back."""
        seen, self._seen = self._seen, self._used()
        if self._seen - seen > BUSY:
            self._wanted = True
            return False
        wanted, self._wanted = self._wanted, False
        if wanted:
            gc.collect()  # what ended in a cycle may hold a ring
            _libc("malloc_trim", 0)
        return wanted


def _libc(name: str, *arguments: int) -> None:
    """Call a function of glibc; nothing with another C library."""
    function = getattr(ctypes.CDLL(None), name, None)
    if function is not None:
        function(*arguments)

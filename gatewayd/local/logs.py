"""The log: lines on standard error that never fail their writer, also when that is a file on a full disk."""

from __future__ import annotations

import logging
import os

FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


class LogHandler(logging.Handler):
    """Writes whole lines to a descriptor. Lines that cannot be written are counted, and the count is written when it can be."""

    def __init__(self, fd: int = 2) -> None:
        super().__init__()
        self._fd = fd
        self._lost = 0  # lines not written since the last that was

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record."""
        try:
            text = self.format(record)
        except Exception:  # noqa: BLE001 - a message that does not fit its arguments is no reason to fail
            text = f"{record.levelname} {record.name}: {record.msg!r} (its arguments do not fit)"
        if self._lost and self._write(f"{self._lost} lines of this log were lost: it could not be written"):
            self._lost = 0
        if self._lost or not self._write(text):
            self._lost += 1

    def _write(self, text: str) -> bool:
        data = (text + "\n").encode("utf-8", "backslashreplace")
        try:
            while data:
                data = data[os.write(self._fd, data) :]
        except OSError:
            return False
        return True


def start() -> None:
    """Log to standard error from now on."""
    logging.basicConfig(handlers=[LogHandler()], level=logging.INFO, format=FORMAT, force=True)

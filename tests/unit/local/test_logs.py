"""A log that cannot be written."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest

from gatewayd.local.logs import LogHandler


def record(message: str, *args: object) -> logging.LogRecord:
    return logging.LogRecord("name", logging.INFO, __file__, 1, message, args, None)


def test_lines_that_are_lost_are_counted(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    full = os.open("/dev/full", os.O_WRONLY)
    handler = LogHandler(full)
    handler.emit(record("one"))
    handler.emit(record("two"))
    with (tmp_path / "log").open("wb") as file:
        os.dup2(file.fileno(), full)
        handler.emit(record("three %s", "ü\udcff"))
        handler.emit(record("four %d", "no number"))
    os.close(full)
    assert (tmp_path / "log").read_text().splitlines() == [
        "2 lines of this log were lost: it could not be written",
        "three ü\\udcff",
        "INFO name: 'four %d' (its arguments do not fit)",
    ]
    assert capfd.readouterr() == ("", "")

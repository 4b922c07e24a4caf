"""Helper processes that work on sandboxes' files with sandboxes' ids (`inside.mapped`): told a plan, answering in lines."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import IO, Any

from gatewayd.local.runtime.base import RuntimeFailure

_INSIDE = Path(__file__).parent / "inside"


@asynccontextmanager
async def helper(
    program: str, plan: dict[str, Any], stdin: IO[bytes] | int = asyncio.subprocess.DEVNULL
) -> AsyncIterator[asyncio.subprocess.Process]:
    """A helper at work; at the end of the block it is gone.

    Args:
        program: file name of one of the programs in inside/.
        plan: what it is told; JSON.
        stdin: as for a subprocess.
    """
    plan_fd = os.memfd_create("plan")
    os.write(plan_fd, json.dumps(plan).encode())
    os.lseek(plan_fd, 0, os.SEEK_SET)
    try:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-I", "-S", str(_INSIDE / program), str(plan_fd)),
            stdin=stdin,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            pass_fds=[plan_fd],
        )
    finally:
        os.close(plan_fd)
    try:
        yield process
    finally:
        if process.returncode is None:  # done with, cancelled, or too late
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()


async def report_of(process: asyncio.subprocess.Process, what: str) -> dict[str, Any]:
    """The helper's next line.

    Args:
        what: as in "cannot WHAT: …".

    Raises:
        RuntimeFailure: it failed, or died. A full disk is its cause as OSError.
    """
    line = await process.stdout.readline() if process.stdout is not None else b""
    try:
        report: dict[str, Any] = json.loads(line)
    except ValueError:
        raise RuntimeFailure(f"cannot {what}: the process that does it died") from None
    if "failed" in report:
        number = report.get("errno")
        cause = OSError(number, os.strerror(number)) if number in (errno.ENOSPC, errno.EDQUOT) else None
        raise RuntimeFailure(f"cannot {what}: {report['failed']}") from cause
    return report

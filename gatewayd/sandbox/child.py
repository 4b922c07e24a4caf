"""A child process that outlives its parent: own session, no inherited descriptors, watched through a pidfd."""

from __future__ import annotations

import asyncio
import os
import signal


class Child:
    """A detached child process whose first line of output is awaited; it outlives the daemon."""

    def __init__(self, argv: list[str], env: dict[str, str], log_fd: int) -> None:
        """Raises OSError."""
        self._stdout, write_end = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)  # -1 once closed
        try:
            actions = [
                (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                (os.POSIX_SPAWN_DUP2, write_end, 1),
                (os.POSIX_SPAWN_DUP2, log_fd, 2),
            ]
            self.pid = os.posix_spawn(argv[0], argv, env, file_actions=actions, setsid=True, setsigmask=[])
        except BaseException:
            os.close(self._stdout)
            raise
        finally:
            os.close(write_end)
        self.pidfd = os.pidfd_open(self.pid)  # closed by kill, or by whoever the process is handed to

    async def first_line(self, limit: int) -> bytes:
        """What it printed up to the first newline, its end, or about `limit` bytes."""
        loop = asyncio.get_running_loop()
        content = b""
        while b"\n" not in content and len(content) < limit:
            readable = loop.create_future()
            loop.add_reader(self._stdout, _wake, readable)
            try:
                await readable
            finally:
                loop.remove_reader(self._stdout)
            data = os.read(self._stdout, limit)
            if not data:
                break
            content += data
        return content.partition(b"\n")[0]

    def close_stdout(self) -> None:
        if self._stdout >= 0:
            os.close(self._stdout)
            self._stdout = -1

    async def kill(self) -> int:
        """End it — it has a moment to end by itself — and return its exit code, negative for a signal."""
        for number, patience in ((None, 1.0), (signal.SIGTERM, 3.0), (signal.SIGKILL, 3.0)):
            if number is not None:
                signal.pidfd_send_signal(self.pidfd, number)
            for _ in range(int(patience / 0.02)):
                code = reap(self.pid)
                if code is not None:
                    os.close(self.pidfd)
                    return code
                await asyncio.sleep(0.02)
        os.close(self.pidfd)
        return -signal.SIGKILL


def reap(pid: int) -> int | None:
    """The exit code of our ended child, negative for a signal; None while it runs or if it is no child of ours."""
    try:
        found, status = os.waitpid(pid, os.WNOHANG)
    except ChildProcessError:
        return None
    return os.waitstatus_to_exitcode(status) if found else None


def _wake(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)

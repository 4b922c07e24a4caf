"""Docker's exec: starting a process in a container, and short scripts that are run to their end."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import IO, Any

from gatewayd.local.runtime import docker_guest
from gatewayd.local.runtime.base import RuntimeFailure
from gatewayd.local.runtime.docker_api import DEADLINE, DockerApi, part, printable
from gatewayd.local.runtime.docker_wire import STDERR, STDOUT, Frames, Record, Records, WireError, new_token
from gatewayd.tasks import TaskOwner

_ERRNO = {os.strerror(number): number for number in errno.errorcode}  # what the sandbox's programs say in the C locale
_MAX_TALK = 64 * 1024  # bytes of output and records of a short script
_CHUNK = 256 * 1024  # bytes a read
_EXIT_DEADLINE = 5.0  # seconds from the end of a process's streams to its exit code


@dataclass
class Talk:
    """What a short script left."""

    records: list[str] = field(default_factory=list)  # in their order
    output: bytes = b""  # the beginning of its stdout and stderr
    content: int = 0  # bytes of stdout that went to the sink

    def words(self, name: str) -> str:
        """The text of the record that begins with `name`.

        Raises:
            OSError: there is an error record instead.
            RuntimeFailure: there is none.
        """
        for text in self.records:
            kind, _, rest = text.partition(" ")
            if kind == name:
                return rest
            if kind == "error":
                raise failure(rest)
        raise RuntimeFailure("the sandbox gave no answer that makes sense")


def failure(text: str) -> OSError:
    """The error that a program in the sandbox described: its last words are strerror(3)'s."""
    where, _, reason = text.strip().rpartition(": ")
    number = _ERRNO.get(reason, errno.EIO)
    return OSError(number, os.strerror(number), printable(where)[:200])


class Execs:
    """Runs processes in one container."""

    def __init__(self, api: DockerApi, container: str, tasks: TaskOwner) -> None:
        self._api = api
        self._container = container  # id
        self._tasks = tasks  # the box's

    async def open(
        self,
        argv: Sequence[str],
        *,
        user: str | None,
        env: Mapping[str, str] | None = None,
        pty: bool = False,
        stdin: bool = True,
    ) -> tuple[str, socket.socket, bytes]:
        """Start a process: its exec id, the connection that carries its streams, and what arrived there already.

        Raises:
            RuntimeFailure: the daemon refuses. That the program or user does not exist shows later, in `started`.
        """
        body = {
            "AttachStdin": stdin,
            "AttachStdout": True,
            "AttachStderr": True,
            "Tty": pty,
            "Cmd": list(argv),
            "Env": [f"{name}={value}" for name, value in (env or {}).items()],
            "User": user or "root",
            "WorkingDir": "/",
        }
        made = await self._api.request("start a process", "POST", f"/containers/{part(self._container)}/exec", body=body)
        exec_id = str(made.get("Id", "")) if isinstance(made, dict) else ""
        if not exec_id:
            raise RuntimeFailure("Docker gave no process")
        sock, early = await self._api.hijack(
            "start a process", f"/exec/{part(exec_id)}/start", body={"Detach": False, "Tty": pty}
        )
        return exec_id, sock, early

    async def inspect(self, exec_id: str) -> dict[str, Any]:
        """What the daemon knows of a process."""
        found = await self._api.request("look at a process", "GET", f"/exec/{part(exec_id)}/json")
        return found if isinstance(found, dict) else {}

    async def exit_code(self, exec_id: str) -> int:
        """The exit code of a process whose streams have ended; 137 when the daemon cannot tell."""
        with contextlib.suppress(TimeoutError, RuntimeFailure):
            async with asyncio.timeout(_EXIT_DEADLINE):
                while True:
                    state = await self.inspect(exec_id)
                    if not state.get("Running") and isinstance(state.get("ExitCode"), int):
                        return int(state["ExitCode"]) & 0xFF
                    await asyncio.sleep(0.02)  # the daemon sends no event on this connection
        return 137

    async def resize(self, exec_id: str, cols: int, rows: int) -> None:
        """Set the size of a process's terminal."""
        query = {"h": str(rows & 0xFFFF), "w": str(cols & 0xFFFF)}
        await self._api.request("resize a terminal", "POST", f"/exec/{part(exec_id)}/resize", query=query)

    async def talk(
        self,
        script: str,
        *args: str,
        user: str | None = None,
        stdin: IO[bytes] | None = None,
        sink: Callable[[bytes], None] | None = None,
        deadline: float = DEADLINE,
    ) -> Talk:
        """Run a short script to its end with (token, user, *args).

        Args:
            stdin: its input, up to its end.
            sink: takes its output instead of `Talk.output`; may raise OSError to stop.

        Raises:
            OSError: EINVAL, no such user; or what `sink` raised.
            RuntimeFailure: it could not be run, or not in time.
        """
        token = new_token()
        argv = [*docker_guest.SCRIPT, script, "gatewayd", token, docker_guest.account_name(user), *args]
        try:
            async with asyncio.timeout(deadline):
                exec_id, sock, early = await self.open(argv, user=user, stdin=stdin is not None)
                with sock:
                    talk = Talk()
                    if stdin is None:
                        await self._collect(sock, early, token, talk, sink)
                    else:
                        await self._converse(sock, early, token, talk, stdin)
                if not talk.records:
                    await self.started(exec_id, user, talk.output)
                return talk
        except TimeoutError:
            raise RuntimeFailure(f"the sandbox did not answer within {deadline:.0f} s") from None
        except WireError as exc:
            raise RuntimeFailure(str(exc)) from exc

    async def _converse(self, sock: socket.socket, early: bytes, token: str, talk: Talk, stdin: IO[bytes]) -> None:
        """Send and collect at the same time; a script that ends before its input does is not waited for."""
        try:
            sending = self._tasks.start(self._send(sock, stdin), "stdin")
        except RuntimeError as exc:
            raise RuntimeFailure("the sandbox has ended") from exc
        try:
            await self._collect(sock, early, token, talk, None)
        finally:
            sending.cancel()
            await asyncio.wait([sending])  # it must not use the connection any more

    @staticmethod
    async def _send(sock: socket.socket, stdin: IO[bytes]) -> None:
        loop = asyncio.get_running_loop()
        with contextlib.suppress(OSError):  # the script has ended: what it says tells why
            while data := stdin.read(_CHUNK):
                await loop.sock_sendall(sock, data)
            sock.shutdown(socket.SHUT_WR)

    @staticmethod
    async def _collect(sock: socket.socket, data: bytes, token: str, talk: Talk, sink: Callable[[bytes], None] | None) -> None:
        loop = asyncio.get_running_loop()
        frames, records = Frames(), {STDOUT: Records(token), STDERR: Records(token)}
        size = 0
        while data := data or await loop.sock_recv(sock, _CHUNK):
            for stream, payload in frames.feed(data):
                for piece in records[stream].feed(payload) if stream in records else ():
                    if isinstance(piece, Record):
                        size += len(piece.text)
                        talk.records.append(piece.text)
                    elif stream == STDOUT and sink is not None:
                        sink(piece)
                        talk.content += len(piece)
                    else:
                        talk.output += piece[: max(0, _MAX_TALK - len(talk.output))]
            if size > _MAX_TALK:
                raise WireError("the sandbox says too much")
            data = b""
        if sink is not None and (held := records[STDOUT].flush()):
            sink(held)
            talk.content += len(held)

    async def started(self, exec_id: str, user: str | None, output: bytes) -> None:
        """Raise what explains that a process said nothing, if it was never started."""
        state = await self.inspect(exec_id)
        if state.get("Pid"):
            return
        if user is not None:  # whose fault is it? Without that user everything else is the same
            other, sock, early = await self.open(["/bin/true"], user=None, stdin=False)
            with sock:
                await self._collect(sock, early, new_token(), Talk(), None)
            if (await self.inspect(other)).get("Pid"):
                raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), f"no user {user!r} in this sandbox")
        raise RuntimeFailure(f"the sandbox cannot start a process: {printable(output.decode('utf-8', 'replace'))[:200]}")

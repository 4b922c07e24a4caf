"""One running sandbox of the Docker runtime: its container, its processes, ports and files."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path

from gatewayd.local.runtime import docker_guest, docker_listener, docker_ports, docker_process
from gatewayd.local.runtime.base import BoxSpec, RuntimeFailure, SpawnSpec
from gatewayd.local.runtime.docker_api import DockerApi, DockerError, part
from gatewayd.local.runtime.docker_exec import Execs
from gatewayd.local.runtime.docker_files import DockerWriter, Files
from gatewayd.local.runtime.docker_process import DockerProcess
from gatewayd.tasks import TaskOwner

log = logging.getLogger(__name__)

_READY_DEADLINE = 20.0  # seconds from the container's start to its pid 1 being ready
_END_DEADLINE = 12.0  # seconds for killed processes to be gone
_DRAIN_DEADLINE = 1.0  # seconds for the last output of a sandbox that has ended
_CONFLICT = (304, 404, 409)  # HTTP statuses that say: it is stopped already, or gone


class DockerBox:
    """See `base.Box`."""

    def __init__(self, api: DockerApi, spec: BoxSpec, container: str, spool: Path, limits_note: str) -> None:
        self.spec = spec
        self.limits_note = limits_note
        self.gates: list[socket.socket] = []  # containers have no network
        self.ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._api = api
        self._container = container  # id
        self._tasks = TaskOwner(f"box {spec.id}")  # pumps of processes and ports
        self._execs = Execs(api, container, self._tasks)
        self._files = Files(self._execs, spool)
        self._processes: set[DockerProcess] = set()  # alive, or ended and not yet known to be
        self._namespace: docker_ports.Namespace | None = None  # None: ports are reached through a relay inside
        self._stopping = False  # set by the first stop()

    @property
    def _path(self) -> str:
        return f"/containers/{part(self._container)}"

    async def boot(self, *, enter: bool) -> None:
        """Start the container and wait until its pid 1 is ready.

        Args:
            enter: whether its network namespace is this kernel's.

        Raises:
            RuntimeFailure: it did not come up; it is stopped again.
        """
        loop = asyncio.get_running_loop()
        query = {"stream": "1", "stdin": "1", "stdout": "1"}
        sock, early = await self._api.hijack("start the sandbox", f"{self._path}/attach", query=query)
        try:
            with sock:
                await self._api.request("start the sandbox", "POST", f"{self._path}/start")
                async with asyncio.timeout(_READY_DEADLINE):
                    await loop.sock_sendall(sock, docker_guest.INIT.encode())
                    said = early
                    while b"ready" not in said:
                        data = await loop.sock_recv(sock, 4096)
                        if not data or len(said) > 4096:
                            raise RuntimeFailure("cannot start the sandbox: its first process died")
                        said += data
            if enter and os.geteuid() == 0:
                state = await self._api.request("look at the sandbox", "GET", f"{self._path}/json")
                pid = state.get("State", {}).get("Pid") if isinstance(state, dict) else None
                if isinstance(pid, int) and pid > 1:
                    self._namespace = docker_ports.Namespace.open(pid, self._container)
        except BaseException as exc:
            await asyncio.shield(self._kill())
            if isinstance(exc, TimeoutError):
                raise RuntimeFailure(f"cannot start the sandbox: not ready within {_READY_DEADLINE:.0f} s") from None
            if isinstance(exc, OSError):
                raise RuntimeFailure(f"cannot start the sandbox: {exc.strerror}") from exc
            raise

    async def _kill(self) -> None:
        """Kill the container and see that it is not running any more; never raises RuntimeFailure."""
        try:
            with contextlib.suppress(DockerError):  # not running
                await self._api.request("stop the sandbox", "POST", f"{self._path}/kill", query={"signal": "KILL"})
            await self._api.request("stop the sandbox", "POST", f"{self._path}/wait", deadline=_END_DEADLINE)
        except RuntimeFailure as exc:
            if not (isinstance(exc, DockerError) and exc.status in _CONFLICT):
                log.warning("box %s: %s", self.spec.id, exc)

    async def watch(self) -> None:
        """Runs beside the box: resolves `ended` when the container is no longer running."""
        reason = "its container was removed"
        try:
            result = await self._api.request("watch the sandbox", "POST", f"{self._path}/wait", deadline=None)
            code = result.get("StatusCode") if isinstance(result, dict) else None
            reason = "stopped" if self._stopping else f"its first process ended with code {code}"
        except RuntimeFailure as exc:
            if not (isinstance(exc, DockerError) and exc.status == 404):
                reason = str(exc)
                await self._kill()  # the daemon was restarted, or is gone: nothing must run that nobody watches
        finally:
            await asyncio.shield(self._finish(reason))

    async def _finish(self, reason: str) -> None:
        for process in list(self._processes):
            if not process.exited.done():
                await asyncio.wait([process.exited], timeout=_DRAIN_DEADLINE / max(1, len(self._processes)))
            process.lost()
        self._processes.clear()
        await self._tasks.aclose()
        if self._namespace is not None:
            self._namespace.close()
        if not self.ended.done():
            self.ended.set_result(reason)

    def _alive(self) -> None:
        if self.ended.done() or self._stopping:
            raise RuntimeFailure("the sandbox has ended")

    async def spawn(self, spec: SpawnSpec) -> DockerProcess:
        """Start a process. Raises OSError (as execve or chdir would, errno set) or RuntimeFailure."""
        self._alive()
        try:
            starting = self._tasks.start(self._attempt(spec), "spawn")
        except RuntimeError as exc:
            raise RuntimeFailure("the sandbox has ended") from exc
        try:
            await asyncio.wait([starting])
        except asyncio.CancelledError:
            starting.add_done_callback(self._unclaimed)  # its id is not known before it runs
            raise
        if starting.cancelled():
            raise RuntimeFailure("the sandbox has ended")
        process: DockerProcess | Exception = starting.result()
        if isinstance(process, Exception):
            raise process
        return process

    async def _attempt(self, spec: SpawnSpec) -> DockerProcess | Exception:
        """A failure is an outcome too: the task itself has not failed."""
        try:
            process = await docker_process.spawn(self._execs, self._tasks, spec)
        except (OSError, RuntimeError, RuntimeFailure) as exc:  # RuntimeError: the box is closing
            return RuntimeFailure("the sandbox has ended") if isinstance(exc, RuntimeError) else exc
        self._processes.add(process)
        process.exited.add_done_callback(lambda _: self._processes.discard(process))
        return process

    def _unclaimed(self, starting: asyncio.Task[DockerProcess | Exception]) -> None:
        """Nobody waits for this process any more."""
        process = None if starting.cancelled() else starting.result()
        if isinstance(process, DockerProcess):
            for fd in {process.stdin, process.stdout, process.stderr}:
                if fd is not None:
                    os.close(fd)
            with contextlib.suppress(RuntimeError):  # the box is closing
                self._tasks.start(process.signal(signal.SIGKILL), "unclaimed")

    async def connect(self, port: int) -> socket.socket:
        """A connected non-blocking TCP socket to a port on the sandbox's loopback. Raises PortRefused, RuntimeFailure."""
        self._alive()
        if self._namespace is not None:
            return await docker_ports.connect_through_namespace(self._namespace, port)
        return await docker_ports.connect_through_relay(self._execs, self._tasks, port)

    async def open_read(self, path: str, user: str | None = None) -> tuple[int, os.stat_result]:
        """Open a regular file for reading; relative to the user's home. Raises OSError with errno."""
        self._alive()
        return await self._files.open_read(path, user)

    async def open_write(self, path: str, user: str | None = None) -> DockerWriter:
        """Begin replacing a file, creating parent folders; relative to the user's home. Raises OSError with errno."""
        self._alive()
        return await self._files.open_write(path, user)

    async def listen_unix(
        self, user: str | None, on_connection: Callable[[socket.socket], None]
    ) -> docker_listener.DockerListener:
        """Listen on a Unix socket in a new folder, the user's alone. See `base.Box`. Raises OSError, RuntimeFailure."""
        self._alive()
        return await docker_listener.listen(self._execs, self._tasks, user, on_connection)

    async def stop(self, grace: float = 2.0) -> None:
        """SIGTERM to all, SIGKILL after `grace` seconds; returns when nothing of the box is left running. Idempotent."""
        if not self._stopping and not self.ended.done():
            self._stopping = True
            with contextlib.suppress(RuntimeFailure):  # its pid 1 passes it on to everybody (`docker_guest.INIT`)
                query = {"signal": signal.Signals.SIGTERM.name}
                await self._api.request("stop the sandbox", "POST", f"{self._path}/kill", query=query)
                await asyncio.wait([self.ended], timeout=grace)
        if not self.ended.done():
            await self._kill()
            await asyncio.wait([self.ended], timeout=_END_DEADLINE)
        if not self.ended.done():
            await self._finish("Docker does not say whether it was stopped")

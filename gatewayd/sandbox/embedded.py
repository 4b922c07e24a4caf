"""The embedded sandbox service as the gateway sees it: a process to start, adopt and stop; otherwise a URL like any other."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from gatewayd.api import LOCAL_DIR, LOCAL_LOG, PROFILE_LOCAL, ErrorKind
from gatewayd.config import Profile, Proxies, is_loopback, read_key_file
from gatewayd.errors import GatewayError, printable
from gatewayd.sandbox.child import Child, reap
from gatewayd.sandbox.rest_client import FixedAccess, RestClient
from gatewayd.tasks import SingleFlight, TaskOwner

if TYPE_CHECKING:
    from gatewayd.api import LocalStatus

log = logging.getLogger(__name__)

START_TIMEOUT = 20.0  # seconds until the service has printed its line
STOP_TIMEOUT = 12.0  # seconds for an orderly stop; it promises 10
CHECK_TIMEOUT = 3.0  # seconds for the request that proves an adopted service alive
LINE_MAX = 65536  # bytes of the line it prints, and of endpoint.json
TAIL_LINES, TAIL_BYTES = 12, 8192  # of local.log in a failure message
LOG_MAX = 4 << 20  # bytes of local.log at a start above which it is put aside, as local.log.1
EXIT_IN_USE = 73  # its exit code when another instance holds the state directory

# Not for the service: it has its own key, and systemd's descriptors are the gateway's.
DROPPED_VARIABLES = ("LANGSMITH_", "LANGCHAIN_", "GATEWAYD_", "LISTEN_", "NOTIFY_SOCKET", "WATCHDOG_")


class _Service:
    """A running service: found or started."""

    def __init__(self, pid: int, pidfd: int, profile: Profile, *, child: bool) -> None:
        self.pid = pid
        self.pidfd = pidfd  # readable once the process has ended; owned by Embedded
        self.profile = profile
        self.child = child  # whether we started it, and reap it
        self.ended = asyncio.Event()  # set when the process has ended


class Embedded:
    """Starts the service when it is wanted and takes note when it ends. One per daemon."""

    def __init__(self, state_dir: Path, environ: Mapping[str, str]) -> None:
        self._state_dir = state_dir  # the gateway's: the service has a directory in it
        self._dir = state_dir / LOCAL_DIR
        self._log = state_dir / LOCAL_LOG
        self._environ = environ  # the daemon's, for the service to start with
        self._service: _Service | None = None  # the running one
        self._tasks = TaskOwner("embedded")
        self._starting: SingleFlight[Profile] = SingleFlight(self._tasks, "start", keep=True)

    async def ensure(self) -> Profile:
        """Where the service is; adopts a running one or starts it. Raises GatewayError."""
        if self._service is not None:
            return self._service.profile
        try:
            return await self._starting.join(self._find_or_start)
        except RuntimeError as exc:
            raise GatewayError("the daemon is stopping", kind=ErrorKind.UNAVAILABLE) from exc

    async def find(self) -> LocalStatus:
        """The service's state; adopts one that runs, starts none."""
        if self._service is None and not self._starting.running:
            await self._adopt()
        if self._service is not None:
            return {"endpoint": self._service.profile.endpoint, "pid": self._service.pid, "state": "running"}
        return {"endpoint": "", "pid": None, "state": "starting" if self._starting.running else "stopped"}

    async def stop(self) -> None:
        """Stop the service, whoever started it: SIGTERM, again after a deadline, then SIGKILL. No error if none runs."""
        if self._starting.running:
            try:
                await self.ensure()
            except GatewayError:
                return
        if self._service is None and not await self._adopt():
            return
        service = self._service
        if service is None:
            return
        log.info("stopping the local service (pid %d)", service.pid)
        for number, patience in ((signal.SIGTERM, STOP_TIMEOUT), (signal.SIGTERM, 3.0), (signal.SIGKILL, 3.0)):
            if service.ended.is_set():
                return
            signal.pidfd_send_signal(service.pidfd, number)
            try:
                async with asyncio.timeout(patience):
                    await service.ended.wait()
            except TimeoutError:
                log.warning("the local service (pid %d) has not ended %.0f s after %s", service.pid, patience, number.name)

    async def aclose(self) -> None:
        """Leave the service alone and forget it; idempotent."""
        await self._tasks.aclose()
        if self._service is not None:
            self._release(self._service)

    # --- finding and starting -----------------------------------------------------------------------------------------

    async def _find_or_start(self) -> Profile:
        if await self._adopt() and self._service is not None:
            return self._service.profile
        self._make_dirs()
        loop = asyncio.get_running_loop()
        deadline = loop.time() + START_TIMEOUT
        child, log_size = self._spawn()
        try:
            async with asyncio.timeout_at(deadline):
                line = await child.first_line(LINE_MAX)
        except TimeoutError as exc:
            await child.kill()
            raise self._cannot_start(f"it was not ready within {START_TIMEOUT:.0f} s", log_size) from exc
        except BaseException:
            await child.kill()
            raise
        finally:
            child.close_stdout()
        profile = self._profile(line)
        if profile is None:
            code = await child.kill()
            if code == EXIT_IN_USE and await self._adopt_until(deadline) and self._service is not None:
                return self._service.profile
            raise self._cannot_start(
                f"it ended with exit code {code}" if code >= 0 else f"it was killed by signal {-code}", log_size
            )
        self._watch(_Service(child.pid, child.pidfd, profile, child=True))
        log.info("started the local service (pid %d) at %s", child.pid, profile.endpoint)
        return profile

    async def _adopt_until(self, deadline: float) -> bool:
        """Another process is starting the service: wait for it to be ready."""
        loop = asyncio.get_running_loop()
        while loop.time() < deadline:
            if await self._adopt():
                return True
            await asyncio.sleep(0.2)
        return False

    async def _adopt(self) -> bool:
        """Use the service that already runs in the state directory, if one answers there with our key."""
        try:
            with (self._dir / "endpoint.json").open("rb") as file:
                content = file.read(LINE_MAX)
        except OSError:
            return False
        profile = self._profile(content)
        pid = _pid(content)
        if profile is None or pid is None:
            return False
        try:
            pidfd = os.pidfd_open(pid)
        except OSError:
            return False
        alive = False
        try:
            alive = await _answers(profile)
        finally:
            if not alive or self._service is not None:
                os.close(pidfd)
        if alive and self._service is None:
            self._watch(_Service(pid, pidfd, profile, child=False))
            log.info("adopted the local service (pid %d) at %s", pid, profile.endpoint)
        return alive

    def _profile(self, content: bytes) -> Profile | None:
        """The profile that an endpoint line describes, with the key of the state directory; None if it is not one."""
        endpoint = _object(content).get("endpoint")
        if (
            not isinstance(endpoint, str)
            or not endpoint.startswith("http://")
            or not is_loopback(urlsplit(endpoint).hostname or "")
        ):
            return None
        try:
            key = read_key_file(self._dir / "api-key", "the local service")
        except GatewayError as exc:
            log.warning("%s", exc.message)
            return None
        return Profile(PROFILE_LOCAL, endpoint.rstrip("/"), key)

    def _make_dirs(self) -> None:
        try:
            for path in (self._state_dir, self._dir):
                path.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as exc:
            raise GatewayError(f"cannot start the local service: {exc.filename}: {exc.strerror}", kind=ErrorKind.CONFIG) from exc

    def _spawn(self) -> tuple[Child, int]:
        """The process, and the size of its log before it."""
        argv = [sys.executable, "-P", "-m", "gatewayd", "local", "--port", "0", "--state-dir", str(self._dir)]
        env = {name: value for name, value in self._environ.items() if not name.startswith(DROPPED_VARIABLES)}
        try:
            if self._log.exists() and self._log.stat().st_size > LOG_MAX:
                self._log.replace(self._log.with_suffix(".log.1"))
            log_fd = os.open(self._log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as exc:
            raise GatewayError(f"cannot open {self._log}: {exc.strerror}", kind=ErrorKind.CONFIG) from exc
        try:
            size = os.fstat(log_fd).st_size
            return Child(argv, env, log_fd), size
        except OSError as exc:
            raise GatewayError(f"cannot start the local service: {exc.strerror}", kind=ErrorKind.FAILED) from exc
        finally:
            os.close(log_fd)

    def _cannot_start(self, reason: str, log_size: int) -> GatewayError:
        """With the last lines it logged since `log_size`."""
        lines: list[str] = []
        try:
            with self._log.open("rb") as file:
                file.seek(max(log_size, self._log.stat().st_size - TAIL_BYTES))
                lines = [printable(line, 300) for line in file.read(TAIL_BYTES).decode("utf-8", "replace").splitlines()]
        except OSError:
            pass
        tail = " | ".join(line for line in lines[-TAIL_LINES:] if line.strip())
        message = f"cannot start the local sandbox service: {reason}" + (f": {tail}" if tail else "")
        return GatewayError(message, kind=ErrorKind.UNAVAILABLE, hint=f"its log is {self._log}")

    # --- watching -----------------------------------------------------------------------------------------------------

    def _watch(self, service: _Service) -> None:
        self._service = service
        asyncio.get_running_loop().add_reader(service.pidfd, self._ended, service)

    def _ended(self, service: _Service) -> None:
        code = reap(service.pid) if service.child else None
        how = "" if code is None else f" with exit code {code}" if code >= 0 else f" by signal {-code}"
        log.info("the local service (pid %d) has ended%s", service.pid, how)
        service.ended.set()
        self._release(service)

    def _release(self, service: _Service) -> None:
        asyncio.get_running_loop().remove_reader(service.pidfd)
        os.close(service.pidfd)
        self._service = None


async def _answers(profile: Profile) -> bool:
    client = RestClient(FixedAccess(profile), Proxies(), retries=0)
    try:
        await client.call(
            "GET", "/v2/sandboxes/boxes", action="check the local service", params={"limit": 1}, deadline=CHECK_TIMEOUT
        )
    except GatewayError as exc:
        log.info("%s", exc.message)
        return False
    finally:
        await client.aclose()
    return True


def _object(content: bytes) -> dict[str, Any]:
    try:
        data = json.loads(content)
    except (ValueError, RecursionError):
        return {}
    return data if isinstance(data, dict) else {}


def _pid(content: bytes) -> int | None:
    pid = _object(content).get("pid")
    return pid if isinstance(pid, int) and not isinstance(pid, bool) and pid > 1 else None

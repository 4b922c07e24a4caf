"""The service's own files: the key, the lock of the one instance, and where it listens."""

from __future__ import annotations

import fcntl
import importlib.metadata
import json
import os
import secrets
from pathlib import Path
from typing import Any

from gatewayd.local.runtime.base import STATE_MODE

KEY_FILE = "api-key"
LOCK_FILE = "lock"
ENDPOINT_FILE = "endpoint.json"
DATABASE_FILE = "state.db"
RUNTIME_FILE = "runtime"
FIRST_RUNTIME = "native"  # of a directory that does not say
SECRET_MODE = 0o600


def version() -> str:
    """The installed version; "" for a tree that is not installed."""
    try:
        return importlib.metadata.version("gatewayd")
    except importlib.metadata.PackageNotFoundError:
        return ""


class StateDirError(Exception):
    """The state directory cannot be used; the message says why."""


class StateDirInUse(StateDirError):
    """Another service holds it."""


class StateDir:
    """A state directory that this process holds alone."""

    def __init__(self, path: Path) -> None:
        """Make the directory if need be and lock it.

        Raises:
            StateDirInUse: another instance runs on it.
            StateDirError: it cannot be made, or belongs to somebody else.
        """
        self.path = path
        try:
            path.mkdir(mode=STATE_MODE, parents=True, exist_ok=True)
            if path.stat().st_uid != os.geteuid():
                raise StateDirError(f"cannot use the state directory {path}: it belongs to another user")
            path.chmod(STATE_MODE)
            self._lock_fd = os.open(path / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, SECRET_MODE)
        except OSError as exc:
            raise StateDirError(f"cannot use the state directory {path}: {exc.strerror}") from exc
        try:
            fcntl.flock(self._lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as exc:
            holder = os.pread(self._lock_fd, 20, 0).decode("ascii", "replace").strip()
            os.close(self._lock_fd)
            endpoint = self.published().get("endpoint", "not listening yet")
            message = f"cannot use the state directory {path}: a service with pid {holder or 'unknown'} runs on it ({endpoint})"
            raise StateDirInUse(message) from exc
        try:
            os.ftruncate(self._lock_fd, 0)
            os.pwrite(self._lock_fd, f"{os.getpid()}\n".encode(), 0)
            (path / ENDPOINT_FILE).unlink(missing_ok=True)  # of a service that was killed
        except OSError as exc:
            os.close(self._lock_fd)
            raise StateDirError(f"cannot use the state directory {path}: {exc.strerror}") from exc

    @property
    def key_file(self) -> Path:
        """Where the API key is."""
        return self.path / KEY_FILE

    @property
    def database(self) -> Path:
        """Where the sandboxes are recorded."""
        return self.path / DATABASE_FILE

    def key(self) -> str:
        """The API key, made at the first call. Raises StateDirError."""
        try:
            if not self.key_file.exists():
                self._write(self.key_file, secrets.token_urlsafe(32) + "\n")
            self.key_file.chmod(SECRET_MODE)
            key = self.key_file.read_text(encoding="ascii").strip()
        except (OSError, UnicodeDecodeError) as exc:
            raise StateDirError(f"cannot read the API key {self.key_file}: {exc}") from exc
        if len(key) < 16:
            raise StateDirError(f"the API key in {self.key_file} is too short: remove the file and a new one is made")
        return key

    def publish(self, endpoint: str) -> None:
        """Say where the service listens. Raises StateDirError."""
        content = {"endpoint": endpoint, "pid": os.getpid(), "version": version()}
        try:
            self._write(self.path / ENDPOINT_FILE, json.dumps(content) + "\n")
        except OSError as exc:
            raise StateDirError(f"cannot write {self.path / ENDPOINT_FILE}: {exc.strerror}") from exc

    def claim(self, runtime: str, *, empty: bool) -> None:
        """Say which runtime has the sandboxes' disks; only without sandboxes it can be another than before.

        Raises:
            StateDirError: they are another runtime's.
        """
        file = self.path / RUNTIME_FILE
        try:
            before = file.read_text(encoding="utf-8").strip() if file.exists() else FIRST_RUNTIME
            if before == runtime:
                return
            if not empty:
                raise StateDirError(
                    f"the sandboxes in {self.path} are on the {before!r} runtime: use --runtime {before} for them"
                )
            self._write(file, runtime + "\n")
        except OSError as exc:
            raise StateDirError(f"cannot use {file}: {exc.strerror}") from exc

    def published(self) -> dict[str, Any]:
        """What a running service says about itself; {} when there is none."""
        try:
            content = json.loads((self.path / ENDPOINT_FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return content if isinstance(content, dict) else {}

    def close(self) -> None:
        """Take back the endpoint and let the directory go; idempotent."""
        if self._lock_fd >= 0:
            (self.path / ENDPOINT_FILE).unlink(missing_ok=True)
            os.close(self._lock_fd)
            self._lock_fd = -1

    def _write(self, path: Path, content: str) -> None:
        """Write a file that is the user's alone, all at once."""
        draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        fd = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, SECRET_MODE)
        try:
            with os.fdopen(fd, "w", encoding="utf-8") as file:
                file.write(content)
            draft.rename(path)
        except BaseException:
            draft.unlink(missing_ok=True)
            raise

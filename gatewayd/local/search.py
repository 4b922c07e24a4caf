"""POST /glob and /grep: finding files in a sandbox by name and by content.

The search runs inside, as the user that commands run as; this side reads its output, matches patterns and sets the limits.
"""

from __future__ import annotations

import asyncio
import errno
import posixpath
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any

from fastapi import APIRouter, Request
from pydantic import AfterValidator, BaseModel, Field, StrictInt

from gatewayd.local.attachment import Attachment
from gatewayd.local.commands import CommandOptions, CommandSession
from gatewayd.local.envelope import ServiceError
from gatewayd.local.exec_sse import gone
from gatewayd.local.execution import FALLBACK_SHELL, spawn_failure
from gatewayd.local.globs import Glob
from gatewayd.local.models import MAX_PATH, AbsolutePath, Text
from gatewayd.local.registry import TooManyCommands
from gatewayd.local.rest_server import boxes_of
from gatewayd.local.runtime.base import RuntimeFailure, SpawnSpec
from gatewayd.local.sandbox import Run, Sandbox
from gatewayd.local.searchwords import (
    GLOB_SCRIPT,
    GREP_SCRIPT,
    NO_ACCESS,
    NO_ENTRY,
    NO_FOLDER,
    NO_TOOLS,
    EntryParser,
    Garbage,
    LineParser,
)
from gatewayd.tasks import TaskOwner

DEADLINE = 30.0  # seconds a search may take; what was found until then is the answer, and `truncated` is set
DEFAULT_LIMIT = 1000  # matches, when the client names no limit
MAX_LIMIT = 10000  # matches in one answer, whatever the client asks for
MAX_ANSWER = 8 * 1024 * 1024  # bytes of paths and texts in one answer
MAX_SCAN = 512 * 1024 * 1024  # bytes of output read from one search

router = APIRouter()


def _one_line(value: str) -> str:
    if "\n" in value:
        raise ValueError("a search is for text within one line: no newline")
    return value


Pattern = Annotated[Text, Field(min_length=1, max_length=MAX_PATH)]


class GlobBody(BaseModel):
    """POST /glob."""

    pattern: Pattern  # matched against paths relative to `path`
    path: AbsolutePath
    limit: Annotated[StrictInt, Field(ge=1)] | None = None


class GrepBody(BaseModel):
    """POST /grep."""

    pattern: Annotated[Pattern, AfterValidator(_one_line)]  # literal text
    path: AbsolutePath
    glob: Pattern | None = None  # without / and **: of file names; else of paths relative to `path`
    limit: Annotated[StrictInt, Field(ge=1)] | None = None


@router.post("/dataplane/{box_id}/glob")
async def glob(request: Request, box_id: str, body: GlobBody) -> dict[str, Any]:
    """Files and folders whose path fits a pattern, sorted. Symbolic links are listed and not followed."""
    pattern = Glob(body.pattern)
    base = posixpath.normpath(posixpath.join(body.path, pattern.folder))
    parser = EntryParser()

    def matches(data: bytes) -> list[dict[str, Any]]:
        return [
            {
                "path": posixpath.join(base, entry.path),
                "is_dir": entry.is_dir,
                "size_bytes": entry.size,
                "modified_at": entry.modified,
            }
            for entry in parser.feed(data)
            if pattern.matches(entry.path)
        ]

    search = _Search(request, body.path, _limit(body.limit), matches)
    depth = [] if pattern.depth is None else ["-maxdepth", str(pattern.depth)]
    if pattern.parents:
        depth = ["-maxdepth", "0"]
    await search.run(box_id, GLOB_SCRIPT, [pattern.folder, *depth, "-name", pattern.name], {})
    search.found.sort(key=lambda match: str(match["path"]))
    return {"matches": search.found, "truncated": search.truncated}


@router.post("/dataplane/{box_id}/grep")
async def grep(request: Request, box_id: str, body: GrepBody) -> dict[str, Any]:
    """Lines that have a literal text, in files of text. At most the first 4096 bytes of a line are answered."""
    pattern = Glob(body.glob or "**")
    by_name = "/" not in (body.glob or "/") and "**" not in (body.glob or "")
    folder = "" if by_name else pattern.folder
    base = posixpath.normpath(posixpath.join(body.path, folder))
    fits = pattern.matches_name if by_name else pattern.matches
    parser = LineParser()

    def matches(data: bytes) -> list[dict[str, Any]]:
        return [
            {"path": posixpath.join(base, line.path), "line": line.number, "text": line.text}
            for line in parser.feed(data)
            if fits(line.path)
        ]

    search = _Search(request, body.path, _limit(body.limit), matches)
    nowhere = ["-maxdepth", "0"] if pattern.parents else []
    await search.run(box_id, GREP_SCRIPT, [folder, *nowhere, "-name", pattern.name], {"WORDS": body.pattern})
    partial = parser.fallback and search.exit_code != 0
    return {"matches": search.found, "truncated": search.truncated or partial}


def _limit(asked: int | None) -> int:
    return min(asked or DEFAULT_LIMIT, MAX_LIMIT)


class _Search:
    """One search: a script in a sandbox whose output is matched as it comes."""

    def __init__(self, request: Request, path: str, limit: int, matches: Callable[[bytes], list[dict[str, Any]]]) -> None:
        self._request = request
        self._path = path  # where it searches, for messages
        self._limit = limit  # matches at most
        self._matches = matches  # the matches in the next bytes of output; raises Garbage
        self.found: list[dict[str, Any]] = []
        self.truncated = False  # a limit or the deadline ended it
        self.exit_code: int | None = None  # of the script, when it came to its end

    async def run(self, box_id: str, script: str, args: Iterable[str], env: Mapping[str, str]) -> None:
        """Search, and fill the attributes. Raises ServiceError."""
        boxes = boxes_of(self._request)
        sandbox = boxes.by_id(box_id)
        with sandbox.in_use():
            session = await self._start(await boxes.running(sandbox), sandbox, script, args, env)
            attachment = session.attach()
            try:
                session.close_stdin()
                await self._collect(attachment)
            finally:
                attachment.close()  # and with it the command
        outcome = session.outcome
        if outcome is not None and outcome.error_type:
            self.truncated = True
        elif outcome is not None and not self.truncated:
            self.exit_code = outcome.exit_code
            self._check(outcome.exit_code)

    async def _start(
        self, run: Run, sandbox: Sandbox, script: str, args: Iterable[str], env: Mapping[str, str]
    ) -> CommandSession:
        user: str | None = (sandbox.record.run_config or {}).get("user")
        spec = SpawnSpec([FALLBACK_SHELL, "-c", script, "sh", self._path, *args], {"LC_ALL": "C", **env}, cwd="/", user=user)
        options = CommandOptions(timeout=DEADLINE, idle_timeout=60.0, ttl=0.0, kill_on_disconnect=True)
        try:
            return await run.commands.get_or_start(None, options, lambda: run.box.spawn(spec))
        except OSError as exc:
            if exc.errno == errno.ENOENT:
                raise self._no_tools() from exc
            raise ServiceError(400, "ReadError", spawn_failure(exc)) from exc
        except (RuntimeFailure, TooManyCommands) as exc:
            raise ServiceError(400, "ReadError", spawn_failure(exc)) from exc

    async def _collect(self, attachment: Attachment) -> None:
        owner = TaskOwner("search")
        leaving = owner.start(gone(self._request.receive), "watch client")
        reading = owner.start(self._read(attachment), "read output")
        try:
            await asyncio.wait({leaving, reading}, return_when=asyncio.FIRST_COMPLETED)
            if not reading.done():
                raise ServiceError(400, "ReadError", "the client went away; the search was ended")
            if not reading.result():
                raise ServiceError(400, "ReadError", f"cannot search {self._path}: find in the sandbox gave unreadable output")
        finally:
            await owner.aclose()

    async def _read(self, attachment: Attachment) -> bool:
        """Read to the end or to a limit; False when the output makes no sense."""
        scanned = answer = 0
        while pieces := await attachment.read_bytes():
            for piece in pieces:
                scanned += len(piece.data)
                if piece.stream != "stdout":
                    continue
                try:
                    matches = self._matches(piece.data)
                except Garbage:
                    return False
                for match in matches:
                    answer += len(match["path"]) + len(match.get("text", ""))
                    if len(self.found) >= self._limit or answer > MAX_ANSWER:
                        self.truncated = True
                        return True
                    self.found.append(match)
            if scanned > MAX_SCAN:
                self.truncated = True
                return True
            await asyncio.sleep(0)  # a full ring is worked off in steps
        return True

    def _check(self, code: int) -> None:
        if code == NO_ENTRY:
            raise ServiceError(404, "FileNotFound", f"cannot search {self._path}: No such file or directory")
        if code == NO_FOLDER:
            raise ServiceError(400, "ReadError", f"cannot search {self._path}: Not a directory")
        if code == NO_ACCESS:
            raise ServiceError(403, "ReadError", f"cannot search {self._path}: Permission denied")
        if code == NO_TOOLS:
            raise self._no_tools()

    def _no_tools(self) -> ServiceError:
        tools = "sh, find, stat, and grep or awk"
        return ServiceError(400, "ReadError", f"cannot search {self._path}: it takes {tools}, and the sandbox's image lacks some")

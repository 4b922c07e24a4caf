"""Running commands and those who watch them (protocol section 2, */execute/ws*).

A session is one command: its process, the kept output of each stream, its timers. Attachments are clients reading from their own
offsets. A session outlives its clients; its client can come back by command id and offset.

Back-pressure: while clients are attached, a stream is read only as far as the ring holds everything the foremost of them has not
got yet. With nobody attached the ring drops its oldest bytes and the command never blocks.
"""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from gatewayd.local.pipes import Drains, InputPipe, OutputPipe, close_fd
from gatewayd.local.ring import RING_CAPACITY, Ring, decode_held
from gatewayd.local.runtime.base import Process
from gatewayd.tasks import TaskOwner

log = logging.getLogger(__name__)

CHUNK = 64 * 1024  # bytes of output in one message at most
LINGER = 1.0  # seconds of silence after which a finished command's still open pipes are given up
LINGER_LIMIT = 3.0  # seconds after which they are given up even if somebody writes to them all the time
START_GRACE = 30.0  # seconds in which the client that started a command attaches, however short its idle timeout
MAX_ATTACHMENTS = 64  # clients of one command at the same time

StreamName = Literal["stdout", "stderr"]


@dataclass(frozen=True)
class CommandOptions:
    """How long a command and its session live. Times in seconds."""

    timeout: float | None = None  # the command is killed after it; None: never
    idle_timeout: float | None = 300.0  # killed when no client was attached for this long; None: never
    ttl: float | None = 600.0  # a finished command can be taken up again for this long; None: as long as the sandbox runs
    kill_on_disconnect: bool = False  # killed when the last client goes


@dataclass(frozen=True)
class Outcome:
    """How a command ended: an exit code, or an error in its place."""

    exit_code: int
    error_type: str = ""  # CommandTimeout
    error: str = ""


@dataclass(frozen=True)
class Chunk:
    """A piece of output as text."""

    stream: StreamName
    offset: int  # of its first byte in the stream
    text: str
    size: int  # bytes it stands for


class TooManyClients(Exception):
    """A command has MAX_ATTACHMENTS clients already."""


class CommandSession:
    """One command, from its start until it is forgotten."""

    def __init__(
        self,
        command_id: str,
        process: Process,
        options: CommandOptions,
        *,
        tasks: TaskOwner,
        drains: Drains,
        on_finished: Callable[[CommandSession], None],
        capacity: int = RING_CAPACITY,
    ) -> None:
        self.command_id = command_id
        self.process = process
        self.options = options
        self.outcome: Outcome | None = None  # set when the command has ended and its output is complete
        self.finished = asyncio.Event()  # set with outcome
        self._tasks = tasks
        self._drains = drains  # takes pipes that background processes still hold
        self._on_finished = on_finished  # called once, when outcome is set
        self._attachments: set[Attachment] = set()  # clients reading now
        self._activity = asyncio.Event()  # something was read, or a pipe ended
        self._timed_out = False  # the timeout has killed the command
        self._loop = asyncio.get_running_loop()
        self._fds = {process.stdin, process.stdout}  # open descriptors of the process, ours to close
        self.stdout = OutputPipe(process.stdout, Ring(capacity), self._changed)
        self.stderr: OutputPipe | None = None  # None with a terminal
        if process.stderr is not None:
            self._fds.add(process.stderr)
            self.stderr = OutputPipe(process.stderr, Ring(capacity), self._changed)
        self._pty = process.stdin == process.stdout  # one descriptor for both ways: nothing to half-close
        self._stdin = InputPipe(process.stdin, self._stdin_closed)
        self._timeout_timer: asyncio.TimerHandle | None = None  # runs until the process exits
        if options.timeout is not None:
            self._timeout_timer = self._loop.call_later(options.timeout, self._on_timeout)
        self.unwatched = asyncio.Event()  # set while nobody is attached
        self.unwatched.set()
        self._idle_timer: asyncio.TimerHandle | None = None  # runs while nobody is attached
        self._watch_idle(START_GRACE)
        tasks.start(self._settle(), f"settle {command_id}")

    @property
    def kept(self) -> int:
        """Bytes of output held in memory."""
        return sum(len(pipe.ring) for pipe in self._pipes())

    @property
    def attached(self) -> int:
        """Number of clients reading."""
        return len(self._attachments)

    async def send_input(self, data: bytes) -> None:
        """Queue bytes for stdin; returns when they fit the input buffer."""
        await self._stdin.feed(data)

    def close_stdin(self) -> None:
        """End stdin after what is queued. A terminal has no end to close: nothing happens (the client sends EOT instead)."""
        if not self._pty:
            self._stdin.end()

    async def resize(self, cols: int, rows: int) -> None:
        """Set the terminal's size; nothing without one."""
        if self.outcome is None:
            await self.process.resize(cols, rows)

    async def kill(self) -> None:
        """SIGKILL to the whole process group."""
        if not self.process.exited.done():
            await self.process.signal(signal.SIGKILL)

    def attach(self, stdout_offset: int = 0, stderr_offset: int = 0) -> Attachment:
        """Begin reading at these offsets, or at the oldest byte kept. Close the attachment when done.

        Raises:
            TooManyClients: MAX_ATTACHMENTS read already.
        """
        if len(self._attachments) >= MAX_ATTACHMENTS:
            raise TooManyClients(f"command {self.command_id} has {MAX_ATTACHMENTS} clients already")
        cursors = [_Cursor("stdout", self.stdout, stdout_offset)]
        if self.stderr is not None:
            cursors.append(_Cursor("stderr", self.stderr, stderr_offset))
        attachment = Attachment(self, cursors)
        self._attachments.add(attachment)
        self.unwatched.clear()
        self._watch_idle()
        self.update_flow()
        return attachment

    def detach(self, attachment: Attachment) -> None:
        """A client is gone (called by the attachment, once)."""
        if attachment not in self._attachments:
            return
        self._attachments.discard(attachment)
        self.update_flow()
        self._watch_idle()
        if not self._attachments:
            self.unwatched.set()
            if self.options.kill_on_disconnect and not self.process.exited.done():
                self._start_kill("no client is left")

    def update_flow(self) -> None:
        """Pause or resume reading, after a cursor moved or a client came or went."""
        for pipe in self._pipes():
            positions = [cursor.offset for one in self._attachments for cursor in one.cursors if cursor.pipe is pipe]
            pipe.allow(pipe.ring.capacity - (pipe.ring.end - max(positions)) if positions else None)

    def abandon(self) -> None:
        """The sandbox is gone: end the session now, as killed; idempotent."""
        self._finish(Outcome(128 + signal.SIGKILL))

    def _pipes(self) -> tuple[OutputPipe, ...]:
        return (self.stdout,) if self.stderr is None else (self.stdout, self.stderr)

    def _changed(self) -> None:
        self._activity.set()
        self.update_flow()
        for attachment in self._attachments:
            attachment.wake.set()

    def _stdin_closed(self) -> None:
        if not self._pty:
            self._close(self.process.stdin)

    def _close(self, fd: int) -> None:
        if fd in self._fds:
            self._fds.discard(fd)
            close_fd(fd)

    def _on_timeout(self) -> None:
        self._timed_out = True
        self._start_kill(f"timeout after {self.options.timeout:g} s")

    def _start_kill(self, why: str) -> None:
        log.info("command %s: killing it: %s", self.command_id, why)
        self._tasks.start(self.kill(), f"kill {self.command_id}")

    def _watch_idle(self, at_least: float = 0.0) -> None:
        if self._idle_timer is not None:
            self._idle_timer.cancel()
            self._idle_timer = None
        idle = self.options.idle_timeout
        if self._attachments or self.outcome is not None or idle is None:
            return
        self._idle_timer = self._loop.call_later(max(idle, at_least), self._start_kill, f"no client for {idle:g} s")

    async def _settle(self) -> None:
        """Wait for the process, then for the end of its output, and set the outcome.

        A process left behind can hold the pipes open for ever. What the command itself wrote is in them when it has exited, so
        after LINGER seconds of silence, and after LINGER_LIMIT at the latest, the rest is not its own. Time in which a slow
        client keeps the pipes from being read does not count.
        """
        code = await asyncio.shield(self.process.exited)
        if self._timeout_timer is not None:
            self._timeout_timer.cancel()
        limit = self._loop.time() + LINGER_LIMIT
        silent = False
        while not all(pipe.eof for pipe in self._pipes()):
            if any(pipe.paused for pipe in self._pipes()):
                limit = self._loop.time() + LINGER_LIMIT
            elif silent or self._loop.time() > limit:
                break
            self._activity.clear()
            try:
                async with asyncio.timeout(LINGER):
                    silent = not await self._activity.wait()
            except TimeoutError:
                silent = True
        if self._timed_out:
            message = f"Command timed out after {self.options.timeout:g} seconds"
            self._finish(Outcome(code, "CommandTimeout", message))
        else:
            self._finish(Outcome(code))

    def _finish(self, outcome: Outcome) -> None:
        if self.outcome is not None:
            return
        self.outcome = outcome
        for timer in (self._timeout_timer, self._idle_timer):
            if timer is not None:
                timer.cancel()
        self._stdin.stop()
        for pipe in self._pipes():
            open_end = not pipe.eof
            pipe.stop()
            fd = self.process.stdout if pipe is self.stdout else self.process.stderr
            if open_end and not self._pty and fd is not None and fd in self._fds:
                self._fds.discard(fd)
                self._drains.add(fd)
        for fd in list(self._fds):
            self._close(fd)
        self.finished.set()
        self._changed()
        self._on_finished(self)


class _Cursor:
    """How far one client has read one stream."""

    def __init__(self, name: StreamName, pipe: OutputPipe, offset: int) -> None:
        self.name: StreamName = name
        self.pipe = pipe
        self.offset = pipe.ring.clamp(offset)  # of the next byte to deliver

    def take(self, final: bool) -> Chunk | None:
        """The next piece of text, or None when there is none yet. With `final` a cut-off character is delivered too."""
        ring = self.pipe.ring
        start = ring.clamp(self.offset)
        data = ring.read(start, CHUNK)
        text, size = decode_held(data, final and start + len(data) == ring.end)
        if not size:
            return None
        self.offset = start + size
        return Chunk(self.name, start, text, size)


class Attachment:
    """A client reading a command's output. Close it when done."""

    def __init__(self, session: CommandSession, cursors: list[_Cursor]) -> None:
        self.cursors = cursors  # one per stream
        self.wake = asyncio.Event()  # set by the session when there may be something new
        self._session = session

    async def read(self) -> list[Chunk]:
        """The next pieces of output, as they come; an empty list when the command has ended and all is delivered."""
        while True:
            self.wake.clear()
            final = self._session.outcome is not None
            chunks = [chunk for cursor in self.cursors if (chunk := cursor.take(final)) is not None]
            if chunks:
                self._session.update_flow()
                return chunks
            if final:
                return []
            await self.wake.wait()

    def close(self) -> None:
        """Stop reading; idempotent."""
        self._session.detach(self)

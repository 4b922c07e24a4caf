"""Running commands and those who watch them (protocol section 2, */execute/ws*).

A session is one command: its process, the kept output of each stream, its timers. Attachments are clients reading from their own
offsets. A session outlives its clients; its client can come back by command id and offset.

Back-pressure: while clients are attached, a stream is read only as far as the ring holds everything the foremost of them has not
got yet. With nobody attached the ring drops its oldest bytes and the command never blocks.

A client that acknowledges (/execute/stream) has got only what it says it has: nothing after that is dropped while it reads, nor
for HOLD seconds after it has gone, in which it may come back.
"""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Callable
from dataclasses import dataclass

from gatewayd.local.agentforward import AgentForward
from gatewayd.local.attachment import Attachment, Cursor, StreamName
from gatewayd.local.pipes import Drains, InputPipe, OutputPipe, close_fd
from gatewayd.local.ring import RING_CAPACITY, Ring
from gatewayd.local.runtime.base import Process
from gatewayd.tasks import TaskOwner

log = logging.getLogger(__name__)

LINGER = 1.0  # seconds of silence after which a finished command's still open pipes are given up
LINGER_LIMIT = 3.0  # seconds after which they are given up even if somebody writes to them all the time
START_GRACE = 30.0  # seconds in which the client that started a command attaches, however short its idle timeout
HOLD = 120.0  # seconds that unacknowledged output blocks a command whose client has gone; a client may need 60 to notice
MAX_ATTACHMENTS = 64  # clients of one command at the same time


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
        agent: AgentForward | None = None,
    ) -> None:
        self.command_id = command_id
        self.process = process
        self.options = options
        self.outcome: Outcome | None = None  # set when the command has ended and its output is complete
        self.finished = asyncio.Event()  # set with outcome
        self._agent = agent  # forwards the clients' SSH agents; None: the command did not ask for it
        self._tasks = tasks
        self._drains = drains  # takes pipes that background processes still hold
        self._on_finished = on_finished  # called once, when outcome is set
        self._attachments: set[Attachment] = set()  # clients reading now
        self._held: dict[StreamName, int] | None = None  # what an acknowledging client has received; None: there is none
        self._hold_timer: asyncio.TimerHandle | None = None  # runs while it is away
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

    @property
    def blocked(self) -> bool:
        """A stream's ring is full of output that was not acknowledged."""
        held = self._held
        return held is not None and any(
            not pipe.eof and pipe.ring.end - max(held[name], pipe.ring.start) >= pipe.ring.capacity
            for name, pipe in self._named()
        )

    def attach(
        self, stdout_offset: int = 0, stderr_offset: int = 0, *, acknowledges: bool = False, agent: bool = False
    ) -> Attachment:
        """Begin reading at these offsets, or at the oldest byte kept. Close the attachment when done.

        Args:
            stdout_offset: offset of the first byte wanted.
            stderr_offset: the same of the other stream.
            acknowledges: the client has what is before these offsets, and attaches again when `blocked`.
            agent: the client's SSH agent may be asked, if the command has one forwarded.

        Raises:
            TooManyClients: MAX_ATTACHMENTS read already.
        """
        if len(self._attachments) >= MAX_ATTACHMENTS:
            raise TooManyClients(f"command {self.command_id} has {MAX_ATTACHMENTS} clients already")
        cursors = [Cursor("stdout", self.stdout, stdout_offset)]
        if self.stderr is not None:
            cursors.append(Cursor("stderr", self.stderr, stderr_offset))
        forward = self._agent if agent and self.outcome is None else None
        attachment = Attachment(self, cursors, acknowledges=acknowledges, agent=forward.attach() if forward else None)
        if acknowledges:
            self._held = {cursor.name: cursor.offset for cursor in cursors}
            self._watch_hold()
        elif not any(one.acknowledges for one in self._attachments):
            self._release()
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
        if self._held is not None and not any(one.acknowledges for one in self._attachments):
            self._watch_hold(HOLD)
        self.update_flow()
        self._watch_idle()
        if not self._attachments:
            self.unwatched.set()
            if self.options.kill_on_disconnect and not self.process.exited.done():
                self._start_kill("no client is left")

    def update_flow(self) -> None:
        """Pause or resume reading, after a cursor moved or a client came or went."""
        for name, pipe in self._named():
            read = [cursor.offset for one in self._attachments for cursor in one.cursors if cursor.name == name]
            needed = [max(read)] if read else []
            if self._held is not None:
                needed.append(max(self._held[name], pipe.ring.start))
            pipe.allow(pipe.ring.capacity - (pipe.ring.end - min(needed)) if needed else None)

    def abandon(self) -> None:
        """The sandbox is gone: end the session now, as killed; idempotent."""
        self._finish(Outcome(128 + signal.SIGKILL))

    def _pipes(self) -> tuple[OutputPipe, ...]:
        return (self.stdout,) if self.stderr is None else (self.stdout, self.stderr)

    def _named(self) -> list[tuple[StreamName, OutputPipe]]:
        return [("stdout", self.stdout)] if self.stderr is None else [("stdout", self.stdout), ("stderr", self.stderr)]

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

    def _watch_hold(self, seconds: float | None = None) -> None:
        if self._hold_timer is not None:
            self._hold_timer.cancel()
            self._hold_timer = None
        if seconds is not None and self.outcome is None:
            self._hold_timer = self._loop.call_later(seconds, self._release)

    def _release(self) -> None:
        """The client that acknowledged does not come back: its output is held no more."""
        if self._held is not None:
            self._held = None
            self._watch_hold()
            self.update_flow()

    async def _settle(self) -> None:
        """Wait for the process, then for the end of its output, and set the outcome.

        A process left behind can hold the pipes open for ever. What the command itself wrote is in them when it has exited, so
        after LINGER seconds of silence, and after LINGER_LIMIT at the latest, the rest is not its own. Time in which a slow
        client keeps the pipes from being read does not count.
        """
        code = await asyncio.shield(self.process.exited)
        if self._timeout_timer is not None:
            self._timeout_timer.cancel()
        if self._agent is not None:  # before the outcome: who knows that the command has ended finds no socket of it
            self._agent.close()
            await self._agent.removed()
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
        for timer in (self._timeout_timer, self._idle_timer, self._hold_timer):
            if timer is not None:
                timer.cancel()
        if self._agent is not None:
            self._agent.close()
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

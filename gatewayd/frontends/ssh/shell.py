"""One SSH session — a shell, a command, or sftp — carried by a process inside the sandbox."""

from __future__ import annotations

import asyncio
import logging
import re
import struct
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

from asyncssh.constants import EXTENDED_DATA_STDERR

from gatewayd.api import ErrorKind
from gatewayd.errors import GatewayError, printable
from gatewayd.frontends.ssh.engine import CommandSession, SessionChannel
from gatewayd.frontends.ssh.inbox import Inbox
from gatewayd.sandbox.session import ABSENCE, STDERR, STDOUT, ProcessSpec
from gatewayd.tasks import TaskOwner

if TYPE_CHECKING:
    from gatewayd.frontends.ssh.target import Target
    from gatewayd.frontends.ssh.work import Work
    from gatewayd.sandbox.session import ExitStatus, Session

log = logging.getLogger(__name__)

CHUNK = 256 * 1024  # bytes moved at once
TEXT_DRAIN = 0.25  # seconds of silence after which a terminal without a guest is done when its shell has ended
FAILED = 255  # exit status of what is not the command's own fault, as ssh's
PENDING_MAX = 32  # signals and sizes that came before the process ran
SIZE_MAX = 65535  # columns, rows, pixels: what a kernel's struct winsize holds
# sig-name of RFC 4254, section 6.10; others need a domain
SIGNALS = frozenset({"ABRT", "ALRM", "FPE", "HUP", "ILL", "INT", "KILL", "PIPE", "QUIT", "SEGV", "TERM", "USR1", "USR2"})
BINARY = re.compile(r"\s*(?:\S*/)?(scp\s+(-\S+\s+)*-[tf]|rsync\s+--server|git[ -](upload-pack|receive-pack|upload-archive))\b")
TEXT_ONLY = "text only: the image has no Python, so scp, sftp, rsync, port listeners and binary data do not work"
_MODE = struct.Struct(">BI")


class ShellSession(CommandSession):
    """From the channel's first request to its end."""

    def __init__(self, owner: SessionOwner, work: Work) -> None:
        """`work`: of the connection; ends after all channels."""
        self._owner = owner
        self._work = work
        self._channel: SessionChannel = None  # type: ignore[assignment]  # set by connection_made, before anything else
        self._inbox = Inbox()
        self._writable = asyncio.Event()  # clear while the channel holds enough
        self._writable.set()
        self._terminal: tuple[str, tuple[int, int, int, int], bytes] | None = None  # TERM, size, modes
        self._what = ""  # command, "" for a login shell; or "sftp"
        self._kind = ""  # "shell", "exec", "sftp"; set by the request that starts it
        self._session: Session | None = None  # while the process runs
        self._pending: list[Callable[[Session], None]] = []  # what came before it ran
        self._main: asyncio.Task[None] | None = None  # runs from session_started
        self._stopped = False  # the client reads no standard output any more
        self._refusal: GatewayError | None = None  # why the session was ended here, if it was
        self._told = False  # the client knows how it ended: what is left is to tidy up
        self._lost = False  # the channel is gone
        self._moved = 0  # bytes of output
        self._closers: list[Callable[[], None]] = []  # what ends with this session: its X11 display

    # --- requests -----------------------------------------------------------------------------------------------------

    def connection_made(self, chan: SessionChannel) -> None:  # type: ignore[override]
        """The channel is open."""
        self._channel = chan
        self._inbox.attach(chan)

    def pty_requested(self, term_type: str, term_size: tuple[int, int, int, int], term_modes: object) -> bool:
        """A terminal is wanted."""
        modes = term_modes if isinstance(term_modes, dict) else {}
        encoded = b"".join(_MODE.pack(mode, value) for mode, value in modes.items()) + b"\0"
        self._terminal = (term_type, term_size, encoded)
        return True

    def shell_requested(self) -> bool:
        """A login shell."""
        self._kind = "shell"
        return True

    def exec_requested(self, command: str) -> bool:
        """A command line for the user's shell."""
        self._kind, self._what = "exec", command
        return True

    def subsystem_requested(self, subsystem: str) -> bool:
        """sftp; there is no other."""
        if subsystem != "sftp":
            log.info("ssh %s: refused subsystem %s", self._owner.label, printable(subsystem, 64))
            return False
        self._kind = "sftp"
        return True

    def session_started(self) -> None:
        """The client was told that it starts."""
        self._main = self._work.start(self._run(), "session")

    # --- what comes meanwhile -----------------------------------------------------------------------------------------

    def data_received(self, data: bytes, datatype: int | None) -> None:
        """Input."""
        self._inbox.put(data)

    def eof_received(self) -> bool:
        """The end of the input; output goes on."""
        self._inbox.end()
        return True

    def terminal_size_changed(self, width: int, height: int, pixwidth: int, pixheight: int) -> None:
        """window-change."""
        size = [min(number, SIZE_MAX) for number in (width, height, pixwidth, pixheight)]
        self._tell(lambda session: session.resize(*size))

    def signal_received(self, signal: str) -> None:
        """signal."""
        self._tell(lambda session: self._signal(session, signal))

    def break_received(self, msec: int) -> bool:
        """break: a serial line's; there is none."""
        return False

    def output_stopped(self) -> None:
        """eow: the process gets SIGPIPE at its next write, as if the reader were local."""
        self._stopped = True
        self._channel.drop_output()
        self._tell(lambda session: session.stop_output(STDOUT))

    def pause_writing(self) -> None:
        """The channel holds enough."""
        self._writable.clear()

    def resume_writing(self) -> None:
        """It wants more."""
        self._writable.set()

    def connection_lost(self, exc: Exception | None) -> None:
        """The channel is closed, by whomever."""
        self._lost = True
        self._inbox.cut()
        self._writable.set()
        if self._main is not None and not self._told:
            self._main.cancel()
        for close in self._closers:
            close()
        self._closers.clear()

    def end_with(self, close: Callable[[], None]) -> None:
        """Call `close` when this session ends; at once when it has."""
        if self._lost:
            close()
        else:
            self._closers.append(close)

    def _tell(self, what: Callable[[Session], None]) -> None:
        """Now, or once the process runs."""
        if self._session is not None:
            what(self._session)
        elif len(self._pending) < PENDING_MAX:
            self._pending.append(what)

    def _signal(self, session: Session, name: str) -> None:
        try:
            session.signal(name)
        except GatewayError as exc:  # no name of a signal, or text only
            self.say(f"sandbox: {exc.message}")

    # --- the process --------------------------------------------------------------------------------------------------

    async def _run(self) -> None:
        how = "the client left"
        log.info("ssh %s: %s opened", self._owner.label, self._kind)
        try:
            how = await self._serve()
        except GatewayError as exc:
            how = exc.message
            self.say(f"sandbox: {exc.message}" + (f"\nhint: {exc.hint}" if exc.hint else ""))
            self._exit(FAILED)
            if exc.kind in (ErrorKind.STOPPED, ErrorKind.NOT_FOUND):  # anything else may be this session's alone
                self._owner.sandbox_lost()
        except Exception:
            how = "internal error"
            log.exception("an ssh session failed")
            self.say("sandbox: internal error, see the daemon's log")
            self._exit(FAILED)
        finally:
            log.info("ssh %s: %s closed, %d bytes of output: %s", self._owner.label, self._kind, self._moved, printable(how, 200))

    async def _serve(self) -> str:
        """Start the process and carry its streams; how it ended."""
        session = await self._start()
        if session is None:
            return "refused"
        children = TaskOwner("ssh session")
        try:
            self._session = session
            for what in self._pending:
                what(session)
            self._pending.clear()
            session.input_stopped.add_done_callback(lambda _: self._input_stopped())
            outputs = [
                children.start(self._output(session, STDOUT, None), "stdout"),
                children.start(self._output(session, STDERR, EXTENDED_DATA_STDERR), "stderr"),
            ]
            children.start(self._input(session), "stdin")
            try:
                status = await session.wait()
            except GatewayError as exc:
                raise self._refusal or exc from exc
            await self._drain(outputs)
            return self._finish(status)
        finally:
            self._session = None
            await children.aclose()
            await session.aclose()

    async def _start(self) -> Session | None:
        """The process; None when it was refused, and the client told."""
        target = self._owner.target
        if self._kind == "sftp":
            return await target.sftp()
        if await target.text_only():
            if BINARY.match(self._what):
                raise GatewayError(
                    f"cannot run {printable(self._what.split()[0], 40)}: its image has no Python, so only text gets through",
                    kind=ErrorKind.UNSUPPORTED,
                    hint="use an image with python3, or one with sshd and `sandbox ssh-setup --direct`",
                )
            self.say(f"sandbox: {TEXT_ONLY}")
        env = {**self._owner.environment(), **self._channel.environment}
        if display := self._channel.get_x11_display():
            env["DISPLAY"] = display
        spec = ProcessSpec(command=self._what, env=env, user=target.user, name="ssh", linger=ABSENCE)
        if self._terminal is not None:
            term, size, modes = self._terminal
            cols, rows, xpixel, ypixel = (min(number, SIZE_MAX) for number in size)
            spec = replace(spec, pty=True, term=term, cols=cols, rows=rows, xpixel=xpixel, ypixel=ypixel, modes=modes)
        return await target.start(spec)

    async def _input(self, session: Session) -> None:
        try:
            while data := await self._inbox.get(CHUNK):
                await session.write(data)
            if self._inbox.ended:
                session.write_eof()
        except GatewayError as exc:  # `wait` says why; or the process does not read any more
            self._inbox.close()
            if exc.kind == ErrorKind.UNSUPPORTED:  # a command that has lost some of its input must not go on
                self._refusal = exc
                await session.aclose()

    async def _output(self, session: Session, stream: int, datatype: int | None) -> None:
        try:
            while data := await session.read(stream, CHUNK):
                if stream == STDOUT and self._stopped:
                    continue
                if not self._writable.is_set():
                    await self._writable.wait()
                self._moved += len(data)
                self._channel.write(data, datatype)
        except GatewayError:  # `wait` says why
            return
        except OSError:  # the channel is closing
            return

    async def _drain(self, outputs: list[asyncio.Task[None]]) -> None:
        """Wait for the rest of the output. Without a terminal for as long as anybody holds it open, as sshd does.

        The guest ends a terminal's output soon after its shell has ended; where there is no guest, others may hold it open.
        """
        timeout = TEXT_DRAIN if self._terminal is not None and await self._owner.target.text_only() else None
        while True:
            before = self._moved
            _, running = await asyncio.wait(outputs, timeout=timeout)
            if not running or (self._moved == before and self._writable.is_set()):
                return

    def _finish(self, status: ExitStatus) -> str:
        """Tell the client how the process ended."""
        if status.code is not None:
            self._exit(status.code)
            return f"exit {status.code}"
        name = status.signal if status.signal in SIGNALS else f"{printable(status.signal, 16)}@openssh.com"
        if not self._channel.was_closed:
            self._end_output()
            self._channel.exit_with_signal(name, status.core)
        return f"signal {name}"

    def _exit(self, code: int) -> None:
        if not self._channel.was_closed:
            self._end_output()
            self._channel.exit(code)

    def _end_output(self) -> None:
        self._told = True
        if self._stopped:
            self._channel.drop_output(everything=True)  # its window may never open again
        self._channel.write_eof()

    def _input_stopped(self) -> None:
        """The process has closed its input: what still comes is dropped, and a client that can is told to send no more."""
        if self._kind != "sftp" and self._terminal is None and not self._lost:
            self._channel.send_input_stopped()
        self._inbox.close()

    def say(self, text: str) -> None:
        """A message of ours to the client's standard error; its terminal may be in raw mode."""
        end = "\r\n" if self._terminal is not None else "\n"
        lines = "".join(f"{printable(line)}{end}" for line in text.splitlines())
        if not self._channel.was_closed:
            self._channel.write(lines.encode("utf-8", "replace"), EXTENDED_DATA_STDERR)


class SessionOwner(Protocol):
    """What a session needs of its connection."""

    target: Target  # what it is about
    label: str  # for log lines: connection number and sandbox

    def environment(self) -> dict[str, str]:
        """What every session of the connection gets."""
        ...

    def sandbox_lost(self) -> None:
        """The sandbox is gone: the connection will not be of use."""

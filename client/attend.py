"""A session of the guest on this process's standard streams, terminal and signals, until it ends or is left.

One poll loop, no thread; nothing in it waits but the poll. What waits for a slow reader, or for the guest, is bounded by the
session's windows.
"""

from __future__ import annotations

import os
import select
import signal
import time
from contextlib import suppress

from client import escapes, output
from client.escapes import Escapes
from client.guestchannel import Channel
from client.proxy import Failure
from client.signals import Signals, exit_code, name_of
from client.sinks import Sink
from client.terminal import SIZE_DEFAULT, Screen, Terminal
from gatewayd.api import ErrorKind
from gatewayd.guest.events import Detached, Event, Exit, Failed, InputStopped, Opened, Output, OutputEof

READ = 65536  # bytes per read of standard input
TWICE = 1.0  # seconds within which a second ^C ends this command by itself
QUIET = 1.0  # seconds without output, after the process has ended, before what it left in the background is left behind
LEAVE_PATIENCE = 2.0  # seconds to tell the guest that the session is over
FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)

NOT_FOUND, NOT_ALLOWED = 127, 126  # exit codes for a command that cannot be run, as a shell's


class Attendance:
    """Carries one session. `run` may be called once."""

    def __init__(
        self,
        channel: Channel,
        *,
        stdin: int | None,
        pty: bool = False,
        terminal: Terminal | None = None,
        owner: bool = True,
        timeout: float = 0.0,
        ended: Exit | None = None,
    ) -> None:
        """
        Args:
            stdin: descriptor to read from, None for no input.
            pty: whether the session has a terminal of its own.
            terminal: this process's, which becomes raw when standard input is that terminal; None when there is none.
            owner: whether leaving the session ends it; one that was attached to goes on.
            timeout: seconds from `run` until all has come, after which the process is killed; 0: never.
            ended: how the process ended, where that is known already.
        """
        self._channel = channel
        self._session = channel.session
        self._stdin = stdin  # None once it has ended, or is of no use
        self._pty = pty
        self._terminal = terminal if pty else None
        typed = self._terminal is not None and stdin == self._terminal.fd
        self._escapes = Escapes() if typed else None  # None: the input is not typed here
        self._screen = Screen()
        self._owner = owner
        self._timeout = timeout
        self._deadline: float | None = None  # when the session is given up; None as well once nothing more is due from the guest
        self._sinks: dict[int, Sink] = {}  # stream → where it goes; gone when nobody reads it
        self._flowing = {1, 2}  # streams that have not ended
        self._typed = b""  # input that waits for credit
        self._opened = False  # the session runs
        self._ended = ended  # how the process ended, once it has
        self._quiet_at = 0.0  # after the end: when output is no longer waited for
        self._interrupted_at = -TWICE  # when the last ^C came
        self._code: int | None = None  # this process's exit code, once it is known
        self._parting = ""  # what to say once the terminal is as it was
        channel.notice = self.notice

    def run(self) -> int:
        """Until the session has ended or was left; the exit code for this process.

        Raises:
            Failure: it cannot be had, is gone, or its output cannot be written.
        """
        if self._timeout:
            self._deadline = time.monotonic() + self._timeout
        self._sinks = {1: Sink(1), 2: Sink(2)}
        try:
            with Signals((*FORWARDED, signal.SIGWINCH)) as signals:
                if self._session.opened:
                    self._start()
                while self._code is None:
                    self._turn(signals)
                return self._code
        except Failure as exc:
            if exc.kind == ErrorKind.FAILED and self._channel.up:
                self._leave(1)  # the output cannot be written: the command must not go on into nothing
            raise
        finally:
            self._restore()
            for sink in self._sinks.values():
                sink.close()
            self._channel.close()

    # -- one turn -----------------------------------------------------------------------------------------------------

    def _turn(self, signals: Signals) -> None:
        now = time.monotonic()
        for number in signals.take():
            self._signal(number, now)
            if self._code is not None:
                return
        self._pump()
        self._channel.advance(now)
        if self._finished(now):
            return
        poll = select.poll()
        poll.register(signals.fd, select.POLLIN)
        for fd, events in self._channel.watched():
            poll.register(fd, events)
        if self._wants_input():
            poll.register(self._stdin or 0, select.POLLIN)
        writing = {sink.fd: stream for stream, sink in self._sinks.items() if sink.size}
        for fd in writing:
            poll.register(fd, select.POLLOUT)
        for fd, events in poll.poll(self._patience(now)):
            if fd == signals.fd:
                continue
            if fd in writing:
                self._written(writing[fd], b"")
            elif fd == self._stdin:
                self._read()
            else:
                now = time.monotonic()
                for event in self._channel.handle(events, now):
                    self._happened(event, now)
            if self._code is not None:
                return

    def _patience(self, now: float) -> float | None:
        """Milliseconds until something is due."""
        times = [self._channel.deadline(), self._deadline]
        if self._ended is not None:
            times.append(max(self._quiet_at, now + 0.05))
        due = min((moment for moment in times if moment is not None), default=None)
        return None if due is None else max(0.0, due - now) * 1000 + 1

    def _finished(self, now: float) -> bool:
        """Whether all is done: the process has ended, and its output has come and was written."""
        if self._ended is not None and not self._flowing:
            self._deadline = None  # whoever reads our output may take longer
        if self._deadline is not None and now >= self._deadline:
            raise self._overdue()
        if self._ended is None or any(sink.size for sink in self._sinks.values()):
            return False
        if self._flowing and (now < self._quiet_at or not self._channel.up or self._session.unacknowledged):
            return False
        code = self._ended.code
        self._session.close()
        self._channel.flush(LEAVE_PATIENCE)
        self._code = code if code is not None else exit_code(self._ended.signal)
        return True

    def _overdue(self) -> Failure:
        """End the session, whose time is over; what to say about it."""
        if self._ended is None:
            self._session.signal("KILL")
        self._leave(1)
        if self._ended is not None:
            return Failure(ErrorKind.TIMEOUT, f"the command has ended, but its output did not within {self._timeout:g} s")
        if not self._opened:
            return Failure(ErrorKind.TIMEOUT, f"the command was not started within {self._timeout:g} s")
        return Failure(ErrorKind.TIMEOUT, f"the command ran for {self._timeout:g} s and was killed")

    # -- from the guest -----------------------------------------------------------------------------------------------

    def _happened(self, event: Event, now: float) -> None:
        if isinstance(event, Output):
            if self._pty:
                self._screen.follow(event.data)
            self._quiet_at = now + QUIET
            self._written(event.stream, event.data)
        elif isinstance(event, Opened):
            self._start()
        elif isinstance(event, OutputEof):
            self._flowing.discard(event.stream)
            self._pass_end(event.stream)
        elif isinstance(event, InputStopped):
            self._stop_input()
        elif isinstance(event, Exit):
            self._ended = event
            self._quiet_at = now + QUIET
            if self._flowing:  # what the guest has sent before it acknowledges this is all that the process has written
                self._session.resize(*SIZE_DEFAULT)
        elif isinstance(event, Failed):
            self._failed(event)
        elif isinstance(event, Detached):
            raise self._channel.taken(event)

    def _start(self) -> None:
        """The session runs; said once more to those who attach."""
        if self._opened:
            return
        self._opened = True
        if self._ended is not None:
            self._quiet_at = time.monotonic() + QUIET
        if self._escapes is not None and self._terminal is not None:
            self._terminal.raw()
        if self._terminal is not None:
            self._session.resize(*self._terminal.size())  # it may have changed since the request

    def _written(self, stream: int, data: bytes) -> None:
        """Write what came, or what waits; the guest may send as much again."""
        sink = self._sinks.get(stream)
        if sink is None:
            return
        try:
            taken = sink.write(data) if data else sink.flush()
        except BrokenPipeError:
            self._sinks.pop(stream).end()
            self._flowing.discard(stream)
            self._session.stop_output(stream)  # the process gets SIGPIPE when it writes, as it would here
            return
        if taken:
            self._session.grant(stream, taken)
        self._pass_end(stream)

    def _pass_end(self, stream: int) -> None:
        """Whoever reads our standard output may know that nothing more comes. Standard error stays: messages go there."""
        sink = self._sinks.get(stream)
        if stream == 1 and sink is not None and 1 not in self._flowing and not sink.size and not self._pty:
            self._sinks.pop(1).end()

    def _failed(self, event: Failed) -> None:
        self._channel.flush(LEAVE_PATIENCE)
        if self._opened:
            raise Failure(ErrorKind.FAILED, f"the session has failed: {event.message}")
        codes = {"not-found": NOT_FOUND, "permission": NOT_ALLOWED}
        if event.kind not in codes:
            kind = ErrorKind.USAGE if event.kind == "usage" else ErrorKind.FAILED
            raise Failure(kind, f"cannot run the command: {event.message}")
        output.note(f"cannot run the command: {event.message}")
        self._code = codes[event.kind]

    # -- to the guest -------------------------------------------------------------------------------------------------

    def _wants_input(self) -> bool:
        if self._stdin is None or not self._opened:
            return False
        if self._escapes is not None:  # must be seen even while the guest takes nothing
            return len(self._typed) < READ
        return not self._typed and self._session.input_credit > 0

    def _read(self) -> None:
        assert self._stdin is not None  # noqa: S101 - it is only polled while it is there
        try:
            data = os.read(self._stdin, READ)
        except BlockingIOError:  # whoever shares it has made it so, and was faster
            return
        except OSError:
            data = b""  # a directory, a terminal that is gone: no input
        if not data:
            self._stdin = None
            self._session.input_eof()
            return
        if self._escapes is None:
            self._typed += data
        else:
            for found in self._escapes.feed(data):
                if isinstance(found, bytes):
                    self._typed += found
                elif not self._act(found):
                    return
        self._pump()

    def _pump(self) -> None:
        """Pass on what was read, as far as the guest takes it."""
        if self._typed and not self._session.input_ended:
            self._typed = self._typed[self._session.send_input(self._typed) :]

    def _stop_input(self) -> None:
        """Nobody takes our input any more: whoever writes it may know."""
        self._typed = b""
        if self._stdin is not None and self._escapes is None and not os.isatty(self._stdin):
            null = os.open(os.devnull, os.O_RDONLY)
            os.dup2(null, self._stdin)
            os.close(null)
        if self._escapes is None:
            self._stdin = None

    def _act(self, action: str) -> bool:
        """Do what was asked for on the keyboard; whether to go on."""
        if action == escapes.LEAVE:
            self._leave(exit_code("HUP"))
            self._parting = f"left sandbox {self._channel.sandbox!r}"
        elif action == escapes.DETACH:
            self._detach(0)
            self._parting = f"detached; `sandbox attach {self._channel.sandbox} {self._session.id.hex()[:8]}` comes back"
        elif action == escapes.HELP:
            with suppress(OSError):
                os.write(2, "\r\n".join(("", *escapes.HELP_TEXT, "")).encode())
        elif action == escapes.SUSPEND and self._terminal is not None:
            self._terminal.restore()
            os.kill(0, signal.SIGTSTP)  # the whole job, as ^Z would
            self._terminal.raw()
            self._session.resize(*self._terminal.size())
            self._session.signal("WINCH")  # programs paint their screens anew
        return self._code is None

    def _signal(self, number: int, now: float) -> None:
        if number == signal.SIGWINCH:
            if self._terminal is not None and self._opened:
                self._session.resize(*self._terminal.size())
            return
        gone = number in (signal.SIGHUP, signal.SIGTERM)
        twice = now - self._interrupted_at <= TWICE
        if not self._owner and gone:
            self._detach(128 + number)
        elif not self._opened or self._ended is not None or (self._pty and gone) or (number == signal.SIGINT and twice):
            self._leave(128 + number)
        else:
            self._session.signal(name_of(number))
        if number == signal.SIGINT:
            self._interrupted_at = now
            if self._code is not None:
                output.after_interrupt()

    def _leave(self, code: int) -> None:
        """End here, and the session with it if it is ours."""
        self._code = code
        if not self._owner:
            return
        self._session.close()
        if self._channel.up:
            self._channel.flush(LEAVE_PATIENCE)
        elif self._channel.answered:
            self._channel.finish(LEAVE_PATIENCE)

    def _detach(self, code: int) -> None:
        """End here; the session goes on."""
        self._code = code
        self._channel.flush(LEAVE_PATIENCE)

    # -- the terminal -------------------------------------------------------------------------------------------------

    def notice(self, text: str) -> None:
        """`output.note`, also while the terminal is raw."""
        if self._terminal is None or not self._terminal.is_raw:
            output.note(text)
            return
        with suppress(OSError):
            os.write(2, f"\r\nsandbox: {output.clean(text)}\r\n".encode(errors="replace"))

    def _restore(self) -> None:
        """Leave the terminal as it was, whatever the remote programs did to it."""
        if undo := self._screen.undo():
            with suppress(OSError):
                if os.isatty(1):
                    os.write(1, undo)
        if self._terminal is not None and self._terminal.is_raw:
            self._terminal.restore()
            with suppress(OSError):
                os.write(2, b"\n" if self._parting else b"")
        if self._parting:
            output.note(self._parting)

"""A session of the guest over connections that come and go. Its numbers live here, so nothing is lost with a connection.

Whoever uses a `Channel` polls `watched`, calls `handle`, and calls `advance` before every wait. It never waits itself.
"""

from __future__ import annotations

import math
import random
import select
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress

from client import output
from client.control import Control
from client.guestlink import Link, Lost
from client.proxy import REPLY_DEADLINE, Failure
from gatewayd import api
from gatewayd.api import ErrorKind
from gatewayd.guest.events import Detached, Event
from gatewayd.guest.session import ClientSession, GuestRefused
from gatewayd.guest.wire import Answer, GuestProtocolError, Mode, Status

EVENTS_PATIENCE = 30.0  # seconds a guest has for what is asked of it where nobody attends
RESUME_DEADLINE = 30.0  # seconds of silence before the daemon's answer when a session is resumed
FIRST_TRIES = 10.0  # seconds in which a connection that breaks before its first answer is made anew
BACKOFF_FIRST, BACKOFF_MAX = 0.05, 2.0  # seconds between attempts; doubled, with jitter
STEADY = 0.5  # seconds after which a connection that broke is replaced at once
PATIENT = 1.0  # seconds before it is shown what the daemon is doing: mostly it is done by then
NOTICES_MAX = 16  # notices kept until then
QUIET = 2.0  # seconds without a connection before the user is told
RETRIED = (ErrorKind.UNAVAILABLE, ErrorKind.TIMEOUT)  # kinds of failure after which a session may still be resumed
COUNT_MAX = 1 << 64


class Channel:
    """One session and its present connection."""

    def __init__(
        self,
        control: Control,
        sandbox: str,
        session: ClientSession,
        *,
        wake: bool,
        linger: float,
        guest: int = 0,
        notice: Callable[[str], None] = output.note,
    ) -> None:
        """
        Args:
            session: opened (`ClientSession.open`) or attached to; not connected yet.
            wake: whether a stopped sandbox is started; only ever by the first connection.
            linger: seconds without a connection after which the session is given up.
            guest: one of `others` of another channel, to ask that guest alone.
            notice: shows a message to the user.
        """
        self.session = session
        self.sandbox = sandbox
        self._control = control
        self._wake = wake
        self._linger = linger
        self._guest = guest  # 0: the guest of the daemon's own version, or whichever knows the session
        self.others: list[int] = []  # guests of other versions, as told by the daemon's answer
        self.notice = notice  # shows a message to the user
        self._link: Link | None = None  # None between attempts
        self._answered = False  # a connection has been answered: from now on the session is resumed
        self._answered_at = 0.0  # when that was so for the first time, on the clock time.monotonic
        self._retry_at = 0.0  # when the next attempt is due, while there is no link
        self._pause = 0.0  # seconds before the next attempt; 0: none has failed
        self._up_at = 0.0  # when the present connection was answered
        self._lost_at: float | None = time.monotonic()  # since when there is no connection
        self._told = False  # the user knows about the loss
        self._early: deque[str] = deque(maxlen=NOTICES_MAX)  # the daemon's notices that were not shown

    @property
    def answered(self) -> bool:
        """Whether the guest has ever been connected: from then on the session may exist."""
        return self._answered

    @property
    def up(self) -> bool:
        """Whether the guest is connected."""
        return self.session.connected_now

    def watched(self) -> list[tuple[int, int]]:
        """Descriptors and the events to poll them for."""
        return self._link.watched() if self._link is not None else []

    def deadline(self) -> float | None:
        """When `advance` must be called at the latest, on the clock time.monotonic."""
        times = [self.session.next_deadline() if self.up else None]
        if self._link is not None:
            times.append(self._link.deadline)
        elif self._lost_at is not None:
            times.append(self._retry_at)
        if self._lost_at is not None and self._early:
            times.append(self._lost_at + PATIENT)
        if self._lost_at is not None and self._answered:
            times.append(self._lost_at + self._linger)
            times.append(None if self._told else self._lost_at + QUIET)
        return min((moment for moment in times if moment is not None), default=None)

    def advance(self, now: float) -> None:
        """Send what is to be sent; dial when it is time to.

        Raises:
            Failure: the session cannot be had, or is gone.
        """
        try:
            if self._link is None:
                if now >= self._retry_at:
                    self._dial()
            else:
                self._link.tick(now)
            if self._link is not None and self.up:
                self.session.tick(now)
                if frames := self.session.data_to_send():
                    self._link.send((b"".join(frames),))
        except Lost as exc:
            self._lose(str(exc), now)
        except Failure as exc:
            self._refused(exc, now)
        if self._lost_at is None:
            return
        if not self._answered:
            self._tell(now)
            return
        if now - self._lost_at >= self._linger:
            text = f"no connection to sandbox {self.sandbox!r} for {self._linger:g} s: the session is over"
            raise Failure(ErrorKind.UNAVAILABLE, text)
        if not self._told and now - self._lost_at >= QUIET:
            self._told = True
            self.notice(f"connection to sandbox {self.sandbox!r} lost, reconnecting…")

    def handle(self, events: int, now: float) -> list[Event]:
        """The descriptor of `watched` has become ready.

        Raises:
            Failure: the session cannot be had, or is gone.
        """
        if self._link is None:
            return []
        try:
            replies, data = self._link.handle(events, now)
            for reply in replies:
                if "ok" in reply:
                    self._connected(reply["ok"], now)
                else:
                    self._early.append(str(reply["notice"]))
            self._tell(now)
            if not data:
                return []
            return self.session.receive(data, now)
        except Lost as exc:
            self._lose(str(exc), now)
            return []
        except Failure as exc:
            self._refused(exc, now)
            return []
        except GuestProtocolError as exc:
            self.close()
            raise Failure(ErrorKind.INTERNAL, f"the guest in sandbox {self.sandbox!r} makes no sense: {exc}") from exc

    def events(self, end: float | None = None) -> Iterator[Event]:
        """Everything that comes, for those who wait for nothing else.

        Args:
            end: until when, on the clock time.monotonic; None: `EVENTS_PATIENCE` after the guest's first answer, since a sandbox
                that has to start may take longer than that.

        Raises:
            Failure: as `advance`; also that the session was taken over, and ``timeout`` at the end.
        """
        while True:
            now = time.monotonic()
            due = self._answered_at + EVENTS_PATIENCE if end is None and self._answered else end
            if due is not None and now >= due:
                raise self._overdue()
            self.advance(now)
            for _, ready in self._wait(due):
                for event in self.handle(ready, time.monotonic()):
                    if isinstance(event, Detached):
                        raise self.taken(event)
                    yield event

    def _overdue(self) -> Failure:
        within = f"within {EVENTS_PATIENCE:g} s"
        if not self._answered:
            return Failure(ErrorKind.TIMEOUT, f"no answer from sandbox {self.sandbox!r} {within}")
        text = f"the guest in sandbox {self.sandbox!r} did not do what it was asked for {within}"
        return Failure(ErrorKind.TIMEOUT, text, f"if that goes on, `sandbox stop {self.sandbox}` ends it")

    def taken(self, event: Detached) -> Failure:
        """What to say when another client has the session now."""
        because = f" ({event.reason})" if event.reason else ""
        return Failure(
            ErrorKind.CONFLICT,
            f"the session in sandbox {self.sandbox!r} was attached from elsewhere{because}",
            f"`sandbox attach {self.sandbox} {self.session.id.hex()[:8]}` takes it back",
        )

    def _wait(self, end: float | None) -> list[tuple[int, int]]:
        """Poll until something is ready or due, or until `end`."""
        due = self.deadline()
        times = [moment for moment in (due, end) if moment is not None]
        poll = select.poll()
        for fd, events in self.watched():
            poll.register(fd, events)
        return poll.poll(max(0.0, min(times) - time.monotonic()) * 1000 + 1 if times else None)

    def finish(self, patience: float) -> bool:
        """Wait until the guest has what was queued (a CLOSE, say), at most `patience` seconds; whether it has it.

        Output that still comes is dropped. Nothing is raised: whatever happens, the caller is done.
        """
        end = time.monotonic() + patience
        with suppress(Failure):
            while self.session.unacknowledged and not self.session.ended:
                if time.monotonic() >= end:
                    break
                self.advance(time.monotonic())
                for _, ready in self._wait(end):
                    self.handle(ready, time.monotonic())
        return not self.session.unacknowledged

    def flush(self, patience: float) -> None:
        """Wait until what was queued is on its way, at most `patience` seconds; only if there is a connection."""
        end = time.monotonic() + patience
        self.session.tick(math.inf)  # the guest forgets a session that has failed once its last frame is acknowledged
        with suppress(Failure):
            while self.up and self._link is not None:
                self.advance(time.monotonic())
                if self._link is None or self._link.idle or (left := end - time.monotonic()) <= 0:
                    break
                poll = select.poll()
                for fd, _ in self.watched():
                    poll.register(fd, select.POLLOUT)
                if poll.poll(left * 1000) and self._link is not None:
                    self._link.send(())

    def close(self) -> None:
        """End the connection, not the session; idempotent."""
        self.session.disconnected()
        if self._link is not None:
            self._link.close()
            self._link = None

    # -- connections --------------------------------------------------------------------------------------------------

    def _dial(self) -> None:
        session = self.session
        request = {
            "op": api.OP_GUEST,
            "sandbox": self.sandbox,
            "session": session.id.hex(),
            "mode": session.mode,
            "received": session.received,
            "guest": self._guest,
            "wake": self._wake and not self._answered,
            **api.caller_fields(self._control.profile),
        }
        try:
            line = api.encode_line(request)
        except ValueError as exc:
            raise Failure(ErrorKind.USAGE, f"cannot send the request: {exc}") from None
        self._link = Link(line, RESUME_DEADLINE if self._answered else REPLY_DEADLINE)

    def _connected(self, ok: object, now: float) -> None:
        answer = _answer(ok)
        attaching = self.session.mode == Mode.ATTACH
        try:
            self.session.connected(answer)
        except GuestRefused as exc:
            self.close()
            raise Failure(ErrorKind.FAILED, *self._why(exc, attaching)) from exc
        except GuestProtocolError as exc:
            self.close()
            raise Failure(ErrorKind.INTERNAL, f"the guest in sandbox {self.sandbox!r} makes no sense: {exc}") from exc
        if self._told:
            self.notice(f"connected to sandbox {self.sandbox!r} again")
        if not self._answered:
            self._answered_at = now
        self._answered = True
        self.others = _others(ok)
        self._up_at = now
        self._pause = 0.0
        self._lost_at = None
        self._told = False

    def _why(self, refused: GuestRefused, attaching: bool) -> tuple[str, str]:
        """Message and hint."""
        box = self.sandbox
        if refused.status == Status.NO_SESSION and attaching:
            return f"sandbox {box!r} has no such session any more", f"`sandbox ps {box}` shows those it has"
        if refused.status == Status.NO_SESSION and self._answered:
            return f"the session is gone: sandbox {box!r} was restarted, or has waited for longer than {self._linger:g} s", ""
        if refused.status == Status.GONE:
            return f"output of the session in sandbox {box!r} was dropped while nobody was connected", ""
        if refused.status == Status.TOO_MANY:
            return f"sandbox {box!r} has too many sessions", f"`sandbox ps {box}` shows them"
        return f"sandbox {box!r}: {refused}", ""

    def _tell(self, now: float) -> None:
        """Show what the daemon said, once it takes long enough to be of interest; never while a session is resumed."""
        if self._lost_at is None or self._answered:
            self._early.clear()
        while self._early and self._lost_at is not None and now - self._lost_at >= PATIENT:
            self.notice(self._early.popleft())

    def _lose(self, why: str, now: float) -> None:
        """The connection broke, or could not be made."""
        steady = self.up and now - self._up_at >= STEADY
        self.close()
        if self._lost_at is None:
            self._lost_at = now
        if not self._answered and now - self._lost_at > FIRST_TRIES:
            raise Failure(ErrorKind.UNAVAILABLE, why)
        self._later(now, steady)

    def _refused(self, exc: Failure, now: float) -> None:
        """The daemon (or its start) failed: raise it, unless a session is to be resumed and that may still work."""
        self.close()
        if self._answered and exc.kind in RETRIED:
            if self._lost_at is None:
                self._lost_at = now
            self._later(now, steady=False)
            return
        if self._answered and exc.kind in (ErrorKind.STOPPED, ErrorKind.NOT_FOUND):
            exc.message = f"the session has ended: {exc.message}"
        raise exc

    def _later(self, now: float, steady: bool) -> None:
        self._pause = 0.0 if steady else min(max(BACKOFF_FIRST, self._pause * 2), BACKOFF_MAX)
        self._retry_at = now + self._pause * random.uniform(0.75, 1.25)  # noqa: S311 - spread, not secrecy


def _answer(ok: object) -> Answer:
    """The daemon's word for what the guest answered. Raises Failure."""
    numbers = [ok.get(name) if isinstance(ok, dict) else None for name in ("status", "received", "base", "credit")]
    if all(isinstance(number, int) and 0 <= number < COUNT_MAX for number in numbers):
        return Answer(*numbers)  # type: ignore[arg-type]  # just checked
    raise Failure(ErrorKind.INTERNAL, "the daemon's answer makes no sense: it is no answer of a guest")


def _others(ok: object) -> list[int]:
    """Other guests, as `Channel` takes them. A daemon that knows of none need not say so."""
    told = ok.get("others") if isinstance(ok, dict) else None
    return [port for port in told if isinstance(port, int) and 0 < port < 65536] if isinstance(told, list) else []

"""The links of this daemon: one per sandbox, opened once under concurrent demand, shared by all, redialled on the next demand.

Nothing is redialled in the background: a dial may start a stopped sandbox, and only a user's wish may do that.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Hashable
from typing import TYPE_CHECKING

from gatewayd.api import ErrorKind
from gatewayd.errors import GatewayError, MuxClosed, ServiceRefused, StreamReset
from gatewayd.sandbox.accounts import Account
from gatewayd.sandbox.boxes import Directory, Notice, require_running
from gatewayd.sandbox.failures import TRANSIENT
from gatewayd.sandbox.link import Link, Target
from gatewayd.sandbox.rest_client import backoff
from gatewayd.tasks import SingleFlight, TaskOwner
from gatewayd.yamux.aio import MuxStream, SessionConfig

if TYPE_CHECKING:
    from gatewayd.api import LinkStatus

log = logging.getLogger(__name__)

IDLE_TIMEOUT = 120.0  # seconds without a stream after which a link is closed
FIRST_TRIES = 3  # dials for the first demand that fails; one for each demand after it, until one succeeds
BACKOFF_BASE = 0.25  # seconds
BACKOFF_MAX = 5.0  # a user who tries again waits no longer than this
RETRY_AFTER_MAX = 10.0  # of what a service asks for
SETTLE = 5.0  # seconds after a goodbye of the service in which "ready" may mean "about to stop"
SETTLE_POLL = 0.2  # seconds between questions in that time
CLOSED_NORMALLY = 1000  # WebSocket close code of a sandbox that stops; a service that reloads says 1001
FAILURE_MEMORY = 60.0  # seconds after which a failed sandbox starts afresh


class _Entry:
    """What is known about the link to one sandbox."""

    def __init__(self, account: Account, sandbox: str, owner: TaskOwner) -> None:
        self.account = account
        self.sandbox = sandbox
        self.link: Link | None = None  # the live one; None before it is up and after it is lost
        self.dialling: SingleFlight[Link] = SingleFlight(owner, f"dial {sandbox}")  # the dial that everybody waits for
        self.checking: SingleFlight[None] = SingleFlight(owner, f"check {sandbox}")  # the question for its status
        self.goodbye = -SETTLE  # monotonic time when the service closed a link in order, and not to reload
        self.noted: Link | None = None  # the link that `goodbye` is about
        self.dials = 0  # streams being opened: the link is not idle
        self.notices: set[Notice] = set()  # of the waiters
        self.failures = 0  # dials in a row that failed
        self.not_before = 0.0  # monotonic time before which no new dial begins
        self.used = time.monotonic()  # when a stream was last seen or asked for
        self.last_error = ""  # why the last dial failed or the last link was lost

    def notify(self, text: str) -> None:
        for notice in list(self.notices):
            notice(text)

    @property
    def unused(self) -> bool:
        return self.link is None and self.dials == 0


class Pool:
    """Streams to ports of sandboxes."""

    def __init__(
        self, directory: Directory, *, idle_timeout: float = IDLE_TIMEOUT, session_config: SessionConfig | None = None
    ) -> None:
        """`session_config`: of every link; None: the defaults."""
        self._directory = directory
        self._session_config = session_config
        self._idle_timeout = idle_timeout
        self._entries: dict[tuple[Hashable, str], _Entry] = {}
        self._tasks = TaskOwner("pool")
        self._sweeper: asyncio.Task[None] | None = None  # runs while there are entries
        self._closed = False  # set by aclose

    async def dial(
        self, account: Account, sandbox: str, port: int, notice: Notice | None = None, *, wake: bool = True
    ) -> MuxStream:
        """A stream connected to `port` inside `sandbox`.

        A link that breaks before the stream is connected is replaced once.

        Args:
            notice: is told what takes long.
            wake: whether a stopped sandbox is started by this.

        Raises:
            DialRefused: nothing listens on that port.
            GatewayError: anything else; kind stopped, when the sandbox does not run and is not to be started.
        """
        entry = self._entry(account, sandbox)
        entry.dials += 1
        try:
            link = await self._demand(entry, notice, wake)
            try:
                return await link.dial(port)
            except (MuxClosed, StreamReset) as exc:
                log.info("link %s broke while connecting to port %d: %s; dialling again", sandbox, port, exc.message)
                if isinstance(exc, MuxClosed) and not link.closed:  # it is dead and does not know it yet
                    self._drop(entry, link)
            return await (await self._demand(entry, notice, wake)).dial(port)
        finally:
            entry.dials -= 1
            entry.used = time.monotonic()

    async def warm(self, account: Account, sandbox: str, notice: Notice | None = None, *, wake: bool = True) -> None:
        """Make sure that the link is up: what would fail at the first connection fails now. Raises GatewayError, as `dial`."""
        entry = self._entry(account, sandbox)
        entry.dials += 1
        try:
            await self._demand(entry, notice, wake)
        finally:
            entry.dials -= 1
            entry.used = time.monotonic()

    async def check(self, account: Account, sandbox: str, *, linked: bool = False) -> None:
        """Make sure that the sandbox runs, and start nothing. Raises GatewayError, as `boxes.require_running`.

        `linked`: a link that looks alive is answer enough. It may be dead: not before a request that starts a sandbox.
        """
        entry = self._entry(account, sandbox)
        if not linked or entry.link is None or entry.link.closed:
            await self._check(entry)

    async def forget(self, account: Account, sandbox: str) -> None:
        """The sandbox was stopped, renamed or deleted: end its link and look it up again next time."""
        self._directory.forget(account, sandbox)
        entry = self._entries.get((account.key, sandbox))
        if entry is not None and entry.link is not None:
            await entry.link.aclose()

    def status(self) -> list[LinkStatus]:
        """Every link that is up, being dialled, or recently lost."""
        return [_status(entry) for entry in self._entries.values()]

    async def aclose(self) -> None:
        """End every link in order (GoAway first); idempotent."""
        self._closed = True
        await self._close_links()
        await self._tasks.aclose()
        await self._close_links()  # of dials that succeeded meanwhile
        self._entries.clear()

    async def _close_links(self) -> None:
        links = [entry.link for entry in self._entries.values() if entry.link is not None]
        await asyncio.gather(*(link.aclose() for link in links))

    # --- demand -------------------------------------------------------------------------------------------------------

    def _entry(self, account: Account, sandbox: str) -> _Entry:
        if self._closed:
            raise _stopping()
        key = (account.key, sandbox)
        entry = self._entries.get(key)
        if entry is None:
            entry = self._entries[key] = _Entry(account, sandbox, self._tasks)
            if self._sweeper is None or self._sweeper.done():
                self._sweeper = self._tasks.start(self._sweep(), "sweep")
        return entry

    async def _demand(self, entry: _Entry, notice: Notice | None, wake: bool) -> Link:
        """The live link; dials if there is none, together with everybody else who wants it."""
        if entry.link is not None and not entry.link.closed:
            return entry.link
        if not wake:
            await self._check(entry)
            if entry.link is not None and not entry.link.closed:  # somebody was faster
                return entry.link
        if notice is not None:
            entry.notices.add(notice)
        try:
            return await entry.dialling.join(lambda: self._connect(entry))
        except RuntimeError as exc:
            raise _stopping() from exc
        finally:
            if notice is not None:
                entry.notices.discard(notice)

    async def _check(self, entry: _Entry) -> None:
        """Ask once for everybody who wants to know."""
        try:
            await entry.checking.join(lambda: self._require_running(entry))
        except RuntimeError as exc:
            raise _stopping() from exc

    async def _require_running(self, entry: _Entry) -> None:
        """A service that said goodbye is most likely stopping the sandbox, and tells its status when that is done."""
        if entry.link is not None:
            self._note_goodbye(entry, entry.link)
        while True:
            await require_running(entry.account.rest, entry.sandbox)
            left = entry.goodbye + SETTLE - time.monotonic()
            if left <= 0:
                return
            await asyncio.sleep(min(SETTLE_POLL, left))

    def _note_goodbye(self, entry: _Entry, link: Link) -> None:
        if link.closed and link.close_code == CLOSED_NORMALLY and link is not entry.noted:
            entry.noted, entry.goodbye = link, time.monotonic()

    async def _connect(self, entry: _Entry) -> Link:
        """Dial, a few times if that may help."""
        tries = FIRST_TRIES if entry.failures == 0 else 1
        moved = False  # whether a remembered address has failed us already
        while True:
            if (delay := entry.not_before - time.monotonic()) > 0:
                await asyncio.sleep(delay)
            try:
                place, remembered = await self._directory.locate(entry.account, entry.sandbox, entry.notify)
                what = f"open the tunnel to sandbox {entry.sandbox!r}"
                target = Target(place.websocket("/tunnel"), place.profile, entry.sandbox, what, entry.account.proxies)
            except GatewayError as exc:  # has had its own retries
                entry.last_error = exc.message
                raise
            try:
                link = await Link.open(target, self._session_config)
            except GatewayError as exc:
                self._directory.forget(entry.account, entry.sandbox)
                if remembered and not moved:  # look it up and try again at once
                    moved = True
                    continue
                error = _failed(entry, exc)
                tries -= 1
                if tries <= 0 or not _transient(exc):
                    raise error from exc
                log.info("%s; trying again", exc.message)
                entry.notify(f"{exc.message}; trying again")
            else:
                self._up(entry, link)
                return link

    def _up(self, entry: _Entry, link: Link) -> None:
        entry.link = link
        entry.failures, entry.not_before = 0, 0.0
        entry.last_error = ""
        entry.used = time.monotonic()
        log.info("link %s (profile %s) is up", entry.sandbox, entry.account.name)
        self._tasks.start(self._watch(entry, link), f"watch {entry.sandbox}")

    def _drop(self, entry: _Entry, link: Link) -> None:
        """Use the link no more; `_watch` takes note of its end."""
        if entry.link is link:
            entry.link = None
            self._tasks.start(link.aclose(), f"drop {entry.sandbox}")

    async def _watch(self, entry: _Entry, link: Link) -> None:
        """Takes note when the link has ended."""
        await link.wait_closed()
        if entry.link is link:
            self._note_goodbye(entry, link)
            entry.link = None
        error = link.mux.error
        entry.last_error = getattr(error, "message", "") or ("" if error is None else type(error).__name__)
        seconds = time.time() - link.connected_at
        log.info(
            "link %s is down after %.0f s, %d bytes in, %d bytes out%s",
            *(entry.sandbox, seconds, link.mux.bytes_in, link.mux.bytes_out),
            f": {entry.last_error}" if entry.last_error else "",
        )
        await link.aclose()

    # --- idle links ---------------------------------------------------------------------------------------------------

    async def _sweep(self) -> None:
        """Close idle links and drop what is forgotten; ends with the last entry."""
        while self._entries:
            await asyncio.sleep(self._idle_timeout / 4)
            now = time.monotonic()
            for key, entry in list(self._entries.items()):
                if entry.link is not None and (entry.link.streams or entry.dials):
                    entry.used = now
                elif entry.link is not None and now - entry.used >= self._idle_timeout:
                    log.info("link %s is idle", entry.sandbox)
                    await entry.link.aclose()
                elif entry.unused and now - max(entry.used, entry.not_before) >= min(FAILURE_MEMORY, self._idle_timeout):
                    del self._entries[key]


def _failed(entry: _Entry, exc: GatewayError) -> GatewayError:
    """Note a failed dial and when the next one may begin; the error to tell."""
    wanted = exc.retry_after if isinstance(exc, ServiceRefused) and exc.retry_after is not None else 0.0
    delay = max(backoff(entry.failures, BACKOFF_BASE, BACKOFF_MAX), min(wanted, RETRY_AFTER_MAX))
    entry.failures += 1
    entry.not_before = time.monotonic() + delay
    entry.last_error = exc.message
    if isinstance(exc, ServiceRefused) and exc.status == 404:  # the sandbox was found a moment ago
        return GatewayError(
            f"cannot open the tunnel to sandbox {entry.sandbox!r}: its data plane has none (HTTP 404)",
            kind=ErrorKind.UNSUPPORTED,
            hint="the service may be too old for tunnels",
        )
    return exc


def _stopping() -> GatewayError:
    return GatewayError("the daemon is stopping", kind=ErrorKind.UNAVAILABLE)


def _transient(exc: GatewayError) -> bool:
    if isinstance(exc, ServiceRefused):
        return exc.status in TRANSIENT
    return exc.kind == ErrorKind.UNAVAILABLE


def _status(entry: _Entry) -> LinkStatus:
    link = entry.link
    up = link is not None and not link.closed
    mux = link.mux if link is not None else None
    return {
        "sandbox": entry.sandbox,
        "profile": entry.account.name,
        "state": "up" if up else "connecting" if entry.dialling.running else "down",
        "streams": mux.streams if mux is not None else 0,
        "rtt_ms": round(mux.rtt * 1000, 3) if mux is not None and mux.rtt is not None else None,
        "bytes_in": mux.bytes_in if mux is not None else 0,
        "bytes_out": mux.bytes_out if mux is not None else 0,
        "connected_at": link.connected_at if link is not None and up else None,
        "last_error": entry.last_error,
    }

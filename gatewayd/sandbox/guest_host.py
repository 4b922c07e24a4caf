"""The guest of one sandbox: where it listens, booted once for everybody who wants it, and connections to it.

Beside it there may be guests of other versions, in which sessions live on that an earlier gateway has opened.
"""

from __future__ import annotations

import asyncio
import logging
import time

from gatewayd.api import ErrorKind
from gatewayd.errors import DialRefused, GatewayError, MuxClosed, StreamReset
from gatewayd.guest import wire
from gatewayd.guest.session import ClientSession
from gatewayd.guest.wire import Answer, Mode, Status
from gatewayd.sandbox.accounts import Account
from gatewayd.sandbox.boxes import Directory, Notice
from gatewayd.sandbox.guest_boot import GuestAddress, boot
from gatewayd.sandbox.pool import Pool
from gatewayd.tasks import SingleFlight, TaskOwner
from gatewayd.yamux.aio import MuxStream

log = logging.getLogger(__name__)

ANSWER_TIMEOUT = 20.0  # seconds for the guest's answer to a preface
OTHERS_MEMORY = 5.0  # seconds in which it is not asked again which other guests there are
UNSUPPORTED_MEMORY = 10.0  # seconds in which an image without Python is not asked again


class GuestHost:
    """One sandbox, as far as its guest is concerned."""

    def __init__(self, account: Account, sandbox: str, directory: Directory, pool: Pool, owner: TaskOwner) -> None:
        self.account = account
        self.sandbox = sandbox
        self.used = time.monotonic()  # when somebody last asked for it
        self._directory = directory
        self._pool = pool
        self._address: GuestAddress | None = None  # as of the last boot; may be out of date
        self._others: list[GuestAddress] = []  # guests of other versions, as of the last boot; may be out of date
        self._booted_at = 0.0  # monotonic time of the last boot
        self._booting: SingleFlight[GuestAddress] = SingleFlight(owner, f"boot {sandbox}")
        self._notices: set[Notice] = set()  # of those who wait for the boot
        self._unsupported: GatewayError | None = None  # why there is no guest in this image
        self._unsupported_at = 0.0  # monotonic time of that

    @property
    def carrier(self) -> str:
        """What carries its sessions: "guest", "text", or "" while that is not known."""
        if self._address is not None:
            return "guest"
        return "text" if self._unsupported is not None else ""

    @property
    def others(self) -> list[int]:
        """The ports of the guests of other versions."""
        return [address.port for address in self._others]

    async def address(self, notice: Notice | None = None, *, wake: bool = True) -> GuestAddress:
        """Where the guest listens; it is started when that is not known. Raises GatewayError."""
        self.used = time.monotonic()
        if self._address is not None:
            return self._address
        if self._unsupported is not None and time.monotonic() - self._unsupported_at < UNSUPPORTED_MEMORY:
            error = self._unsupported
            raise GatewayError(error.message, kind=error.kind, hint=error.hint)
        if not wake:
            await self._pool.check(self.account, self.sandbox)
        if notice is not None:
            self._notices.add(notice)
        try:
            return await self._booting.join(self._boot)
        except RuntimeError as exc:
            raise GatewayError("the daemon is stopping", kind=ErrorKind.UNAVAILABLE) from exc
        finally:
            if notice is not None:
                self._notices.discard(notice)

    async def connect(
        self, session_id: bytes, mode: int, received: int, notice: Notice | None = None, *, wake: bool = True, port: int = 0
    ) -> tuple[MuxStream, Answer]:
        """A connection on which the preface and its answer have been exchanged; what follows are frames.

        A guest that is not where it was is started again, once. A session that it does not know is looked for in the others.

        Args:
            port: one of `others`, to ask that guest alone.

        Raises:
            GatewayError: kind unavailable or timeout when trying again may help; not_found when nobody is on that port.
        """
        self.used = time.monotonic()
        if port:
            found = await self._connect_other({port}, session_id, mode, received, notice, wake)
            if found is None:
                raise GatewayError(f"sandbox {self.sandbox!r} has no other guest on port {port}", kind=ErrorKind.NOT_FOUND)
            return found
        stream, answer = await self._connect_own(session_id, mode, received, notice, wake)
        if answer.status == Status.NO_SESSION and mode != Mode.OPEN:
            found = await self._look_elsewhere(session_id, mode, received, notice, wake)
            if found is not None:
                stream.abort()
                return found
        return stream, answer

    async def _look_elsewhere(
        self, session_id: bytes, mode: int, received: int, notice: Notice | None, wake: bool
    ) -> tuple[MuxStream, Answer] | None:
        """A connection to a session of a guest of another version, None when no guest knows it. Raises GatewayError."""
        asked = set(self.others)
        found = await self._connect_other(asked, session_id, mode, received, notice, wake)
        if found is None and time.monotonic() - self._booted_at > OTHERS_MEMORY:
            self._address = None
            await self.address(notice, wake=wake)
            found = await self._connect_other(set(self.others) - asked, session_id, mode, received, notice, wake)
        return found

    async def _connect_other(
        self, ports: set[int], session_id: bytes, mode: int, received: int, notice: Notice | None, wake: bool
    ) -> tuple[MuxStream, Answer] | None:
        """As `connect`, by the first guest of another version on one of `ports` that knows the session (or opens it)."""
        for address in [each for each in self._others if each.port in ports]:
            try:
                stream, answer = await self._connect(address, session_id, mode, received, notice, wake)
            except _NotTheGuest as exc:
                log.info("the other guest of %s on port %d has ended: %s", self.sandbox, address.port, exc)
                self._others = [each for each in self._others if each is not address]
                continue
            if answer.status != Status.NO_SESSION:
                return stream, answer
            stream.abort()
        return None

    async def _connect_own(
        self, session_id: bytes, mode: int, received: int, notice: Notice | None, wake: bool
    ) -> tuple[MuxStream, Answer]:
        """As `connect`, by the guest of this gateway's own version."""
        fresh = self._address is None
        address = await self.address(notice, wake=wake)
        for last in (fresh, True):
            try:
                return await self._connect(address, session_id, mode, received, notice, wake)
            except _NotTheGuest as exc:
                if self._address is address:
                    self._address = None
                if last:
                    raise GatewayError(
                        f"cannot reach the guest in sandbox {self.sandbox!r}: {exc}", kind=ErrorKind.UNAVAILABLE
                    ) from exc
                log.info("guest of %s is not on port %d any more: %s", self.sandbox, address.port, exc)
                address = await self.address(notice, wake=wake)
        raise AssertionError("the loop above returns or raises")

    async def resume(self, core: ClientSession, notice: Notice | None = None, *, wake: bool = False, port: int = 0) -> MuxStream:
        """Connect a session, anew or for the first time; `port` as in `connect`.

        Raises:
            GuestRefused, GuestProtocolError: as `ClientSession.connected`.
            GatewayError: as `connect`.
        """
        stream, answer = await self.connect(core.id, core.mode, core.received, notice, wake=wake, port=port)
        try:
            core.connected(answer)
        except BaseException:
            stream.abort()
            raise
        return stream

    async def _boot(self) -> GuestAddress:
        def tell(text: str) -> None:
            for notice in list(self._notices):
                notice(text)

        try:
            address = await boot(self.account, self._directory, self.sandbox, tell)
        except GatewayError as exc:
            if exc.kind == ErrorKind.UNSUPPORTED:
                self._unsupported, self._unsupported_at = exc, time.monotonic()
            raise
        log.info("guest of %s listens on port %d (pid %d)", self.sandbox, address.port, address.pid)
        self._address, self._others, self._unsupported = address, list(address.others), None
        self._booted_at = time.monotonic()
        return address

    async def _connect(
        self, address: GuestAddress, session_id: bytes, mode: int, received: int, notice: Notice | None, wake: bool
    ) -> tuple[MuxStream, Answer]:
        preface = wire.encode_preface(address.token, session_id, mode, received)
        try:
            stream = await self._pool.dial(self.account, self.sandbox, address.port, notice, wake=wake)
        except DialRefused as exc:
            raise _NotTheGuest("nothing listens there") from exc
        done = False
        try:
            async with asyncio.timeout(ANSWER_TIMEOUT):
                await stream.write(preface)
                answer = b""
                while len(answer) < wire.ANSWER_SIZE:
                    piece = await stream.read(wire.ANSWER_SIZE - len(answer))
                    if not piece:
                        raise _NotTheGuest("it hangs up")
                    answer += piece
            decoded = wire.decode_answer(answer)
            done = True
            return stream, decoded
        except (StreamReset, ValueError) as exc:  # something else listens there, or the guest has just ended
            raise _NotTheGuest(str(exc)) from exc
        except TimeoutError as exc:
            raise GatewayError(
                f"the guest in sandbox {self.sandbox!r} does not answer within {ANSWER_TIMEOUT:.0f} s", kind=ErrorKind.TIMEOUT
            ) from exc
        except MuxClosed as exc:
            raise GatewayError(
                f"the connection to sandbox {self.sandbox!r} was lost: {exc.message}", kind=ErrorKind.UNAVAILABLE
            ) from exc
        finally:
            if not done:
                stream.abort()


class _NotTheGuest(Exception):
    """What listens on that port does not know the token, or nothing does."""

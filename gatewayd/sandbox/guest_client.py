"""The guests of this daemon: programs, connections, listeners and files inside sandboxes, over connections that may break.

Frontends ask here; `guest_host` finds and starts the guest of a sandbox, `guest_session` carries one session.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Hashable
from dataclasses import dataclass

from gatewayd.api import ErrorKind
from gatewayd.errors import GatewayError, printable
from gatewayd.guest import wire
from gatewayd.guest.events import Item
from gatewayd.guest.session import ClientSession
from gatewayd.guest.wire import Answer, GuestProtocolError
from gatewayd.relay import ByteStream
from gatewayd.sandbox.accounts import Account
from gatewayd.sandbox.boxes import Directory, Notice
from gatewayd.sandbox.guest_host import GuestHost
from gatewayd.sandbox.guest_session import GuestSession
from gatewayd.sandbox.guest_streams import GuestListener, GuestStream, OnStream
from gatewayd.sandbox.pool import Pool
from gatewayd.sandbox.session import ABSENCE, STDERR, STDOUT, ProcessSpec, Session
from gatewayd.tasks import TaskOwner

__all__ = ["GuestItem", "GuestListener", "GuestStream", "Guests", "OnStream"]

HOSTS_MAX = 1024  # sandboxes whose guest's address is remembered; the longest unused one goes first
ITEMS_MAX = 1024  # sessions of one list
LIST_TIMEOUT = 30.0  # seconds for a list


@dataclass(frozen=True)
class GuestItem:
    """One session of a guest, as it tells it."""

    id: str  # 32 hexadecimal digits
    kind: str  # process, sftp, tcp, …
    name: str  # label, or ""
    command: str  # one line
    pid: int
    pty: bool
    attached: bool  # somebody is connected to it
    started: int  # Unix time
    code: int | None  # once it has exited
    signal: str  # that ended it, or ""


class Guests:
    """Sessions in sandboxes. Sandboxes are started by what is asked for here, unless `wake` is False."""

    def __init__(self, directory: Directory, pool: Pool) -> None:
        self._directory = directory
        self._pool = pool
        self._hosts: dict[tuple[Hashable, str], GuestHost] = {}  # the longest unused one first
        self._tasks = TaskOwner("guests")
        self._sessions: set[GuestSession] = set()  # that were not closed
        self._closed = False  # set by aclose

    async def ready(self, account: Account, sandbox: str, notice: Notice | None = None, *, wake: bool = True) -> None:
        """Find the guest, upload and start it if need be.

        Raises:
            GatewayError: kind unsupported when the image has no Python 3.6 or newer.
        """
        if not wake:
            await self._pool.check(account, sandbox, linked=True)
        await self._host(account, sandbox).address(notice, wake=wake)

    async def process(
        self, account: Account, sandbox: str, spec: ProcessSpec, notice: Notice | None = None, *, wake: bool = True
    ) -> Session:
        """Run a program. Raises GatewayError."""
        fields = _process_fields(spec)
        streams = (STDOUT,) if spec.pty else (STDOUT, STDERR)
        session = self._new(account, sandbox, fields, "run a command", streams, linger=spec.linger)
        return await self._started(session, notice, wake=wake)

    async def sftp(
        self, account: Account, sandbox: str, user: str = "", notice: Notice | None = None, *, wake: bool = True
    ) -> Session:
        """An SFTP server, version 3: what is written are its requests, what is read its answers. Raises GatewayError."""
        fields = [("kind", b"sftp"), ("user", _bytes(user)), _absence()]
        session = self._new(account, sandbox, fields, "serve SFTP", (STDOUT,), linger=ABSENCE)
        return await self._started(session, notice, wake=wake)

    async def connect_tcp(
        self, account: Account, sandbox: str, host: str, port: int, notice: Notice | None = None, *, wake: bool = True
    ) -> ByteStream:
        """A connection made inside the sandbox. Raises DialRefused, GatewayError."""
        fields = [("kind", b"tcp"), ("host", _bytes(host)), ("port", str(port).encode())]
        return await self._stream(account, sandbox, fields, f"connect to {host}:{port}", notice, wake=wake)

    async def connect_unix(
        self, account: Account, sandbox: str, path: str, user: str = "", notice: Notice | None = None, *, wake: bool = True
    ) -> ByteStream:
        """A connection to a Unix socket inside the sandbox, with the rights of `user`. Raises DialRefused, GatewayError."""
        fields = [("kind", b"unix"), ("path", _bytes(path)), ("user", _bytes(user))]
        return await self._stream(account, sandbox, fields, f"connect to {path!r}", notice, wake=wake)

    async def listen_tcp(
        self, account: Account, sandbox: str, host: str, port: int, user: str, on_stream: OnStream, *, wake: bool = True
    ) -> GuestListener:
        """Listen inside the sandbox, on any free port for 0; `on_stream` is run for every connection.

        Ports below 1024 are for a `user` who is root. Raises GatewayError.
        """
        fields = [("kind", b"listen-tcp"), ("host", _bytes(host)), ("port", str(port).encode()), ("user", _bytes(user))]
        return await self._listen(account, sandbox, fields, f"listen on {host}:{port}", on_stream, wake=wake)

    async def listen_unix(
        self, account: Account, sandbox: str, path: str, user: str, on_stream: OnStream, *, wake: bool = True
    ) -> GuestListener:
        """Likewise on a Unix socket of `user`'s; path "": a new one in a folder of its own. Raises GatewayError."""
        fields = [("kind", b"listen-unix"), ("path", _bytes(path)), ("user", _bytes(user))]
        return await self._listen(account, sandbox, fields, f"listen on {path or 'a Unix socket'}", on_stream, wake=wake)

    async def sessions(self, account: Account, sandbox: str, *, wake: bool = True) -> list[GuestItem]:
        """What the guest carries at the moment, and guests of other versions do. Raises GatewayError."""
        found = await self._list(account, sandbox, 0, wake=wake)
        for port in self._host(account, sandbox).others:
            try:
                found += await self._list(account, sandbox, port, wake=False)
            except GatewayError as exc:  # that guest has just ended
                if exc.kind != ErrorKind.NOT_FOUND:
                    raise
        return found

    async def _list(self, account: Account, sandbox: str, port: int, *, wake: bool) -> list[GuestItem]:
        """The sessions of one guest; `port` as in `GuestHost.connect`."""
        session = self._new(account, sandbox, [("kind", b"list")], "list sessions", (), port=port)
        items: list[dict[str, bytes]] = []

        def add(item: Item) -> None:
            if len(items) < ITEMS_MAX:
                items.append(item.fields)

        session.on_item = add
        try:
            async with asyncio.timeout(LIST_TIMEOUT):
                await session.start(wake=wake)
                await session.wait()
            return [_item(fields) for fields in items]
        except TimeoutError as exc:
            raise GatewayError(f"cannot list sessions in sandbox {sandbox!r}: no answer", kind=ErrorKind.TIMEOUT) from exc
        except GuestProtocolError as exc:
            raise GatewayError(f"the guest in sandbox {sandbox!r} does not keep to its protocol: {exc}") from exc
        finally:
            await session.aclose()

    async def connect(
        self,
        account: Account,
        sandbox: str,
        *,
        session_id: bytes,
        mode: int,
        received: int,
        wake: bool,
        notice: Notice | None = None,
        port: int = 0,
    ) -> tuple[ByteStream, Answer]:
        """A connection behind preface and answer, for a client that keeps the session's numbers itself.

        `port`: one of `others`, to ask that guest alone. Raises GatewayError.
        """
        return await self._host(account, sandbox).connect(session_id, mode, received, notice, wake=wake, port=port)

    def others(self, account: Account, sandbox: str) -> list[int]:
        """Ports of guests of other versions there, as far as that is known."""
        host = self._hosts.get((account.key, sandbox))
        return host.others if host is not None else []

    def carrier(self, account: Account, sandbox: str) -> str:
        """What carries sessions there: "guest", "text" (an image without Python), or "" while that is not known."""
        host = self._hosts.get((account.key, sandbox))
        return host.carrier if host is not None else ""

    async def aclose(self) -> None:
        """End every session, telling the guests so; idempotent."""
        self._closed = True
        await asyncio.gather(*(session.settle() for session in list(self._sessions)))
        await self._tasks.aclose()

    # -- inside -------------------------------------------------------------------------------------------------------

    def _host(self, account: Account, sandbox: str) -> GuestHost:
        if self._closed:
            raise GatewayError("the daemon is stopping", kind=ErrorKind.UNAVAILABLE)
        key = (account.key, sandbox)
        host = self._hosts.pop(key, None) or GuestHost(account, sandbox, self._directory, self._pool, self._tasks)
        self._hosts[key] = host
        if len(self._hosts) > HOSTS_MAX:
            self._hosts.pop(next(iter(self._hosts)))
        host.used = time.monotonic()
        return host

    def _new(
        self,
        account: Account,
        sandbox: str,
        fields: list[tuple[str, bytes]],
        what: str,
        streams: tuple[int, ...],
        linger: int = wire.LINGER,
        port: int = 0,
    ) -> GuestSession:
        host, core = self._host(account, sandbox), _core(fields, what)
        what = f"{what} in sandbox {sandbox!r}"
        session = GuestSession(host, core, self._tasks, what=what, streams=streams, linger=linger, port=port)
        return self._kept(session)

    def _kept(self, session: GuestSession) -> GuestSession:
        self._sessions.add(session)
        session.on_over = lambda: self._sessions.discard(session)
        return session

    async def _started(self, session: GuestSession, notice: Notice | None, *, wake: bool) -> GuestSession:
        await session.start(notice, wake=wake)
        return session

    async def _stream(
        self,
        account: Account,
        sandbox: str,
        fields: list[tuple[str, bytes]],
        what: str,
        notice: Notice | None,
        *,
        wake: bool,
    ) -> GuestStream:
        what = f"{what} in sandbox {sandbox!r}"
        stream = GuestStream(self._host(account, sandbox), _core([*fields, _absence()], what), self._tasks, what)
        self._kept(stream)
        await stream.start(notice, wake=wake)
        return stream

    async def _listen(
        self, account: Account, sandbox: str, fields: list[tuple[str, bytes]], what: str, on_stream: OnStream, *, wake: bool
    ) -> GuestListener:
        session = self._new(account, sandbox, [*fields, _absence()], what, (), linger=ABSENCE)
        listener = GuestListener(self._host(account, sandbox), session, self._tasks, on_stream)
        await listener.start(wake=wake)
        return listener


def _core(fields: list[tuple[str, bytes]], what: str) -> ClientSession:
    core = ClientSession()
    try:
        core.open(fields)
    except ValueError as exc:
        raise GatewayError(f"cannot {what}: its arguments are longer than 256 KiB", kind=ErrorKind.USAGE) from exc
    return core


def _absence() -> tuple[str, bytes]:
    """The field that has the guest wait as long as this side does."""
    return "linger", str(ABSENCE).encode()


def _process_fields(spec: ProcessSpec) -> list[tuple[str, bytes]]:
    fields = [("kind", b"process"), *(("arg", _bytes(arg)) for arg in spec.argv)]
    if spec.command and not spec.argv:
        fields.append(("command", _bytes(spec.command)))
    fields += (("env", _bytes(f"{name}={value}")) for name, value in spec.env.items())
    texts = {"cwd": spec.cwd, "user": spec.user, "name": spec.name, "overflow": spec.overflow, "linger": str(spec.linger)}
    if spec.pty:
        sizes = {"cols": spec.cols, "rows": spec.rows, "xpixel": spec.xpixel, "ypixel": spec.ypixel}
        texts |= {"pty": "1", "term": spec.term} | {name: str(size) for name, size in sizes.items() if size}
    fields += ((name, _bytes(text)) for name, text in texts.items() if text)
    if spec.pty and spec.modes:
        fields.append(("modes", spec.modes))
    return fields


def _bytes(text: str) -> bytes:
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError as exc:
        raise GatewayError(f"{printable(text, 80)!r} cannot be encoded", kind=ErrorKind.USAGE) from exc


def _item(fields: dict[str, bytes]) -> GuestItem:
    """Raises GuestProtocolError."""

    def text(key: str, limit: int = 200) -> str:
        return wire.text(fields.get(key, b""), limit)

    session = fields.get("id", b"").decode("ascii", "replace")
    if len(session) != 2 * wire.ID_SIZE or not set(session) <= set("0123456789abcdef"):
        raise GuestProtocolError("a session without an id")
    return GuestItem(
        id=session,
        kind=text("kind", 20),
        name=text("name"),
        command=text("command", 500),
        pid=wire.number(fields.get("pid", b"0"), 1 << 32),
        pty=fields.get("pty") == b"1",
        attached=fields.get("attached") == b"1",
        started=wire.number(fields.get("started", b"0"), 1 << 40),
        code=wire.number(fields["code"], 255) if "code" in fields else None,
        signal=text("signal", 16),
    )

"""What the commands ask a guest for: a process's OPEN, a list of sessions."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Sequence
from typing import Any

from client import guestchannel
from client.control import Control
from client.guestchannel import Channel
from client.proxy import Failure
from client.terminal import SIZE_DEFAULT, Terminal, environment
from gatewayd.api import ErrorKind
from gatewayd.guest import wire
from gatewayd.guest.events import Exit, Failed, Item
from gatewayd.guest.session import ClientSession
from gatewayd.guest.wire import GuestProtocolError

PTY_WINDOW = 262144  # bytes of output of a terminal on their way: ^C should not be followed by megabytes
PLAIN_WINDOW = 4 << 20  # bytes of output of another process: enough for 40 MB/s at 100 ms
ITEMS_MAX = 4096  # sessions in a list
LIST_LINGER = 10  # seconds

# Kinds of failure after which the service's own protocol may still do: no Python in the image, or a daemon of an earlier version.
NO_GUEST = (ErrorKind.UNSUPPORTED, ErrorKind.USAGE)

EXEC_LINGER = 3600  # seconds without a connection, of a command that is attended
CONSOLE_LINGER = 86400
DETACHED_LINGER = wire.LINGER_MAX


def process(
    *,
    argv: Sequence[str] = (),
    env: Iterable[tuple[str, str]] = (),
    cwd: str | None = None,
    user: str | None = None,
    linger: int = EXEC_LINGER,
    drop: bool = False,
    pty: bool = False,
    terminal: Terminal | None = None,
) -> ClientSession:
    """A session that will run `argv`, or a login shell without one.

    Args:
        drop: whether output that nobody takes is dropped, the oldest first, instead of making the process wait.
        pty: whether it gets a terminal, of the size and the modes of `terminal`.

    Raises:
        Failure: ``usage``, when it is more than a request can hold.
    """
    fields: list[tuple[str, bytes]] = [("kind", b"process"), ("linger", b"%d" % linger)]
    fields += [("arg", os.fsencode(word)) for word in argv]
    if pty:
        size = terminal.size() if terminal is not None else SIZE_DEFAULT
        fields += [("pty", b"1"), ("term", os.environ.get("TERM", "dumb").encode("utf-8", "replace"))]
        fields += [(key, b"%d" % value) for key, value in zip(("cols", "rows", "xpixel", "ypixel"), size, strict=True)]
        if terminal is not None and (modes := terminal.modes()):
            fields.append(("modes", modes))
        env = [*environment(), *env]
    fields += [("env", os.fsencode(f"{key}={value}")) for key, value in env]
    fields += [(key, os.fsencode(value)) for key, value in (("cwd", cwd), ("user", user)) if value]
    if drop:
        fields.append(("overflow", b"drop"))
    session = ClientSession(window=PTY_WINDOW if pty else PLAIN_WINDOW)
    try:
        session.open(fields)
    except ValueError:
        raise Failure(ErrorKind.USAGE, f"the command and its environment are longer than {wire.PAYLOAD_MAX} bytes") from None
    return session


def sessions(control: Control, sandbox: str) -> list[dict[str, Any]]:
    """The processes that a sandbox's guests keep, the oldest first. Never starts the sandbox.

    All of it has `EVENTS_PATIENCE`.

    Raises:
        Failure: ``stopped`` for a sandbox that does not run; ``timeout``; others as the daemon tells them.
    """
    end = time.monotonic() + guestchannel.EVENTS_PATIENCE
    found, others = _listed(control, sandbox, 0, end)
    for guest in others:
        try:
            found += _listed(control, sandbox, guest, end)[0]
        except Failure as exc:  # that guest has just ended
            if exc.kind != ErrorKind.NOT_FOUND:
                raise
    return sorted(found, key=lambda item: item["started"] or 0.0)


def _listed(control: Control, sandbox: str, guest: int, end: float) -> tuple[list[dict[str, Any]], list[int]]:
    """The processes of one guest, and which other guests there are. Raises Failure.

    Args:
        guest: as of `Channel`.
        end: as of `Channel.events`.
    """
    session = ClientSession()
    session.open([("kind", b"list"), ("linger", b"%d" % LIST_LINGER)])
    channel = Channel(control, sandbox, session, wake=False, linger=LIST_LINGER, guest=guest)
    found: list[dict[str, Any]] = []
    count = 0  # items so far, whatever they are
    try:
        for event in channel.events(end):
            if isinstance(event, Item):
                count += 1
                if count > ITEMS_MAX:
                    raise Failure(ErrorKind.INTERNAL, f"the guest lists more than {ITEMS_MAX} sessions")
                item = _item(event.fields)
                if item["kind"] == "process":
                    found.append(item)
            elif isinstance(event, Failed):
                raise Failure(ErrorKind.FAILED, f"cannot list the sessions: {event.message}")
            elif isinstance(event, Exit):
                session.close()
                channel.flush(1.0)
                break
    finally:
        channel.close()
    return found, channel.others


def _item(fields: dict[str, bytes]) -> dict[str, Any]:
    """One session as the commands show it; what a sandbox says is not trusted.

    Raises:
        Failure: the guest makes no sense.
    """
    try:
        number = wire.text(fields.get("id", b""), 32)
        if len(bytes.fromhex(number)) != wire.ID_SIZE:
            raise GuestProtocolError("a session without an id")
        signal = wire.text(fields.get("signal", b""), 16)
        return {
            "id": number,
            "kind": wire.text(fields.get("kind", b""), 20),
            "name": wire.text(fields.get("name", b""), 200),
            "pid": wire.number(fields["pid"], 1 << 32) if fields.get("pid") else None,
            "command": wire.text(fields.get("command", b""), 2000),
            "pty": fields.get("pty") == b"1",
            "attached": fields.get("attached") == b"1",
            "started": _time(fields.get("started", b"")),
            "code": wire.number(fields["code"], 255) if fields.get("code") else None,
            "signal": signal or None,
        }
    except ValueError as exc:
        raise Failure(ErrorKind.INTERNAL, f"the guest's list makes no sense: {exc}") from exc


def _time(value: bytes) -> float | None:
    whole = value.partition(b".")[0]
    return float(wire.number(whole, 1 << 40)) if whole else None

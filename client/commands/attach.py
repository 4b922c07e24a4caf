"""attach: go on with a session of exec or console."""

from __future__ import annotations

from typing import Any

import click

from client import execute, guestprocess
from client.attend import Attendance
from client.cli import Command, Settings, pass_settings
from client.guestchannel import Channel
from client.params import Name
from client.proxy import Failure
from client.terminal import Terminal
from gatewayd.api import ErrorKind
from gatewayd.guest.events import Exit
from gatewayd.guest.session import ClientSession


@click.command("attach", cls=Command, examples=("sandbox attach demo", "sandbox attach demo 3fa9"))
@click.argument("name", type=Name())
@click.argument("session", required=False, metavar="[SESSION]")
@pass_settings
def attach_command(settings: Settings, name: str, session: str | None) -> int:
    """Go on with a session of `sandbox ps`: its id or the beginning of it; without one, the only session there is.

    Whoever has it now is told and loses it. SIGHUP and SIGTERM end this command only, as ~d does on a terminal.
    """
    control = settings.control()
    with control.naming(name):
        item = _choose(guestprocess.sessions(control, name), name, session)
        guest = ClientSession.attach(bytes.fromhex(item["id"]))
        channel = Channel(control, name, guest, wake=False, linger=guestprocess.DETACHED_LINGER)
        ended = None
        if item["signal"] or item["code"] is not None:
            ended = Exit(None if item["signal"] else item["code"], item["signal"] or "", False)
        terminal = Terminal.found(0, 1) if item["pty"] else None
        stdin = 0 if execute.has_input() and ended is None else None
        if item["pty"] and stdin is not None and terminal is not None:
            guest.resize(*terminal.size())
            guest.signal("WINCH")  # even if the size is the same: programs paint their screens anew
        return Attendance(channel, stdin=stdin, pty=item["pty"], terminal=terminal, owner=False, ended=ended).run()


def _choose(found: list[dict[str, Any]], name: str, wanted: str | None) -> dict[str, Any]:
    """The session meant.

    Raises:
        Failure: there is none, or more than one.
    """
    hint = f"`sandbox ps {name}` shows them"
    if wanted is not None:
        fits = [item for item in found if wanted and item["id"].startswith(wanted.lower())]
        if not fits:
            raise Failure(ErrorKind.NOT_FOUND, f"sandbox {name!r} has no session {wanted[:32]!r}", hint)
    else:
        fits = [item for item in found if item["code"] is None and not item["signal"]] or found
        fits = [item for item in fits if not item["attached"]] or fits
        if not fits:
            raise Failure(ErrorKind.NOT_FOUND, f"sandbox {name!r} has no sessions", "`sandbox exec --detach` starts one")
    if len(fits) > 1:
        raise Failure(ErrorKind.USAGE, f"sandbox {name!r} has {len(fits)} sessions that this may mean", hint)
    return fits[0]

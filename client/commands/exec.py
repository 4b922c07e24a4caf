"""exec."""

from __future__ import annotations

import shlex
from typing import Any

import click

from client import execute, guestprocess, output
from client.attend import Attendance
from client.cli import Command, Settings, pass_settings
from client.control import Control
from client.guestchannel import Channel
from client.params import Duration, Name, Pair, Timeout
from client.proxy import Failure
from client.terminal import Terminal
from gatewayd import api
from gatewayd.api import ErrorKind
from gatewayd.guest import wire
from gatewayd.guest.events import Failed, Opened
from gatewayd.guest.wire import LINGER_MAX, GuestProtocolError

PID_MAX = 1 << 32


@click.command(
    "exec",
    cls=Command,
    examples=(
        "sandbox exec demo -- uname -a",
        "sandbox exec demo --cwd /tmp --env STAGE=ci -- make test",
        "tar c src | sandbox exec demo -- tar x -C /tmp",
        "sandbox exec demo --pty -- vim notes.txt",
        "sandbox exec demo --detach --format id -- ./server",
    ),
    options_metavar="[OPTIONS] --",
)
@click.argument("name", type=Name())
@click.argument("argv", nargs=-1, required=True, type=click.UNPROCESSED, metavar="COMMAND…")
@click.option("--env", type=Pair(inherit=True), multiple=True, help="Set a variable, or pass on the one of this KEY; repeatable.")
@click.option("--cwd", metavar="DIR", help="Working directory; default: the user's home.")
@click.option("--user", "-u", metavar="USER", help="User inside the sandbox; default: the image's.")
@click.option("--pty", "-t", is_flag=True, help="Give it a terminal: this one, if there is one.")
@click.option("--shell", metavar="PATH", help="Run it with this shell; default: with none.")
@click.option(
    "--timeout",
    type=Timeout(zero=True),
    default="0",
    help="Kill it after this time, the start of the sandbox included; default: never.",
)
@click.option("--detach", "-d", is_flag=True, help="Leave it running and print its session's id.")
@click.option("--linger", type=Duration(), help="Time without a connection after which it is ended (default 1h, detached 7d).")
@pass_settings
def exec_command(
    settings: Settings,
    name: str,
    argv: tuple[str, ...],
    env: tuple[tuple[str, str], ...],
    cwd: str | None,
    user: str | None,
    pty: bool,
    shell: str | None,
    timeout: float,
    detach: bool,
    linger: int | None,
) -> int:
    """Run COMMAND in a sandbox and pass on its input, output, errors, signals and exit code.

    Its arguments arrive as they are given: no shell takes them apart. Write `-- sh -c '…'` for pipes and the like.
    """
    if detach and timeout:
        raise click.UsageError("--timeout needs somebody to wait: leave out --detach")
    if linger is not None and not 0 < linger <= LINGER_MAX:
        raise click.UsageError("--linger is at least 1s and at most 7d")
    linger = linger or (guestprocess.DETACHED_LINGER if detach else guestprocess.EXEC_LINGER)
    terminal = Terminal.found(0, 1) if pty else None
    words = [shell, "-c", shlex.join(argv)] if shell else list(argv)
    session = guestprocess.process(
        argv=words, env=env, cwd=cwd, user=user, linger=linger, drop=detach, pty=pty, terminal=terminal
    )
    control = settings.control()
    channel = Channel(control, name, session, wake=True, linger=linger)
    reads = not detach and execute.has_input()
    if not reads and not pty:
        session.input_eof()
    try:
        with control.naming(name):
            if detach:
                return _detached(settings, channel)
            return Attendance(channel, stdin=0 if reads else None, pty=pty, terminal=terminal, timeout=timeout).run()
    except Failure as exc:
        if exc.kind not in guestprocess.NO_GUEST or channel.answered:
            raise
        if user or detach or pty:
            option = "--user" if user else "--detach" if detach else "--pty"
            raise Failure(exc.kind, f"{option} cannot be had: {exc.message}", exc.hint) from exc
        if reads:
            output.note(f"{exc.message}: input and output can be text only")
    fields: dict[str, Any] = {"argv": list(argv), "env": dict(env), "timeout": timeout, "pty": False, "close_stdin": not reads}
    fields.update({key: value for key, value in (("cwd", cwd), ("shell", shell)) if value is not None})
    return _as_text(control, name, fields, reads)


def _detached(settings: Settings, channel: Channel) -> int:
    """Start it, say what it is called, and go."""
    number = channel.session.id.hex()
    try:
        for event in channel.events():
            if isinstance(event, Failed):
                channel.flush(1.0)
                raise Failure(ErrorKind.FAILED, f"cannot run the command: {event.message}")
            if isinstance(event, Opened):
                pid = _pid(event, channel)
                channel.close()  # nothing is acknowledged: output that came along is for whoever attaches
                value = {"session": number, "sandbox": channel.sandbox, "pid": pid}
                settings.show(value, lambda: f"session {number[:8]}; `sandbox attach {channel.sandbox} {number[:8]}`", [number])
                return 0
    except Failure as exc:
        if exc.kind == ErrorKind.TIMEOUT and channel.answered:  # what was not started in time must not start later
            channel.session.close()
            channel.finish(1.0)
        raise
    finally:
        channel.close()
    return 1


def _pid(event: Opened, channel: Channel) -> int:
    """What the guest calls the process; 0 when it does not say. Raises Failure, and ends the session, when that is no number."""
    try:
        return wire.number(event.fields.get("pid") or b"0", PID_MAX)
    except GuestProtocolError as exc:
        channel.session.close()
        channel.flush(1.0)
        raise Failure(ErrorKind.INTERNAL, f"the guest in sandbox {channel.sandbox!r} makes no sense: {exc}") from exc


def _as_text(control: Control, name: str, fields: dict[str, Any], reads: bool) -> int:
    """Over the service's own protocol, which carries text."""
    for word in (*fields["argv"], fields.get("cwd", ""), fields.get("shell", "")):
        try:
            word.encode()
        except UnicodeEncodeError:
            raise click.UsageError(f"the word {output.clean(word)!r} is not UTF-8") from None
    sock, _ = control.connect(api.OP_EXEC, name, fields, output.note)
    try:
        return execute.carry(sock, 0 if reads else None)
    finally:
        sock.close()

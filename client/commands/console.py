"""console: a shell on this terminal."""

from __future__ import annotations

import click

from client import execute, guestprocess, output, textconsole
from client.attend import Attendance
from client.cli import Command, Settings, pass_settings
from client.guestchannel import Channel
from client.params import Duration, Name, Pair
from client.proxy import Failure
from client.terminal import Terminal
from gatewayd.guest.wire import LINGER_MAX


@click.command("console", cls=Command, examples=("sandbox console demo", "sandbox console demo --shell /bin/zsh --env STAGE=ci"))
@click.argument("name", type=Name())
@click.option("--shell", metavar="PATH", help="Program to run; default: the user's login shell.")
@click.option("--env", type=Pair(inherit=True), multiple=True, help="Set a variable, or pass on the one of this KEY; repeatable.")
@click.option("--cwd", metavar="DIR", help="Working directory; default: the user's home.")
@click.option("--user", "-u", metavar="USER", help="User inside the sandbox; default: the image's.")
@click.option("--linger", type=Duration(), help="Time without a connection after which the shell is ended (default 1d).")
@click.option("--forward-ssh-agent", is_flag=True, help="Refused: `ssh -A` does it.")
@pass_settings
def console_command(
    settings: Settings,
    name: str,
    shell: str | None,
    env: tuple[tuple[str, str], ...],
    cwd: str | None,
    user: str | None,
    linger: int | None,
    forward_ssh_agent: bool,
) -> int:
    """Open a shell in a sandbox, on this terminal. After a newline, ~? shows what else the keyboard can do.

    It stays while the network or the daemon is away. Without a terminal here it is a plain shell that reads commands.
    """
    if forward_ssh_agent:
        raise click.UsageError(f"a console forwards no agent: `sandbox ssh-setup {name}`, then `ssh -A sandbox-{name}`")
    if linger is not None and not 0 < linger <= LINGER_MAX:
        raise click.UsageError("--linger is at least 1s and at most 7d")
    linger = linger or guestprocess.CONSOLE_LINGER
    terminal = Terminal.found(0)
    session = guestprocess.process(
        argv=[shell] if shell else [], env=env, cwd=cwd, user=user, linger=linger, pty=terminal is not None, terminal=terminal
    )
    control = settings.control()
    channel = Channel(control, name, session, wake=True, linger=linger)
    reads = execute.has_input()
    if not reads:
        session.input_eof()
    try:
        with control.naming(name):
            stdin = 0 if reads else None
            return Attendance(channel, stdin=stdin, pty=terminal is not None, terminal=terminal).run()
    except Failure as exc:
        if exc.kind not in guestprocess.NO_GUEST or channel.answered:
            raise
        if user:
            raise Failure(exc.kind, f"--user cannot be had: {exc.message}", exc.hint) from exc
        output.note(f"{exc.message}: a plain console, which ends with its connection")
    return textconsole.run(control, name, shell=shell, env=dict(env), cwd=cwd, terminal=terminal)

"""exec."""

from __future__ import annotations

from typing import Any

import click

from client import execute, output
from client.cli import Command, Settings, pass_settings
from client.params import Name, Pair, Timeout
from gatewayd import api


@click.command(
    "exec",
    cls=Command,
    examples=(
        "sandbox exec demo -- uname -a",
        "sandbox exec demo --cwd /tmp --env STAGE=ci -- make test",
        "sandbox exec demo -- sh -c 'grep -c ^ | tee count' < words.txt",
    ),
    options_metavar="[OPTIONS] --",
)
@click.argument("name", type=Name())
@click.argument("argv", nargs=-1, required=True, type=click.UNPROCESSED, metavar="COMMAND…")
@click.option("--env", type=Pair(inherit=True), multiple=True, help="Set a variable, or pass on the one of this KEY; repeatable.")
@click.option("--cwd", metavar="DIR", help="Working directory; default: the user's home.")
@click.option("--shell", metavar="PATH", help="Shell to run it with; default: /bin/bash, else /bin/sh.")
@click.option("--timeout", type=Timeout(zero=True), default="0", help="Kill it after this time; default: never.")
@pass_settings
def exec_command(
    settings: Settings,
    name: str,
    argv: tuple[str, ...],
    env: tuple[tuple[str, str], ...],
    cwd: str | None,
    shell: str | None,
    timeout: float,
) -> int:
    """Run COMMAND in a sandbox and pass on its input, output, errors and exit code.

    Its arguments arrive as they are given: no shell takes them apart. Write `-- sh -c '…'` for pipes and the like.
    """
    for word in (*argv, cwd or "", shell or ""):
        try:
            word.encode()
        except UnicodeEncodeError:
            raise click.UsageError(f"the word {output.clean(word)!r} is not UTF-8") from None
    reads = execute.has_input()
    fields: dict[str, Any] = {"argv": list(argv), "env": dict(env), "timeout": timeout, "pty": False, "close_stdin": not reads}
    fields.update({key: value for key, value in (("cwd", cwd), ("shell", shell)) if value is not None})
    sock, _ = settings.control().connect(api.OP_EXEC, name, fields, output.note)
    try:
        return execute.carry(sock, 0 if reads else None)
    finally:
        sock.close()

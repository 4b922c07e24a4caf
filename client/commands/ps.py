"""ps: the processes that a sandbox keeps for those who come back."""

from __future__ import annotations

import time
from typing import Any

import click

from client import guestprocess, output
from client.cli import Command, Settings, pass_settings
from client.params import Name
from client.proxy import Failure
from gatewayd.api import ErrorKind


@click.command("ps", cls=Command, examples=("sandbox ps demo --format pretty",))
@click.argument("name", type=Name())
@pass_settings
def ps_command(settings: Settings, name: str) -> None:
    """List the sessions of `exec` and `console` in a sandbox. A stopped one has none, and stays stopped."""
    control = settings.control()
    try:
        with control.naming(name):
            found = guestprocess.sessions(control, name)
    except Failure as exc:
        if exc.kind != ErrorKind.STOPPED:
            raise
        output.note(exc.message)
        found = []
    settings.show({"sessions": found}, lambda: _table(found, name), [item["id"] for item in found])


def _table(found: list[dict[str, Any]], name: str) -> str:
    if not found:
        return f"sandbox {name} has no sessions\n"
    rows = [[item["id"][:8], item["pid"], _state(item), _age(item["started"]), item["name"] or item["command"]] for item in found]
    return output.table(["SESSION", "PID", "STATE", "AGE", "COMMAND"], rows)


def _state(item: dict[str, Any]) -> str:
    if item["signal"]:
        return f"killed ({item['signal']})"
    if item["code"] is not None:
        return f"ended ({item['code']})"
    return "attached" if item["attached"] else "detached"


def _age(started: float | None) -> str:
    return "" if started is None else output.duration(time.time() - started)

"""up, down."""

from __future__ import annotations

import os
import select
from typing import Any

import click

from client import render
from client.cli import Command, Settings, pass_settings
from client.control import NotRunning
from client.proxy import Failure
from gatewayd import api

ANSWER_TIMEOUT = 10.0  # seconds for the daemon to say who it is and to take the order
DOWN_DEADLINE = 30.0  # seconds for the daemon to end: its own deadlines are shorter


@click.command("up", cls=Command, examples=("sandbox up",))
@pass_settings
def up_command(settings: Settings) -> None:
    """Start the daemon if it does not run, and show its status."""
    status = settings.control().request("GET", "/status")
    settings.show({"running": True, **status}, lambda: render.daemon_status(status), [status["pid"]])


@click.command("down", cls=Command, examples=("sandbox down", "sandbox down --keep-local"))
@click.option("--keep-local", is_flag=True, help="Leave the embedded service and its sandboxes running.")
@pass_settings
def down_command(settings: Settings, keep_local: bool) -> None:
    """Stop the daemon and wait until it has ended. Every connection through it ends with it.

    The embedded service is stopped, too, and its sandboxes with it (their files stay), unless --keep-local is given.
    """
    control = settings.control(start=False)
    answer: dict[str, Any] = {"running": False, "stopped_pid": None}
    try:
        pid = int(control.request("GET", "/status", timeout=ANSWER_TIMEOUT)["pid"])
        ended = _handle(pid)
        try:
            control.request("POST", "/shutdown", {"keep_local": keep_local}, timeout=ANSWER_TIMEOUT)
            if ended is not None and not select.select([ended], [], [], DOWN_DEADLINE)[0]:
                raise Failure(
                    api.ErrorKind.TIMEOUT,
                    f"the daemon (pid {pid}) did not end within {DOWN_DEADLINE:.0f} s",
                    f"kill {pid} ends it",
                )
        finally:
            if ended is not None:
                os.close(ended)
        answer["stopped_pid"] = pid
    except NotRunning:
        pass
    text = f"stopped the daemon (pid {answer['stopped_pid']})" if answer["stopped_pid"] else "the daemon was not running"
    settings.show(answer, lambda: text, [])


def _handle(pid: int) -> int | None:
    """A descriptor that becomes readable when the process ends; None if it has."""
    try:
        return os.pidfd_open(pid)
    except ProcessLookupError:
        return None

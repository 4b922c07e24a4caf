"""status: of the daemon, or of one sandbox."""

from __future__ import annotations

import os

import click

from client import output, render
from client.cli import Command, Settings, pass_settings, report
from client.control import NotRunning
from client.hosts import is_direct
from client.params import Name
from gatewayd import api


@click.command("status", cls=Command, examples=("sandbox status", "sandbox status demo"))
@click.argument("name", type=Name(), required=False)
@pass_settings
def status_command(settings: Settings, name: str | None) -> int:
    """Show the status of one sandbox; without NAME, of the daemon, which is not started for that."""
    if name is not None:
        answer = settings.control().sandbox("GET", name, "/status")
        if isinstance(answer, dict) and is_direct(name):
            answer["ssh"] = "sshd"  # the daemon does not look into ~/.ssh
        settings.show(answer, lambda: render.sandbox_status(name, answer), [name])
        return 0
    try:
        status = settings.control(start=False).request("GET", "/status")
    except NotRunning as exc:
        log = os.path.join(api.state_dir(), api.DAEMON_LOG)  # noqa: PTH118 - pathlib would be most of this command's time
        answer = {"running": False, "runtime_dir": api.runtime_dir(), "log_file": log}
        facts = [("daemon", "down"), ("sockets", answer["runtime_dir"]), ("log", log)]
        settings.show(answer, lambda: output.facts(facts), [])
        report(exc)
        return api.EXIT_CODES[exc.kind]
    settings.show({"running": True, **status}, lambda: render.daemon_status(status), [status["pid"]])
    return 0

"""wait, start, stop, delete."""

from __future__ import annotations

import sys
from typing import Any

import click

from client import output, render
from client.cli import Command, Settings, pass_settings, report
from client.control import WAIT_GRACE, Control
from client.hosts import relist
from client.params import Name, Timeout
from client.proxy import Failure
from gatewayd import api


@click.command("wait", cls=Command, examples=("sandbox wait demo", "sandbox wait demo --for stopped --timeout 1m"))
@click.argument("name", type=Name())
@click.option(
    "--for", "state", type=click.Choice(["ready", "stopped"]), default="ready", show_default=True, help="What to wait for."
)
@click.option("--timeout", type=Timeout(), default="120", show_default=True, help="How long to wait.")
@pass_settings
def wait_command(settings: Settings, name: str, state: str, timeout: float) -> None:
    """Wait until a sandbox is ready, or stopped."""
    body = {"for": state, "timeout": timeout}
    with output.progress(f"waiting until {name} is {state}"):
        box = settings.control().sandbox("POST", name, "/wait", body=body, timeout=timeout + WAIT_GRACE)
    settings.show(box, lambda: render.sandbox_facts(box), [name])


def _switch(settings: Settings, name: str, action: str, doing: str, wait: bool, timeout: float) -> None:
    body = {"wait": wait, "timeout": timeout}
    with output.progress(f"{doing} {name}"):
        box = settings.control().sandbox("POST", name, f"/{action}", body=body, timeout=timeout + WAIT_GRACE)
    render.warn(box)
    settings.show(box, lambda: render.sandbox_facts(box), [name])


@click.command("start", cls=Command, examples=("sandbox start demo",))
@click.argument("name", type=Name())
@click.option("--wait/--no-wait", default=True, show_default=True, help="Wait until it is ready.")
@click.option("--timeout", type=Timeout(), default="120", show_default=True, help="How long to wait.")
@pass_settings
def start_command(settings: Settings, name: str, wait: bool, timeout: float) -> None:
    """Start a stopped sandbox."""
    _switch(settings, name, "start", "starting", wait, timeout)


@click.command("stop", cls=Command, examples=("sandbox stop demo",))
@click.argument("name", type=Name())
@click.option("--wait/--no-wait", default=True, show_default=True, help="Wait until it is stopped.")
@click.option("--timeout", type=Timeout(), default="120", show_default=True, help="How long to wait.")
@pass_settings
def stop_command(settings: Settings, name: str, wait: bool, timeout: float) -> None:
    """Stop a sandbox; its files stay, its processes end."""
    _switch(settings, name, "stop", "stopping", wait, timeout)


@click.command("delete", cls=Command, examples=("sandbox delete demo", "sandbox delete demo build --yes"))
@click.argument("names", type=Name(), nargs=-1, required=True, metavar="NAME…")
@click.option("--yes", "-y", is_flag=True, help="Do not ask.")
@pass_settings
def delete_command(settings: Settings, names: tuple[str, ...], yes: bool) -> int:
    """Delete sandboxes and everything in them. On a terminal it asks first."""
    names = tuple(dict.fromkeys(names))
    if not yes and output.is_terminal(sys.stdin) and output.is_terminal(sys.stderr):
        what = names[0] if len(names) == 1 else f"{len(names)} sandboxes ({', '.join(names)})"
        if not output.confirm(f"Delete {what} with all files?"):
            raise Failure(api.ErrorKind.FAILED, "nothing was deleted")
    control = settings.control()
    deleted: list[str] = []
    code = 0
    for name in names:
        failure = _delete(control, name)
        if failure is None:
            deleted.append(name)
        else:
            report(failure)
            code = code or api.EXIT_CODES.get(failure.kind, api.EXIT_CODES[api.ErrorKind.INTERNAL])
    relist(control, gone=deleted)
    answer: dict[str, Any] = {"deleted": deleted}
    if deleted or not code:
        settings.show(answer, lambda: "".join(f"deleted {name}\n" for name in deleted), deleted)
    return code


def _delete(control: Control, name: str) -> Failure | None:
    try:
        control.sandbox("DELETE", name)
    except Failure as exc:
        return exc
    return None

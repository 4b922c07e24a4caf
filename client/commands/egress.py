"""egress: what a sandbox reached of the network, and what it was refused."""

from __future__ import annotations

from typing import Any

import click

from client import output
from client.cli import Command, Settings, pass_settings
from client.output import clean
from client.params import Name

_WAIT = 20  # seconds one question for news lasts
_HEADERS = ["TIME", "VERDICT", "KIND", "HOST", "PORT", "WHAT", "RULES", "SENT", "RECEIVED"]
_LINE = "{:<12} {:<5} {:<4} {}"


@click.command("egress", cls=Command, examples=("sandbox egress demo --format pretty", "sandbox egress demo --follow"))
@click.argument("name", type=Name())
@click.option("--follow", "-f", is_flag=True, help="Go on with each new one as it is made, a line each, until Ctrl-C.")
@pass_settings
def egress_command(settings: Settings, name: str, follow: bool) -> None:
    """Show what a sandbox reached of the network: names, connections and requests, allowed and denied.

    The embedded service keeps the last thousand of each sandbox.
    """
    control = settings.control()
    found = control.sandbox("GET", name, "/egress")["decisions"]
    if not follow:
        settings.show({"decisions": found}, lambda: _table(found, name), [item["serial"] for item in found])
        return
    last = 0
    while True:
        for item in found:
            output.write(_line(item) if settings.format == "pretty" else output.as_json(item, None))
            last = item["serial"]
        query = {"after": last, "wait": _WAIT}
        found = control.sandbox("GET", name, "/egress", query=query, timeout=_WAIT * 2)["decisions"]


def _table(found: list[dict[str, Any]], name: str) -> str:
    if not found:
        return f"sandbox {name} has reached nothing yet\n"
    rows = [[_time(item), item["verdict"], item["kind"], item["host"], item["port"], _what(item), *_rest(item)] for item in found]
    return output.table(_HEADERS, rows)


def _line(item: dict[str, Any]) -> str:
    port = f":{item['port']}" if item["port"] else ""
    words = [f"{item['host']}{port}", _what(item), *(f"[{rule}]" for rule in item["rules"] or ())]
    return _LINE.format(_time(item), clean(item["verdict"]), clean(item["kind"]), clean(" ".join(words))) + "\n"


def _time(item: dict[str, Any]) -> str:
    return clean(item["time"]).partition("T")[2][:12]


def _what(item: dict[str, Any]) -> str:
    words = [item.get("method"), item.get("path"), item.get("status"), item.get("reason")]
    return " ".join(str(word) for word in words if word)


def _rest(item: dict[str, Any]) -> list[Any]:
    return [",".join(item["rules"] or ()), item["sent"], item["received"]]

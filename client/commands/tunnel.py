"""tunnel: a local port, or a pipe, that is a port of a sandbox."""

from __future__ import annotations

import _socket
import signal
import sys

import click

from client import output, proxy
from client.cli import PIPE_BROKEN, Command, Settings, pass_settings
from client.control import failure_of, read_json_line
from client.execute import Interrupted, interruptible
from client.params import Name, Port
from client.proxy import Failure
from gatewayd import api

LEVELS = {"debug": 0, "info": 1, "warn": 2, "warning": 2, "error": 3}
EVENT_LEVELS = {"opened": 1, "closed": 1, "failed": 2}  # an event the daemon may add later counts as debug
LOOPBACK = "127.0.0.1"


@click.command(
    "tunnel",
    cls=Command,
    examples=(
        "sandbox tunnel demo --remote-port 5432",
        "sandbox tunnel demo --remote-port 5432 --local-port 0",
        "sandbox tunnel demo --remote-port 5432 --resumable",
        "ssh -o ProxyCommand='sandbox tunnel demo --remote-port 22 --stdio' root@demo",
    ),
)
@click.argument("name", type=Name())
@click.option("--remote-port", type=Port(), required=True, help="Port inside the sandbox.")
@click.option("--local-port", type=Port(zero=True), help="Local port; default: the same number, 0: any free one.")
@click.option("--stdio", is_flag=True, help="Connect standard input and output instead, as a ProxyCommand does.")
@click.option("--resumable", is_flag=True, help="Connections survive a lost link (needs Python in the sandbox).")
@click.option(
    "--log-level",
    type=click.Choice(list(LEVELS)),
    default="warn",
    show_default=True,
    help="Which connections to report: info every one, warn failed ones.",
)
@pass_settings
def tunnel_command(
    settings: Settings, name: str, remote_port: int, local_port: int | None, stdio: bool, resumable: bool, log_level: str
) -> int:
    """Listen on a local port and carry each connection to a port of the sandbox, until Ctrl-C (exit code 0)."""
    if stdio:
        if local_port is not None:
            raise click.UsageError("--stdio listens on no port: leave out --local-port")
        if resumable:
            raise click.UsageError("--stdio cannot be resumed: leave out --resumable")
        return _stdio(settings, name, remote_port)
    wanted = remote_port if local_port is None else local_port
    fields: dict[str, object] = {"remote_port": remote_port, "local_port": wanted, "address": LOOPBACK}
    if resumable:
        fields["resumable"] = True
    sock: _socket.socket | None = None
    listening = False
    try:
        with interruptible():
            sock, ok = settings.control().connect(api.OP_FORWARD, name, fields, output.note)
            listening = True
            _announce(settings, name, remote_port, str(ok.get("address", LOOPBACK)), ok.get("port", wanted))
            _follow(sock, LEVELS[log_level])
    except Interrupted as exc:
        if exc.number == signal.SIGINT:
            output.after_interrupt()
        return 0 if listening and exc.number != signal.SIGHUP else 128 + exc.number
    finally:
        if sock is not None:
            sock.close()
    return 0


def _announce(settings: Settings, name: str, remote_port: int, address: str, port: object) -> None:
    value = {"address": address, "port": port, "sandbox": name, "remote_port": remote_port}
    if settings.format == "id":
        output.write(f"{output.clean(f'{address}:{port}')}\n")
    elif settings.format == "pretty" or (not settings.format_given and output.is_terminal(sys.stdout)):
        output.write(f"{output.clean(f'{address}:{port}')} is port {remote_port} of {name}; Ctrl-C ends it\n")
    else:
        output.write(output.as_json(value, indent=None))


def _follow(sock: _socket.socket, level: int) -> None:
    """Report events until the daemon ends the forward."""
    while True:
        try:
            event = read_json_line(sock)
        except Failure as exc:
            if exc.kind == api.ErrorKind.UNAVAILABLE:
                exc.message = "the tunnel has ended: the daemon closed it"
            raise
        if "error" in event:
            raise failure_of(event, "the tunnel has ended")
        kind = str(event.get("event", ""))
        if EVENT_LEVELS.get(kind, 0) >= level:
            peer, text = event.get("peer"), event.get("message")
            output.note(f"connection {kind}" + (f" ({peer})" if peer else "") + (f": {text}" if text else ""))


def _stdio(settings: Settings, name: str, remote_port: int) -> int:
    sock, _ = settings.control().connect(api.OP_CONNECT, name, {"port": remote_port}, output.note)
    try:
        return 0 if proxy.bridge(sock) else PIPE_BROKEN
    finally:
        sock.close()

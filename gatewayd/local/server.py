"""``gatewayd local``: the embedded sandbox service. Puts the parts together, and ends them in order.

Standard output carries one JSON line, once it listens: ``{"endpoint", "pid", "api_key_file"}``. All else goes to standard error.
"""

from __future__ import annotations

import argparse
import asyncio
import ipaddress
import json
import logging
import os
import resource
import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import uvloop

from gatewayd.local import logs, memory
from gatewayd.local.boxes import Boxes
from gatewayd.local.clock import Clock
from gatewayd.local.egress.addresses import Reach
from gatewayd.local.egress.service import Egress
from gatewayd.local.guard import WILDCARDS, Guard
from gatewayd.local.runtime.base import RuntimeFailure
from gatewayd.local.runtimes import NAMES, make_runtime, table
from gatewayd.local.skopeo import PASSED_ON
from gatewayd.local.statedir import StateDir, StateDirError, StateDirInUse
from gatewayd.local.store import Store, StoreError
from gatewayd.local.sweeper import sweep_for_ever
from gatewayd.tasks import TaskOwner

if TYPE_CHECKING:
    from gatewayd.local.httpd import Server

log = logging.getLogger("gatewayd.local")

EX_SOFTWARE, EX_OSFILE, EX_CANTCREAT = 70, 72, 73  # sysexits.h: internal; state unusable; port or directory in use
BACKLOG = 1024
MOST_DESCRIPTORS = 65536  # a command needs three, a stream of a tunnel one; usual limits are 1,024, and more when asked for


class ListenError(Exception):
    """The address cannot be listened on; the message says why."""


def main(argv: Sequence[str]) -> int:
    """Run the service until SIGTERM or SIGINT and return its exit code."""
    args = _parse(argv)
    logs.start()
    if args.check:
        return _check(args.runtime, Path(args.state_dir).absolute())
    try:
        state = StateDir(Path(args.state_dir).absolute())
    except StateDirError as exc:
        return _fail(str(exc), EX_CANTCREAT if isinstance(exc, StateDirInUse) else EX_OSFILE)
    try:
        sock = _listen(args.host, args.port)
    except ListenError as exc:
        state.close()
        return _fail(str(exc), EX_CANTCREAT)
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(_serve(state, sock, args.host, args.runtime, args.base, args.allow_private))
    except (StateDirError, StoreError) as exc:
        return _fail(str(exc), EX_OSFILE)
    except RuntimeFailure as exc:
        return _fail(str(exc), EX_SOFTWARE)
    except OSError as exc:
        return _fail(f"cannot use the state directory {state.path}: {exc.strerror or exc}", EX_OSFILE)
    finally:
        sock.close()
        state.close()


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="gatewayd local", description="Run the embedded sandbox service.")
    parser.add_argument("--port", type=_port, default=0, help="port to listen on; 0, the default, takes a free one")
    parser.add_argument("--state-dir", help="directory of its state, made if need be (mode 0700)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--runtime", choices=NAMES, default=NAMES[0], help="what runs the sandboxes (default: %(default)s)")
    parser.add_argument(
        "--base",
        type=Path,
        metavar="ARCHIVE",
        help="make sandboxes on the root file system in this tar file (native runtime only)",
    )
    parser.add_argument(
        "--allow-private",
        action="append",
        default=[],
        metavar="CIDR",
        help="let sandboxes reach this private network or address, which they do not without; can be given several times",
    )
    parser.add_argument(
        "--check", action="store_true", help="say what the runtime finds on this machine, and exit (0: all is there)"
    )
    args = parser.parse_args(argv)
    if args.state_dir is None and not args.check:
        parser.error("the following arguments are required: --state-dir")
    args.state_dir = args.state_dir or "."
    try:
        Reach(args.allow_private)
    except ValueError as exc:
        parser.error(f"--allow-private: {exc}")
    if args.base is not None and args.runtime != NAMES[0]:
        parser.error(f"--base needs the {NAMES[0]} runtime")
    if args.base is not None and not args.base.is_file():
        parser.error(f"--base: no such file: {args.base}")
    return args


def _check(runtime: str, state_dir: Path) -> int:
    """Print what a runtime finds on this machine; 1 when something is missing."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        findings = runner.run(make_runtime(runtime, state_dir).check())
    sys.stdout.write(table(findings))
    return 0 if all(finding.ok for finding in findings) else 1


def _port(text: str) -> int:
    port = int(text)
    if not 0 <= port <= 65535:
        raise ValueError
    return port


def _fail(message: str, code: int) -> int:
    sys.stderr.write(f"gatewayd local: {message}\n")
    return code


def _listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises ListenError."""
    try:
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as exc:
        raise ListenError(f"cannot listen on {host}: {exc.strerror}") from exc
    family, kind, proto, _, address = found[0]
    if not ipaddress.ip_address(address[0]).is_loopback:
        log.warning("listening on %s: the service can be reached from other machines, without encryption", address[0])
    sock = socket.socket(family, kind, proto)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # inherited by connections: peers that vanish are noticed
        sock.bind(address)
        sock.listen(BACKLOG)
    except OSError as exc:
        sock.close()
        raise ListenError(f"cannot listen on {host} port {port}: {os.strerror(exc.errno or 0).lower()}") from exc
    sock.setblocking(False)
    return sock


def _endpoint(sock: socket.socket, host: str) -> str:
    """The service's URL, as a client on this machine would write it."""
    address, port = sock.getsockname()[:2]
    if address in WILDCARDS:
        address = "127.0.0.1" if sock.family == socket.AF_INET else "::1"
    elif not host.startswith(("127.", "::1")):
        address = host
    return f"http://[{address}]:{port}" if ":" in address else f"http://{address}:{port}"


async def _serve(state: StateDir, sock: socket.socket, host: str, runtime: str, base: Path | None, opened: Sequence[str]) -> int:
    memory.spare()
    _allow_descriptors()
    from gatewayd.local.app import build_app
    from gatewayd.local.httpd import Tunnels, make_server

    store = Store(state.database)
    state.claim(runtime, empty=not store.load())
    environ = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    clock = Clock()
    egress = Egress(store, clock, Reach(opened))
    boxes = Boxes(store, make_runtime(runtime, state.path, base), clock, environ, egress)
    tasks = TaskOwner("service")
    try:
        await boxes.recover()
        guard = Guard(state.key(), host)
        tunnels = Tunnels(boxes, guard)

        async def on_stop() -> None:
            tunnels.go_away()
            await boxes.aclose()
            await tunnels.aclose()

        server = make_server(build_app(boxes, guard), tunnels, on_stop)
        _handle_signals(server, state)
        tasks.start(sweep_for_ever(boxes), "sweeper")
        serving = tasks.start(server.serve(sockets=[sock]), "http")
        endpoint = _endpoint(sock, host)
        state.publish(endpoint)
        log.info("listening on %s, state in %s, pid %d", endpoint, state.path, os.getpid())
        _announce(endpoint, state)
        await serving
        log.info("ended in order")
        return 0
    finally:
        await boxes.aclose()
        await tasks.aclose()


def _announce(endpoint: str, state: StateDir) -> None:
    """The one line on standard output; nobody reading it is no reason to end."""
    line = json.dumps({"endpoint": endpoint, "pid": os.getpid(), "api_key_file": str(state.key_file)})
    try:
        sys.stdout.write(line + "\n")
        sys.stdout.flush()
    except OSError as exc:
        log.warning("standard output: %s", exc)


def _allow_descriptors() -> None:
    """Use what the hard limit on descriptors leaves. Sandboxes inherit that."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, MOST_DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _handle_signals(server: Server, state: StateDir) -> None:
    """The first SIGTERM or SIGINT ends in order, the second at once (the next start cleans up)."""
    loop = asyncio.get_running_loop()
    asked = False

    def on_signal(number: int) -> None:
        nonlocal asked
        log.info("%s: %s", signal.Signals(number).name, "ending at once" if asked else "ending")
        if asked:
            _end_now(state, number)
        asked = True
        server.stop()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal, number)


def _end_now(state: StateDir, number: int) -> NoReturn:
    state.close()
    os._exit(128 + number)

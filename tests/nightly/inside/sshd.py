#!/usr/bin/python3 -IS
"""What OpenSSH's regression scripts start as sshd: it hands connections to an SSH server outside. Runs inside a sandbox.

Beside it lies `sshd.json`: {"gate": port of that server, "keys": port that takes the files of keys, "log": path}. What the server
cannot be told of a script's configuration is written to the log, an option a line.
"""

from __future__ import annotations

import getpass
import json
import os
import signal
import socket
import sys
import threading
from pathlib import Path
from typing import Any, NoReturn

CHUNK = 65536  # bytes copied at a time
DEADLINE = 30.0  # seconds for a connection, and for the keys to be taken
LOCALHOST = "127.0.0.1"
# Obeyed here, told to the server, or without a meaning for it: what every configuration of the scripts has.
_KNOWN = (
    "port addressfamily listenaddress pidfile authorizedkeysfile trustedusercakeys loglevel hostkey strictmodes usepam "
    "securitykeyprovider"
)
KNOWN = frozenset(_KNOWN.split())
ALWAYS_THERE = {("subsystem", "sftp"), ("acceptenv", "_XXX_TEST"), ("acceptenv", "_XXX_TEST_*")}  # the front end has its own


class Options:
    """A command line and a configuration file, as far as they matter here."""

    def __init__(self, argv: list[str]) -> None:
        self.inetd = False  # -i: a connection on standard input and output
        self.check = False  # -t
        self.values: dict[str, str] = {}  # of the configuration: the first one of a name counts, as in sshd
        self.unknown: set[str] = set()  # names that mean nothing here
        words = iter(argv)
        file = Path(os.devnull)
        for word in words:
            if word == "-i":
                self.inetd = True
            elif word == "-t":
                self.check = True
            elif word == "-T":
                fail("cannot print a configuration: this is not sshd")
            elif word[:2] in ("-f", "-o", "-E"):
                value = word[2:] or next(words, "")
                if word[:2] == "-f":
                    file = Path(value)
                elif word[:2] == "-o":
                    self._take(value)
        for line in file.read_text(encoding="utf-8").splitlines():
            self._take(line)

    def _take(self, line: str) -> None:
        line = line.strip()
        if not line or line.startswith("#"):
            return
        name = line.replace("\t", " ").replace("=", " ").split(" ", 1)[0]
        value = line[len(name) :].lstrip(" \t=").strip("'\"")
        self.values.setdefault(name.lower(), value)
        if name.lower() not in KNOWN and (name.lower(), value.split()[0] if value else "") not in ALWAYS_THERE:
            self.unknown.add(name)

    def text(self, name: str) -> str:
        """Content of the file an option names; "" without one."""
        try:
            return Path(self.values.get(name, "").replace("%u", getpass.getuser())).read_text(encoding="utf-8")
        except OSError:
            return ""


def fail(message: str) -> NoReturn:
    """Leave as sshd does."""
    sys.stderr.write(f"{message}\n")
    sys.exit(255)


def dial(settings: dict[str, Any], options: Options) -> socket.socket:
    """A connection to the server, which has the keys of this moment."""
    message = {"authorized_keys": options.text("authorizedkeysfile"), "authorities": options.text("trustedusercakeys")}
    with socket.create_connection((LOCALHOST, settings["keys"]), DEADLINE) as keys:
        keys.sendall(json.dumps(message).encode() + b"\n")
        if keys.recv(3) != b"ok\n":
            fail("the keys were not taken")
    connection = socket.create_connection((LOCALHOST, settings["gate"]), DEADLINE)
    connection.settimeout(None)
    return connection


def upward(source: int, connection: socket.socket) -> None:
    """Copy until the source ends, then say so."""
    try:
        while data := os.read(source, CHUNK):
            connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
    except OSError:
        pass


def carry(connection: socket.socket, source: int, sink: int) -> None:
    """Copy both ways until the server has nothing more to say."""
    threading.Thread(target=upward, args=(source, connection), daemon=True).start()
    try:
        while data := connection.recv(CHUNK):
            while data:
                data = data[os.write(sink, data) :]
    except OSError:
        pass


def listen(settings: dict[str, Any], options: Options) -> None:
    """As sshd does without -i: in the background, with a file that has its pid, until a signal comes."""
    listener = socket.create_server((LOCALHOST, int(options.values.get("port", "22"))), backlog=128)
    if os.fork():
        os._exit(0)
    os.setsid()
    null = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(null, number)
    path = Path(options.values["pidfile"])

    def leave(*_: object) -> None:
        path.unlink()
        os._exit(0)

    signal.signal(signal.SIGTERM, leave)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    path.write_text(f"{os.getpid()}\n", encoding="utf-8")
    while True:
        client, _ = listener.accept()
        if os.fork() == 0:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            listener.close()
            try:
                carry(dial(settings, options), client.fileno(), client.fileno())
            finally:
                os._exit(0)
        client.close()


def main() -> None:
    """See sshd(8)."""
    options = Options(sys.argv[1:])
    settings = json.loads((Path(__file__).resolve().parent / "sshd.json").read_text(encoding="utf-8"))
    if options.unknown:
        with Path(settings["log"]).open("a", encoding="utf-8") as log:
            log.write("".join(f"{name}\n" for name in sorted(options.unknown)))
    if options.check:
        return
    if options.inetd:
        carry(dial(settings, options), 0, 1)
        os._exit(0)
    listen(settings, options)


if __name__ == "__main__":
    main()

"""A console in a sandbox without a guest: over the service's own protocol, whose text is lost with its connection."""

from __future__ import annotations

import _socket
import json
import os
import select
import signal
from typing import Any

from client import escapes, execute, output
from client.control import Control
from client.escapes import Escapes
from client.execute import Execution
from client.proxy import Failure
from client.signals import Signals, exit_code
from client.terminal import SIZE_DEFAULT, Terminal, environment
from gatewayd import api
from gatewayd.api import ErrorKind, Frame


def run(
    control: Control, name: str, *, shell: str | None, env: dict[str, str], cwd: str | None, terminal: Terminal | None
) -> int:
    """Until the shell has ended, or ``~.``; the exit code of this process.

    Raises:
        Failure: it cannot be had, or the connection broke.
    """
    columns, rows, _, _ = terminal.size() if terminal is not None else SIZE_DEFAULT
    fields: dict[str, Any] = {"pty": terminal is not None, "cols": columns, "rows": rows, "env": env}
    if terminal is not None:
        fields["env"] = {"TERM": _term(), **dict(environment()), **env}
    else:
        fields["command"] = shell or "sh"
    fields.update({key: value for key, value in (("cwd", cwd), ("shell", shell)) if value is not None})
    sock, _ = control.connect(api.OP_EXEC, name, fields, output.note)
    try:
        if terminal is None:
            return execute.carry(sock, 0 if execute.has_input() else None)
        console = TextConsole(sock, terminal)
        try:
            terminal.raw()
            return console.attend()
        finally:
            terminal.restore()
    finally:
        sock.close()


def _term() -> str:
    return os.environ.get("TERM", "dumb")


class _Left(Exception):
    """The user does not want the console any more."""


class TextConsole(Execution):
    """An execution with a terminal on both sides."""

    def __init__(self, sock: _socket.socket, terminal: Terminal) -> None:
        super().__init__(sock, stdin=terminal.fd)
        self._terminal = terminal
        self._escapes = Escapes()
        self._signals = Signals((signal.SIGWINCH, signal.SIGTERM, signal.SIGHUP))

    def attend(self) -> int:
        """`run`, with the terminal's size and escapes; the exit code."""
        with self._signals:
            try:
                while (code := self._step(None)) is None:
                    pass
                return code
            except (_Left, BrokenPipeError):
                self.kill()
                return exit_code("HUP")

    def _watch(self, poll: select.poll) -> None:
        poll.register(self._signals.fd, select.POLLIN)

    def _other(self, fd: int) -> bool:
        if fd != self._signals.fd:
            return False
        for number in self._signals.take():
            if number != signal.SIGWINCH:
                raise _Left
            columns, rows, _, _ = self._terminal.size()
            self._send(Frame.RESIZE, json.dumps({"cols": columns, "rows": rows}).encode())
        return True

    def _input(self, data: bytes) -> None:
        for found in self._escapes.feed(data):
            if isinstance(found, bytes):
                self._send(Frame.STDIN, found)
            elif found == escapes.LEAVE:
                raise _Left
            elif found == escapes.DETACH:
                raise Failure(ErrorKind.UNSUPPORTED, "a plain console cannot be left running")
            elif found == escapes.HELP:
                output.message("\r\n~.   end the session\r")

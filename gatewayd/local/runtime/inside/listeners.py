"""Unix sockets inside a sandbox, made by its agent for one user: a random folder below /tmp that nobody else can enter.

The listening descriptor goes to the service, which accepts. The agent keeps the folder open: whatever processes inside rename or
link meanwhile, the socket is made in, and removed from, that folder, and with no more rights than the user has.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
from typing import NamedTuple

from gatewayd.local.runtime.inside import accounts, kernel
from gatewayd.local.runtime.inside.packets import Answer, Request

_PLACE = "/tmp"  # noqa: S108 - the sandbox's; the folder in it has a random name and is made, never found
_NAME = "socket"
_BACKLOG = 64  # connections that wait to be accepted
_MAX_LISTENERS = 128  # sockets at once: each holds two descriptors


class _Listener(NamedTuple):
    """A socket that somebody listens on."""

    account: accounts.Account  # whose it is
    parent: int  # open descriptor of the folder that holds `name`
    folder: int  # open descriptor of the socket's own folder
    name: str  # of that folder


class Listeners:
    """Makes sockets, and removes them."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        self._open: dict[str, _Listener] = {}  # handle → socket; handles are the names of the folders

    def listen(self, request: Request) -> None:
        """A listening socket that only the user can connect to, and its path. Raises OSError, LookupError."""
        if len(self._open) >= _MAX_LISTENERS:
            raise OSError(errno.EMFILE, "too many sockets")
        account = accounts.resolve(request["user"])
        name = f"gatewayd-{os.urandom(8).hex()}"
        with contextlib.ExitStack() as undo, socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            with accounts.as_user(account):
                parent = kernel.open_plainly(_PLACE, os.O_PATH | os.O_DIRECTORY)
                undo.callback(os.close, parent)
                os.mkdir(name, 0o700, dir_fd=parent)
                folder = os.open(name, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=parent)
                undo.callback(os.close, folder)
                state = os.fstat(folder)
                if state.st_uid != account.uid or stat.S_IMODE(state.st_mode) & 0o077:
                    raise OSError(errno.EPERM, "", f"{_PLACE}/{name}")  # somebody has put another one there
            made = _Listener(account, parent, folder, name)
            undo.callback(_remove, made)
            _bind(sock, made)
            sock.listen(_BACKLOG)
            self._answer(request, {"handle": name, "path": f"{_PLACE}/{name}/{_NAME}"}, (sock.fileno(),))
            self._open[name] = made
            undo.pop_all()

    def unlisten(self, request: Request) -> None:
        """Remove a socket and its folder; files that somebody else left there stay."""
        listener = self._open.pop(request["handle"])
        _remove(listener)
        os.close(listener.folder)
        os.close(listener.parent)
        self._answer(request, {})


def _bind(sock: socket.socket, listener: _Listener) -> None:
    """Bind in the open folder itself: no path is walked that could lead elsewhere. Raises OSError."""
    mask = os.umask(0o177)
    try:
        with accounts.as_user(listener.account):
            os.fchdir(listener.folder)
            sock.bind(_NAME)
    finally:
        os.umask(mask)
        os.chdir("/")


def _remove(listener: _Listener) -> None:
    """The socket, and then the folder if it is empty; with the user's rights, for the user may have changed both."""
    with contextlib.suppress(OSError), accounts.as_user(listener.account):
        with contextlib.suppress(OSError):
            os.unlink(_NAME, dir_fd=listener.folder)
        os.rmdir(listener.name, dir_fd=listener.parent)

"""The daemon's two sockets, as the commands use them: HTTP requests on control.sock, streams on connect.sock.

Import-light on purpose: no click, no `socket`, no `http.client`.
"""

from __future__ import annotations

import _socket
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from client import proxy, unixhttp
from client.proxy import Failure
from gatewayd import api

REQUEST_TIMEOUT = 120.0  # seconds for an answer that waits for nothing in particular
WAIT_GRACE = 30.0  # seconds beyond the timeout that the daemon was asked to keep itself
NOTICES_MAX = 1000  # notices before an answer; more than that is no answer


class NotRunning(Failure):
    """There is no daemon, and it was not to be started."""

    def __init__(self) -> None:
        super().__init__(api.ErrorKind.UNAVAILABLE, "the daemon is not running", "`sandbox up` starts it")


class Control:
    """Talks to the daemon, with the profile and the credentials of this invocation."""

    def __init__(self, profile: str = "", *, start: bool = True) -> None:
        self.profile = profile  # named on the command line, or ""
        self.start = start  # whether a daemon that does not run is started

    def request(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        query: Mapping[str, Any] | None = None,
        timeout: float = REQUEST_TIMEOUT,
    ) -> Any:
        """One request to control.sock; returns the decoded JSON answer, or None for an empty one.

        Args:
            path: below ``/v1``, parts already percent-encoded.
            query: values that are None are left out.
            timeout: seconds of silence before it is given up.

        Raises:
            Failure: what the daemon says, or that it cannot be reached.
        """
        import json

        pairs = [f"{name}={unixhttp.quote(str(value))}" for name, value in (query or {}).items() if value is not None]
        target = "/v1" + path + ("?" + "&".join(pairs) if pairs else "")
        data = None if body is None else json.dumps(body).encode()
        sock = self._dial(api.CONTROL_SOCKET)
        try:
            sock.settimeout(timeout)
            status, answer = unixhttp.exchange(sock, method, target, api.caller_headers(self.profile), data)
        finally:
            sock.close()
        try:
            value = json.loads(answer) if answer.strip() else None
        except (ValueError, RecursionError):
            raise Failure("internal", f"the daemon's answer is not JSON (status {status})") from None
        if status >= 400:
            raise failure_of(value, f"the daemon answered with status {status}")
        return value

    def sandbox(self, method: str, name: str, action: str = "", **options: Any) -> Any:
        """`request` for one sandbox; an unknown name gets a hint with the nearest known one."""
        with self.naming(name):
            return self.request(method, f"/sandboxes/{unixhttp.quote(name)}{action}", **options)

    def connect(
        self, op: str, name: str, fields: Mapping[str, Any], notice: Callable[[str], None], timeout: float = proxy.REPLY_DEADLINE
    ) -> tuple[_socket.socket, dict[str, Any]]:
        """Open a stream on connect.sock.

        Args:
            op: one of ``api.OP_*``.
            notice: called with each message that comes before the answer.
            timeout: seconds between two lines of the daemon's reply.

        Returns the connection, in blocking mode and positioned at the first byte of the stream, and what the ``ok`` line says.

        Raises:
            Failure: what the daemon says, or that it cannot be reached.
        """
        with self.naming(name):
            try:
                line = api.encode_line({"op": op, "sandbox": name, **fields, **api.caller_fields(self.profile)})
            except ValueError as exc:
                raise Failure("usage", f"cannot send the request: {exc}") from None
            sock = self._dial(api.CONNECT_SOCKET)
            try:
                sock.settimeout(timeout)
                try:
                    sock.sendall(line)
                except OSError as exc:
                    raise Failure("unavailable", f"the connection to the daemon broke: {exc.strerror or exc}") from exc
                ok = _read_reply(sock, notice)
                sock.settimeout(None)
            except BaseException:
                sock.close()
                raise
            return sock, ok

    @contextmanager
    def naming(self, name: str) -> Iterator[None]:
        """Adds the nearest known name to a failure that says `name` is not known."""
        try:
            yield
        except Failure as exc:
            if exc.kind == api.ErrorKind.NOT_FOUND and not exc.hint:
                exc.hint = self._nearest(name)
            raise

    def _nearest(self, name: str) -> str:
        from difflib import get_close_matches

        try:
            known = [str(box["name"]) for box in self.request("GET", "/sandboxes", timeout=5.0)["sandboxes"]]
        except (Failure, LookupError, TypeError):
            return ""  # the first failure is the one to tell
        near = get_close_matches(name, known, n=1)
        if near:
            return f"did you mean {near[0]!r}?"
        return "`sandbox list` shows the sandboxes there are" if known else "there are no sandboxes; `sandbox create` makes one"

    def _dial(self, socket_name: str) -> _socket.socket:
        if self.start:
            return proxy.dial(socket_name)
        try:
            return proxy.connect(os.path.join(api.runtime_dir(), socket_name))  # noqa: PTH118 - pathlib is most of a start
        except (FileNotFoundError, ConnectionRefusedError):
            raise NotRunning from None


def failure_of(reply: object, otherwise: str) -> Failure:
    """The failure that an error reply tells of; `otherwise` for a reply that tells nothing."""
    error = reply.get("error") if isinstance(reply, dict) else None
    if not isinstance(error, dict):
        return Failure(api.ErrorKind.INTERNAL, otherwise)
    kind, message, hint = (error.get(key) for key in ("kind", "message", "hint"))
    return Failure(
        kind if isinstance(kind, str) and kind in api.EXIT_CODES else api.ErrorKind.INTERNAL,
        message if isinstance(message, str) and message else otherwise,
        hint if isinstance(hint, str) else "",
    )


def read_json_line(sock: _socket.socket) -> dict[str, Any]:
    """One JSON line of the daemon, and not a byte further.

    Raises:
        Failure: the connection ended, stayed silent beyond its timeout, or carried something else.
    """
    try:
        return api.decode_line(proxy.read_line(sock))
    except ValueError:
        raise Failure(api.ErrorKind.INTERNAL, "the daemon's answer makes no sense: it is not a JSON line") from None


def _read_reply(sock: _socket.socket, notice: Callable[[str], None]) -> dict[str, Any]:
    for _ in range(NOTICES_MAX):
        reply = read_json_line(sock)
        if isinstance(ok := reply.get("ok"), dict):
            return ok
        if "notice" not in reply:
            raise failure_of(reply, "the daemon's answer makes no sense: neither ok nor error")
        notice(str(reply["notice"]))
    raise Failure(api.ErrorKind.INTERNAL, f"the daemon's answer makes no sense: more than {NOTICES_MAX} notices")

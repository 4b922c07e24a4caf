"""The control contract: what the daemon and its clients agree on, with no I/O beyond reading the environment.

Standard library only, and almost none of it: the command imports this on every start, so `json` is imported where it is used and
the JSON shapes are seen by type checkers alone.

Two Unix sockets in `runtime_dir()`, both 0600 in a directory that is the user's alone:

``control.sock``
    HTTP/1.1 and JSON. Errors: ``{"error": {"kind", "message", "hint"}}`` with the status of `HTTP_STATUS`.
``connect.sock``
    One JSON request line, answered by JSON lines: any number of ``{"notice": text}``, then ``{"ok": {…}}`` or ``{"error": {…}}``.
    After an ``ok`` the connection is the stream that was asked for.
"""
# pathlib would be most of this module's import time:
# ruff: noqa: PTH100, PTH111, PTH112, PTH116, PTH117, PTH118

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any, TypedDict

    class ErrorBody(TypedDict):
        """What went wrong, as every answer carries it."""

        kind: str  # one of ErrorKind
        message: str  # one sentence
        hint: str  # what to do next, or ""

    class LinkStatus(TypedDict):
        """One multiplexed connection to a sandbox."""

        sandbox: str  # its name
        profile: str  # the profile it was dialled with
        state: str  # "connecting", "up" or "down"
        streams: int  # open streams
        rtt_ms: float | None  # last measured round trip, milliseconds
        bytes_in: int  # received from the sandbox since it was dialled
        bytes_out: int  # sent to the sandbox since it was dialled
        connected_at: float | None  # Unix time; None while not up
        last_error: str  # why it last went down or could not be dialled, or ""

    class ForwardStatus(TypedDict):
        """One listening forward."""

        id: int  # counts up from 1 for the life of the daemon
        sandbox: str
        address: str  # local address it listens on
        port: int  # local port
        remote_port: int  # port inside the sandbox
        connections: int  # open now

    class LocalStatus(TypedDict):
        """The embedded sandbox service."""

        endpoint: str  # URL, or "" when it does not run
        pid: int | None
        state: str  # "running", "starting" or "stopped"

    class Status(TypedDict):
        """GET /v1/status."""

        version: str
        pid: int
        started_at: float  # Unix time
        uptime_seconds: float
        profile: str  # the profile used when a request names none
        endpoint: str  # its endpoint; "" for a local service that does not run
        runtime_dir: str
        log_file: str  # where a daemon started by the command logs
        links: list[LinkStatus]
        forwards: list[ForwardStatus]
        local: LocalStatus

    class SandboxStatus(TypedDict):
        """GET /v1/sandboxes/NAME/status. Neither starts the sandbox nor anything in it."""

        status: str  # as the service says it
        status_message: str | None
        ssh: str | None  # what carries ssh, "guest" or "text"; None until that is known. That it is "sshd", only a client knows
        link: LinkStatus | None  # None: nothing has connected to it lately

    class SshHost(TypedDict):
        """GET /v1/ssh: what a client must know in order to pin the gateway."""

        host_key: str  # public key, "TYPE BASE64"


VERSION = "0.1.0"  # of the daemon and the command, which are installed together


class ErrorKind:
    """Why something failed; decides the exit code of the command and the status of an HTTP answer."""

    USAGE = "usage"  # the request itself makes no sense
    FAILED = "failed"  # it was tried and went wrong
    INVALID = "invalid"  # the service refused a value
    NOT_FOUND = "not_found"  # no such sandbox
    UNAVAILABLE = "unavailable"  # service, daemon or link cannot be reached: trying again may help
    STOPPED = "stopped"  # the sandbox does not run, and was not to be started: trying again is of no use
    INTERNAL = "internal"  # a defect of this program
    CONFLICT = "conflict"  # a name is taken, a thing is in use
    PORT_IN_USE = "port_in_use"  # the local port is taken
    TIMEOUT = "timeout"  # it did not happen in time
    REFUSED = "refused"  # nothing listens on that port inside the sandbox
    AUTH = "auth"  # the service refuses the key
    CONFIG = "config"  # configuration file, key file or permissions
    UNSUPPORTED = "unsupported"  # this sandbox or service cannot do it
    INTERRUPTED = "interrupted"  # the user stopped it


# Exit codes follow sysexits.h where one fits.
EXIT_CODES: dict[str, int] = {
    ErrorKind.FAILED: 1,
    ErrorKind.USAGE: 2,
    ErrorKind.INVALID: 65,  # EX_DATAERR
    ErrorKind.NOT_FOUND: 68,  # EX_NOHOST
    ErrorKind.UNAVAILABLE: 69,  # EX_UNAVAILABLE
    ErrorKind.STOPPED: 69,
    ErrorKind.UNSUPPORTED: 69,
    ErrorKind.INTERNAL: 70,  # EX_SOFTWARE
    ErrorKind.CONFLICT: 73,  # EX_CANTCREAT
    ErrorKind.PORT_IN_USE: 73,
    ErrorKind.TIMEOUT: 75,  # EX_TEMPFAIL
    ErrorKind.REFUSED: 76,  # EX_PROTOCOL
    ErrorKind.AUTH: 77,  # EX_NOPERM
    ErrorKind.CONFIG: 78,  # EX_CONFIG
    ErrorKind.INTERRUPTED: 130,  # 128 + SIGINT
}

HTTP_STATUS: dict[str, int] = {
    ErrorKind.USAGE: 400,
    ErrorKind.FAILED: 500,
    ErrorKind.INVALID: 422,
    ErrorKind.NOT_FOUND: 404,
    ErrorKind.UNAVAILABLE: 503,
    ErrorKind.STOPPED: 409,
    ErrorKind.INTERNAL: 500,
    ErrorKind.CONFLICT: 409,
    ErrorKind.PORT_IN_USE: 409,
    ErrorKind.TIMEOUT: 504,
    ErrorKind.REFUSED: 502,
    ErrorKind.AUTH: 403,
    ErrorKind.CONFIG: 500,
    ErrorKind.UNSUPPORTED: 501,
    ErrorKind.INTERRUPTED: 499,
}

# --- files -----------------------------------------------------------------------------------------------

CONTROL_SOCKET = "control.sock"  # in the runtime directory, like the next three
CONNECT_SOCKET = "connect.sock"
DAEMON_LOCK = "daemon.lock"  # flock held, with the pid inside, while the daemon runs
START_LOCK = "start.lock"  # flock held by whoever is starting the daemon
DAEMON_LOG = "daemon.log"  # in the state directory, like the next two
LOCAL_LOG = "local.log"
LOCAL_DIR = "local"  # the embedded service's own state directory


def _own_dir(path: str) -> bool:
    """Whether `path` is an existing directory of this user: a directory inherited through su or sudo is not."""
    if not os.path.isabs(path):
        return False
    try:
        return os.stat(path).st_uid == os.getuid() and os.path.isdir(path)
    except OSError:
        return False


def state_dir(environ: Mapping[str, str] | None = None) -> str:
    """Where logs and the embedded service's state live; not created here.

    ``$GATEWAYD_STATE_DIR``, else ``$XDG_STATE_HOME/gatewayd``, else ``~/.local/state/gatewayd``.
    """
    env = os.environ if environ is None else environ
    if own := env.get("GATEWAYD_STATE_DIR"):
        return os.path.abspath(own)
    xdg = env.get("XDG_STATE_HOME", "")
    if not os.path.isabs(xdg):  # the XDG specification: relative paths are to be ignored
        xdg = os.path.join(env.get("HOME") or os.path.expanduser("~"), ".local", "state")
    return os.path.join(xdg, "gatewayd")


def runtime_dir(environ: Mapping[str, str] | None = None) -> str:
    """Where the sockets live; not created here.

    ``$GATEWAYD_RUNTIME_DIR``, else ``$XDG_RUNTIME_DIR/gatewayd``, else ``/run/user/UID/gatewayd`` — the latter two only where the
    parent exists and is this user's own — else ``run`` in the state directory.
    """
    env = os.environ if environ is None else environ
    if own := env.get("GATEWAYD_RUNTIME_DIR"):
        return os.path.abspath(own)
    for parent in (env.get("XDG_RUNTIME_DIR", ""), f"/run/user/{os.getuid()}"):
        if _own_dir(parent):
            return os.path.join(parent, "gatewayd")
    return os.path.join(state_dir(environ), "run")


def control_socket() -> str:
    """Path of control.sock."""
    return os.path.join(runtime_dir(), CONTROL_SOCKET)


def connect_socket() -> str:
    """Path of connect.sock."""
    return os.path.join(runtime_dir(), CONNECT_SOCKET)


# --- who is asking ---------------------------------------------------------------------------------------

PROFILE_LOCAL = "local"  # built in: the embedded service
PROFILE_ENV = "env"  # built in: LANGSMITH_API_KEY and its companions

HEADER_PROFILE = "X-Gatewayd-Profile"
HEADER_ENDPOINT = "X-Gatewayd-Endpoint"
HEADER_API_KEY = "X-Gatewayd-Api-Key"
HEADER_WORKSPACE = "X-Gatewayd-Workspace"

FIELD_PROFILE = "profile"  # the same, as fields of a connect.sock request
FIELD_ENDPOINT = "endpoint"
FIELD_API_KEY = "api_key"
FIELD_WORKSPACE = "workspace"


def caller_fields(profile: str | None = None, environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """The profile and credential fields of a connect.sock request, from the caller's environment.

    Args:
        profile: the profile named on the command line; else ``$GATEWAYD_PROFILE``.

    A named profile goes alone, unless it is ``env``; without one, the credentials of the environment go along if there are any.
    """
    env = os.environ if environ is None else environ
    name = profile or env.get("GATEWAYD_PROFILE") or ""
    fields = {FIELD_PROFILE: name} if name else {}
    key = env.get("LANGSMITH_API_KEY", "").strip()
    if key and name in ("", PROFILE_ENV):
        fields[FIELD_API_KEY] = key
        for field, variable in ((FIELD_ENDPOINT, "LANGSMITH_ENDPOINT"), (FIELD_WORKSPACE, "LANGSMITH_WORKSPACE_ID")):
            if value := env.get(variable, "").strip():
                fields[field] = value
    return fields


def caller_headers(profile: str | None = None, environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """The same as headers of a control.sock request."""
    names = {
        FIELD_PROFILE: HEADER_PROFILE,
        FIELD_ENDPOINT: HEADER_ENDPOINT,
        FIELD_API_KEY: HEADER_API_KEY,
        FIELD_WORKSPACE: HEADER_WORKSPACE,
    }
    return {names[field]: value for field, value in caller_fields(profile, environ).items()}


# --- connect.sock ----------------------------------------------------------------------------------------

OP_CONNECT = "connect"  # {port}: afterwards the bytes of that TCP connection
OP_SSH = "ssh"  # {}: the same to the sandbox's sshd, which is started if need be
OP_FORWARD = "forward"  # {remote_port, local_port, address}: listens for as long as the connection lives; JSON events follow
OP_GUEST = "guest"  # {session, mode, received, guest}: a session with the sandbox's guest; frames follow (docs/guest-protocol.md)
OP_EXEC = "exec"  # {command | argv, env, cwd, shell, timeout, pty, cols, rows, close_stdin}: frames follow, both ways

# Optional fields of ssh, and (wake) of everything that connects.
FIELD_WAKE = "wake"  # bool: whether a stopped sandbox is started; without it as `start_on_connect` of the configuration says
FIELD_DIRECT = "direct"  # bool: the sandbox's own sshd instead of the gateway's

SSH_PREFIX = "sandbox-"  # of a host name for ssh: the sandbox's name follows
SSH_USER = "sandbox"  # login name that stands for the image's own user

LINE_MAX = 65536  # bytes of a request or reply line, newline included
LINE_DEADLINE = 10.0  # seconds a client has for its request line


def encode_line(message: Mapping[str, Any]) -> bytes:
    """One JSON line, newline included.

    Raises:
        ValueError: it would be longer than LINE_MAX.
    """
    import json

    line = json.dumps(message, separators=(",", ":"), ensure_ascii=True).encode() + b"\n"
    if len(line) > LINE_MAX:
        raise ValueError(f"line of {len(line)} bytes, the limit is {LINE_MAX}")
    return line


def decode_line(line: bytes) -> dict[str, Any]:
    """One JSON line as a dictionary.

    Raises:
        ValueError: not JSON, or not an object.
    """
    import json

    try:
        message = json.loads(line)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(message, dict):
        raise ValueError("not a JSON object")  # noqa: TRY004 - it is the content that is wrong
    return message


def error_body(kind: str, message: str, hint: str = "") -> dict[str, ErrorBody]:
    """The error object of every answer; an unknown kind becomes ``internal``."""
    return {"error": {"kind": kind if kind in EXIT_CODES else ErrorKind.INTERNAL, "message": message, "hint": hint}}


# --- frames of `exec`: 1 byte type, 4 bytes length (big-endian), payload ---------------------------------


class Frame:
    """Frame types."""

    STDIN = 0  # to the command
    STDOUT = 1  # from the command
    STDERR = 2  # from the command
    EXIT = 3  # {"exit_code": N}; the last frame of a command that ended
    RESIZE = 4  # {"cols": N, "rows": N}
    SIGNAL = 5  # {"signal": "INT"}; on a terminal INT and QUIT are typed, everything else ends the command with SIGKILL
    STDIN_EOF = 6  # empty: no more input
    ERROR = 7  # an ErrorBody; the last frame of a command that could not go on


FRAME_TYPES = range(8)
FRAME_HEADER = 5  # bytes
FRAME_MAX = 1 << 20  # bytes of payload


class FrameError(ValueError):
    """The peer sent bytes that are no frame."""


def encode_frame(kind: int, payload: bytes = b"") -> bytes:
    """One frame.

    Raises:
        FrameError: an unknown type, or more than FRAME_MAX bytes.
    """
    if kind not in FRAME_TYPES:
        raise FrameError(f"unknown frame type {kind}")
    if len(payload) > FRAME_MAX:
        raise FrameError(f"frame of {len(payload)} bytes, the limit is {FRAME_MAX}")
    return bytes((kind,)) + len(payload).to_bytes(4, "big") + payload


def encode_json_frame(kind: int, message: Mapping[str, Any]) -> bytes:
    """One frame whose payload is JSON."""
    import json

    return encode_frame(kind, json.dumps(message, separators=(",", ":")).encode())


class FrameDecoder:
    """Bytes in, frames out; holds at most one incomplete frame."""

    def __init__(self) -> None:
        self._buffer = bytearray()  # the beginning of a frame that is not complete

    def feed(self, data: bytes) -> list[tuple[int, bytes]]:
        """Every frame that `data` completes, as (type, payload).

        Raises:
            FrameError: an unknown type or an oversized length. The decoder is of no use afterwards.
        """
        buffer = self._buffer
        buffer += data
        frames: list[tuple[int, bytes]] = []
        start = 0
        while len(buffer) - start >= FRAME_HEADER:
            kind = buffer[start]
            length = int.from_bytes(buffer[start + 1 : start + FRAME_HEADER], "big")
            if kind not in FRAME_TYPES:
                raise FrameError(f"unknown frame type {kind}")
            if length > FRAME_MAX:
                raise FrameError(f"frame of {length} bytes, the limit is {FRAME_MAX}")
            end = start + FRAME_HEADER + length
            if len(buffer) < end:
                break
            frames.append((kind, bytes(buffer[start + FRAME_HEADER : end])))
            start = end
        del buffer[:start]
        return frames

    @property
    def pending(self) -> int:
        """Bytes of an incomplete frame; not 0 at the end of the stream means the peer was cut off."""
        return len(self._buffer)

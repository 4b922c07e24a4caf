"""From what went wrong on the way to the service to one sentence a user can act on. Pure: no I/O, no third-party names."""

from __future__ import annotations

import json
import math
import socket
import ssl
from typing import TypeVar
from urllib.parse import urlsplit

from gatewayd.api import PROFILE_ENV, PROFILE_LOCAL, ErrorKind
from gatewayd.config import Profile
from gatewayd.errors import GatewayError, ServiceRefused, printable

TRANSIENT = frozenset({429, 500, 502, 503, 504})  # statuses of an upgrade worth another try (protocol: /execute/ws)
E = TypeVar("E", bound=BaseException)
BODY_MAX = 65536  # bytes of an error body that are looked at


def connection_failure(exc: BaseException, *, action: str, url: str, profile: Profile) -> GatewayError:
    """No answer at all: refused, unknown host, TLS, timeout.

    Args:
        action: what was being done, as in "cannot ACTION: …".
        url: where to; only scheme, host and port are shown.
    """
    where = origin(url)
    hint = "check the network"
    if profile.name == PROFILE_LOCAL:
        hint = "see `sandbox status` and the service's local.log"
    chain = _chain(exc)
    kind = ErrorKind.UNAVAILABLE
    if untrusted := _first(chain, ssl.SSLCertVerificationError):
        reason = getattr(untrusted, "verify_message", "") or untrusted
        cause = f"{where} shows a certificate that cannot be verified: {printable(reason, 200)}"
        hint = "name your company's CA in the profile's ca_file"
    elif tls := _first(chain, ssl.SSLError):
        cause = f"{where} does not speak TLS as expected: {printable(getattr(tls, 'reason', '') or tls, 200)}"
        hint = "check the endpoint's scheme and port"
    elif _first(chain, socket.gaierror):
        cause = f"unknown host {urlsplit(url).hostname}"
        hint = "check the endpoint and the network's name resolution"
    elif _first(chain, ConnectionRefusedError):
        cause = f"{where} refuses connections"
    elif _first(chain, TimeoutError):
        cause = f"{where} does not answer in time"
        kind = ErrorKind.TIMEOUT
    elif _first(chain, ConnectionError) or _first(chain, EOFError):
        cause = f"{where} closed the connection"
    elif failed := _first(chain, OSError):
        cause = f"{where}: {printable(failed.strerror or failed, 200) or type(failed).__name__}"
    else:
        cause = f"{where}: {printable(exc, 200) or type(exc).__name__}"
    return GatewayError(f"cannot {action}: {cause}", kind=kind, hint=hint)


def refusal(
    status: int,
    body: bytes,
    *,
    action: str,
    url: str,
    profile: Profile,
    sandbox: str = "",
    retry_after: str = "",
    location: str = "",
) -> ServiceRefused:
    """The service answered with an error status; `body` is its JSON envelope, or anything else."""
    where = origin(url)
    error_type, detail = parse_envelope(body)
    because = f": {detail}" if detail else ""
    kind, hint = ErrorKind.FAILED, ""
    cause = f"HTTP {status} from {where}{because}"
    if 300 <= status < 400:
        kind = ErrorKind.CONFIG
        cause = f"{where} redirects to {printable(location, 200) or 'elsewhere'}"
        hint = "set the profile's endpoint to the final URL"
    elif status == 401 or (status == 403 and not detail):
        kind = ErrorKind.AUTH
        cause = f"{where} refuses the API key (HTTP {status})"
        hint = key_hint(profile)
    elif status == 403:
        kind = ErrorKind.AUTH
        cause = f"{where} does not allow it (HTTP 403){because}"
        hint = key_hint(profile)
    elif status == 404 and sandbox:
        kind = ErrorKind.NOT_FOUND
        cause = f"no sandbox named {sandbox!r} (profile {profile.name})"
    elif status == 404:
        kind = ErrorKind.UNAVAILABLE
        cause = f"{where} has no sandbox service at this address (HTTP 404)"
        hint = "check the profile's endpoint"
    elif status in (408, 504):
        kind = ErrorKind.TIMEOUT
        cause = detail or cause
    elif status == 409:
        kind = ErrorKind.CONFLICT
        cause = detail or cause
    elif status == 429:
        kind = ErrorKind.UNAVAILABLE
        cause = f"{where} limits the rate or the quota (HTTP 429){because}"
        hint = "try again later, or delete sandboxes"
    elif (status == 400 and error_type == "NotReady") or status >= 500:
        kind = ErrorKind.UNAVAILABLE
        hint = "try again; `sandbox get` shows the sandbox's state" if sandbox else "try again later"
    elif status in (400, 413, 416, 422):
        kind = ErrorKind.INVALID
        cause = detail or cause
    return ServiceRefused(
        f"cannot {action}: {cause}", kind=kind, hint=hint, status=status, retry_after=parse_retry_after(retry_after)
    )


def key_hint(profile: Profile) -> str:
    """Where the key that was refused comes from."""
    if profile.name == PROFILE_ENV:
        return "check LANGSMITH_API_KEY (and LANGSMITH_ENDPOINT, LANGSMITH_WORKSPACE_ID)"
    if profile.name == PROFILE_LOCAL:
        return "another service may have taken its port: `sandbox down`, then `sandbox up`"
    return f"check the key of profile {profile.name!r} in the configuration file"


def parse_envelope(body: bytes) -> tuple[str, str]:
    """Type and message of an error body (protocol: errors); empty strings where it is something else."""
    try:
        data = json.loads(body[:BODY_MAX])
    except (ValueError, RecursionError):
        return "", ""
    detail = data.get("detail") if isinstance(data, dict) else None
    if isinstance(detail, str):
        return "", printable(detail)
    if isinstance(detail, list):
        return "", "; ".join(_validation_message(item) for item in detail[:5] if isinstance(item, dict))
    if not isinstance(detail, dict):
        return "", ""
    message = printable(detail.get("message") or "")
    if error_id := detail.get("error_id"):
        message += f" (error_id {printable(error_id, 64)})"
    return printable(detail.get("error") or "", 64), message


def parse_retry_after(value: str) -> float | None:
    """Seconds of a Retry-After header; None for a date or nonsense."""
    try:
        seconds = float(value)
    except ValueError:
        return None
    return seconds if math.isfinite(seconds) and seconds >= 0 else None


def origin(url: str) -> str:
    """Scheme, host and port of a URL: never its path or user."""
    parts = urlsplit(url)
    host = parts.hostname or "?"
    if ":" in host:
        host = f"[{host}]"
    return f"{parts.scheme}://{host}" + (f":{parts.port}" if parts.port else "")


def _validation_message(item: dict[str, object]) -> str:
    """One entry of a 422 list: the field and what is wrong with it."""
    loc = item.get("loc")
    field = ".".join(printable(part, 64) for part in loc if part != "body") if isinstance(loc, list) else ""
    message = printable(item.get("msg") or "invalid value", 200)
    return f"{field}: {message}" if field else message


def _chain(exc: BaseException) -> list[BaseException]:
    """`exc` and what caused it, outermost first, groups flattened."""
    found: list[BaseException] = []
    queue: list[BaseException] = [exc]
    while queue and len(found) < 32:
        current = queue.pop(0)
        if current in found:
            continue
        found.append(current)
        if isinstance(current, BaseExceptionGroup):
            queue.extend(current.exceptions)
        if (inner := current.__cause__ or current.__context__) is not None:
            queue.append(inner)
    return found


def _first(chain: list[BaseException], kind: type[E]) -> E | None:
    return next((exc for exc in chain if isinstance(exc, kind)), None)

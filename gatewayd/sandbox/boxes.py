"""Sandboxes as the service describes them: where their data plane is, what state they are in."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from gatewayd.api import ErrorKind
from gatewayd.config import Profile, is_loopback
from gatewayd.errors import GatewayError, printable
from gatewayd.sandbox.accounts import Account
from gatewayd.sandbox.rest_client import RestClient

PLACE_MAX_AGE = 60.0  # seconds a looked-up address is used for new connections without asking again
PLACES_MAX = 1024
POLL_FIRST, POLL_MAX = 0.1, 2.0  # seconds between polls of a status: short at first, then longer
READY_TIMEOUT = 120.0  # seconds a connection waits for a sandbox that is being made
PAGE = 100  # sandboxes asked for at a time
LIST_MAX = 10_000  # sandboxes in one answer

Notice = Callable[[str], None]  # tells the user what is going on


@dataclass(frozen=True)
class Place:
    """Where the data plane of a sandbox was at the time it was looked up."""

    profile: Profile  # whose key goes there
    url: str  # http or https, without a trailing slash

    def websocket(self, path: str) -> str:
        """The ws or wss URL of `path` (protocol: section 2)."""
        return "ws" + self.url.removeprefix("http") + path


class Directory:
    """Finds the data plane of a sandbox by name, and remembers it for a while."""

    def __init__(self) -> None:
        self._places: OrderedDict[tuple[Hashable, str], tuple[float, Place]] = OrderedDict()  # monotonic time of the look-up

    async def locate(self, account: Account, sandbox: str, notice: Notice | None = None) -> tuple[Place, bool]:
        """The place, and whether it was remembered (so that it may be out of date).

        A sandbox that is being made is waited for. Raises GatewayError.
        """
        profile = await account.access.current()
        known = self._places.get((account.key, sandbox))
        if known is not None and known[1].profile == profile and time.monotonic() - known[0] < PLACE_MAX_AGE:
            return known[1], True
        box = await account.rest.get(sandbox)
        if box.get("status") == "provisioning":
            if notice is not None:
                notice(f"waiting for sandbox {sandbox!r} to become ready")
            box = await wait_for(account.rest, sandbox, "ready", READY_TIMEOUT)
        if box.get("status") in ("failed", "deleting"):
            raise _wrong_state(sandbox, box)
        place = Place(profile, data_plane(box, profile, sandbox))
        self._places[account.key, sandbox] = (time.monotonic(), place)
        self._places.move_to_end((account.key, sandbox))
        if len(self._places) > PLACES_MAX:
            self._places.popitem(last=False)
        return place, False

    def forget(self, account: Account, sandbox: str) -> None:
        """Look it up again next time."""
        self._places.pop((account.key, sandbox), None)


async def require_running(rest: RestClient, sandbox: str) -> None:
    """Ask for the status, which starts nothing.

    Raises:
        GatewayError: kind stopped; failed, when it will not run any more; or why the status is not known.
    """
    answer = await rest.status(sandbox)
    status = answer.get("status")
    if status in ("failed", "deleting"):
        raise _wrong_state(sandbox, answer)
    if status not in ("ready", "provisioning"):
        raise GatewayError(
            f"sandbox {sandbox!r} is {printable(status, 32)}",
            kind=ErrorKind.STOPPED,
            hint=f"`sandbox start {sandbox}` starts it",
        )


def data_plane(box: dict[str, Any], profile: Profile, sandbox: str) -> str:
    """The checked ``dataplane_url`` of a sandbox. Raises GatewayError."""
    what = f"cannot reach sandbox {sandbox!r}"
    url = box.get("dataplane_url")
    if not isinstance(url, str) or not url:
        raise GatewayError(f"{what}: the service names no data plane for it", kind=ErrorKind.UNSUPPORTED)
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.username is None and parts.port != 0
    except ValueError:
        usable = False
    if not usable or not url.isascii() or not url.isprintable() or len(url) > 2048:
        raise GatewayError(f"{what}: the service names an unusable data plane", kind=ErrorKind.UNAVAILABLE)
    if parts.scheme == "http" and profile.endpoint.startswith("https://") and not is_loopback(parts.hostname or ""):
        raise GatewayError(
            f"{what}: its data plane is plain http, the API key would travel in the clear", kind=ErrorKind.UNSUPPORTED
        )
    return url.rstrip("/")


async def wait_for(rest: RestClient, sandbox: str, wanted: str, timeout: float) -> dict[str, Any]:
    """Poll until the status is `wanted` ("ready" or "stopped") and return the sandbox.

    Raises:
        GatewayError: kind timeout; or failed, when it reached a state it does not leave.
    """
    deadline = time.monotonic() + timeout
    delay = POLL_FIRST
    while True:
        answer = await rest.status(sandbox)
        status = answer.get("status")
        if status == wanted:
            return await rest.get(sandbox)
        if status in ("failed", "deleting"):
            raise _wrong_state(sandbox, answer)
        remaining = deadline - time.monotonic()
        if remaining <= 0:
            raise GatewayError(
                f"sandbox {sandbox!r} is still {printable(status, 32)} after {timeout:g} s",
                kind=ErrorKind.TIMEOUT,
                hint=f"`sandbox wait {sandbox}` waits on",
            )
        await asyncio.sleep(min(delay, remaining))
        delay = min(delay * 1.5, POLL_MAX)


async def list_boxes(rest: RestClient, filters: dict[str, str | int], limit: int, offset: int) -> list[dict[str, Any]]:
    """Up to `limit` sandboxes from `offset` on, page by page."""
    found: list[dict[str, Any]] = []
    limit = min(limit, LIST_MAX)
    while len(found) < limit:
        size = min(PAGE, limit - len(found))
        page = await rest.list({**filters, "limit": size, "offset": offset + len(found)})
        boxes = page.get("sandboxes")
        if not isinstance(boxes, list) or not all(isinstance(box, dict) for box in boxes):
            raise GatewayError(
                "cannot list sandboxes: the answer is not what a sandbox service sends", kind=ErrorKind.UNAVAILABLE
            )
        fresh = boxes[: limit - len(found)]
        found.extend(fresh)
        if len(boxes) < size:
            break
    return found


def _wrong_state(sandbox: str, box: dict[str, Any]) -> GatewayError:
    status = printable(box.get("status"), 32)
    message = printable(box.get("status_message") or "", 300)
    because = f": {message}" if message else ""
    return GatewayError(
        f"sandbox {sandbox!r} is {status}{because}", kind=ErrorKind.FAILED, hint=f"`sandbox get {sandbox}` shows it"
    )

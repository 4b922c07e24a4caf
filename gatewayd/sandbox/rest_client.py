"""The service's REST interface over warm connections: protocol sections 1 (control plane) and 2 (/execute)."""

from __future__ import annotations

import asyncio
import json
import logging
import random
import ssl
import time
from collections.abc import Mapping
from typing import Any, Protocol
from urllib.parse import quote

import httpx2

from gatewayd.api import VERSION, ErrorKind
from gatewayd.config import Profile, Proxies, tls_context
from gatewayd.errors import GatewayError, ServiceRefused
from gatewayd.sandbox.failures import connection_failure, refusal

log = logging.getLogger(__name__)

BOXES = "/v2/sandboxes/boxes"
RETRIES = 3
BACKOFF_BASE = 0.5  # seconds before the first retry, doubled for each one after
BACKOFF_MAX = 8.0
RETRY_AFTER_MAX = 30.0  # a service that asks for more gets its error passed on
RETRIED = frozenset({502, 503, 504})
ANSWER_MAX = 32 << 20  # bytes of one answer
CONNECT_TIMEOUT = 10.0
PATIENCE = 3.0  # seconds without an answer after which a warm connection may be dead: a small question is asked on a new one

# Nothing of a request that failed like this has reached the service.
_UNSENT = (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.PoolTimeout)


class Access(Protocol):
    """Where the service of one profile is at this moment."""

    name: str  # of the profile

    async def current(self) -> Profile:
        """The profile to use now; starts the embedded service if it is the one meant. Raises GatewayError."""


class FixedAccess:
    """A service whose profile does not change."""

    def __init__(self, profile: Profile) -> None:
        self.name = profile.name
        self._profile = profile

    async def current(self) -> Profile:
        """The profile."""
        return self._profile


KEPT = 60.0  # seconds without an answer, this machine's sleep included, after which warm connections are left
KEPT_FOR_ONCE = 5.0  # likewise for a request that must not be sent twice: it cannot be tried out


class _Warm:
    """Warm connections, and who uses them."""

    def __init__(self, client: httpx2.AsyncClient) -> None:
        self.client = client
        self.busy = 0  # requests under way
        self.retired = False  # closed with the last of them
        self.answered = _boot_time()  # when the last answer came


class RestClient:
    """Requests to one profile's service; every error is a `GatewayError`. Close it with `aclose`."""

    def __init__(self, access: Access, proxies: Proxies, *, retries: int = RETRIES) -> None:
        self._access = access  # asked before every attempt: the embedded service may have moved
        self._proxies = proxies
        self._retries = retries  # after the first attempt
        self._clients: dict[tuple[str | None, bool, str], _Warm] = {}  # (proxy, TLS, ca_file) → warm connections

    async def create(self, body: Mapping[str, Any], *, deadline: float = 60.0) -> dict[str, Any]:
        """POST /boxes; never sent twice, since a lost answer may have created the sandbox."""
        name = body.get("name")
        action = f"create sandbox {name!r}" if name else "create a sandbox"
        return _object(await self.call("POST", BOXES, action=action, body=body, deadline=deadline), action)

    async def get(self, name: str) -> dict[str, Any]:
        """GET /boxes/{name}."""
        action = f"get sandbox {name!r}"
        return _object(await self.call("GET", box_path(name), action=action, sandbox=name, patience=PATIENCE), action)

    async def status(self, name: str) -> dict[str, Any]:
        """GET /boxes/{name}/status: the cheap one, to poll."""
        action = f"get the status of sandbox {name!r}"
        return _object(await self.call("GET", box_path(name, "status"), action=action, sandbox=name, patience=PATIENCE), action)

    async def list(self, params: Mapping[str, str | int]) -> dict[str, Any]:
        """GET /boxes: one page."""
        action = "list sandboxes"
        return _object(await self.call("GET", BOXES, action=action, params=params), action)

    async def update(self, name: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """PATCH /boxes/{name}."""
        action = f"change sandbox {name!r}"
        return _object(await self.call("PATCH", box_path(name), action=action, sandbox=name, body=body), action)

    async def delete(self, name: str) -> None:
        """DELETE /boxes/{name}."""
        await self.call("DELETE", box_path(name), action=f"delete sandbox {name!r}", sandbox=name, deadline=60.0)

    async def start(self, name: str) -> None:
        """POST /boxes/{name}/start; starting twice is starting once, so it is retried."""
        path = box_path(name, "start")
        await self.call("POST", path, action=f"start sandbox {name!r}", sandbox=name, body={}, retry=True, deadline=60.0)

    async def stop(self, name: str) -> None:
        """POST /boxes/{name}/stop; likewise."""
        path = box_path(name, "stop")
        await self.call("POST", path, action=f"stop sandbox {name!r}", sandbox=name, body={}, retry=True, deadline=60.0)

    async def execute(
        self, dataplane_url: str, body: Mapping[str, Any], *, action: str, sandbox: str, deadline: float
    ) -> dict[str, Any]:
        """POST /execute on the data plane; `body` must be safe to run twice: it is retried."""
        url = f"{dataplane_url.rstrip('/')}/execute"
        return _object(
            await self.call("POST", url, action=action, sandbox=sandbox, body=body, retry=True, deadline=deadline), action
        )

    async def upload(self, dataplane_url: str, path: str, content: bytes, *, action: str, sandbox: str, deadline: float) -> None:
        """POST /upload on the data plane: a small file, whole; retried, since writing it twice is writing it once."""
        url = f"{dataplane_url.rstrip('/')}/upload"
        await self.call(
            "POST", url, action=action, sandbox=sandbox, file=content, params={"path": path}, retry=True, deadline=deadline
        )

    async def call(
        self,
        method: str,
        path: str,
        *,
        action: str,
        sandbox: str = "",
        body: Mapping[str, Any] | None = None,
        file: bytes | None = None,
        params: Mapping[str, str | int] | None = None,
        retry: bool | None = None,
        deadline: float = 30.0,
        patience: float | None = None,
    ) -> Any:
        """One request, retried where that is safe, and its JSON answer (None for an empty one).

        Args:
            path: below the endpoint, or a whole URL.
            action: as in "cannot ACTION: …".
            sandbox: its name, if a 404 means that there is none.
            file: sent as multipart/form-data, part ``file``, instead of a JSON body.
            retry: whether the request may be sent twice; None: GET and DELETE may.
            deadline: seconds for everything, retries included.
            patience: seconds after which a request without an answer is made again, on a new connection: the one at hand may
                have died unnoticed, while this machine slept, say. The last retry is waited for. None: so is the first request.

        Raises:
            GatewayError: whatever went wrong.
        """
        repeatable = method in ("GET", "DELETE") if retry is None else retry
        profile = await self._access.current()
        try:
            async with asyncio.timeout(deadline):
                await self._leave_stale(path, profile, KEPT if repeatable else KEPT_FOR_ONCE)
                for attempt in range(self._retries + 1):
                    if attempt:
                        profile = await self._access.current()
                    url = path if path.startswith(("http://", "https://")) else profile.endpoint + path
                    try:
                        async with asyncio.timeout(patience if attempt < self._retries else None):
                            return await self._attempt(method, url, profile, action, sandbox, body, file, params)
                    except TimeoutError:
                        await self._retire(url, profile)
                        log.info("%s: no answer for %g s, asking again on a new connection", action, patience)
                        continue
                    except ServiceRefused as exc:
                        delay = _delay_after(exc, attempt, repeatable)
                        if attempt and method == "DELETE" and exc.status == 404:
                            return None  # the attempt whose answer was lost has done it
                        if attempt == self._retries or delay is None:
                            raise
                        log.debug("%s: HTTP %d, trying again in %.1f s", action, exc.status, delay)
                    except httpx2.TransportError as exc:
                        failure = _transport_failure(exc, action, url, profile)
                        timed_out = isinstance(exc, httpx2.TimeoutException) and not isinstance(exc, _UNSENT)
                        if attempt == self._retries or timed_out or not (repeatable or isinstance(exc, _UNSENT)):
                            raise failure from exc
                        delay = backoff(attempt)
                        log.debug("%s; trying again in %.1f s", failure.message, delay)
                    await asyncio.sleep(delay)
        except TimeoutError as exc:
            raise connection_failure(exc, action=action, url=profile.endpoint, profile=profile) from exc
        raise AssertionError("the loop above returns or raises")

    async def _attempt(
        self,
        method: str,
        url: str,
        profile: Profile,
        action: str,
        sandbox: str,
        body: Mapping[str, Any] | None,
        file: bytes | None,
        params: Mapping[str, str | int] | None,
    ) -> Any:
        """Raises ServiceRefused, GatewayError or httpx2.TransportError."""
        warm = self._warm(url, profile)
        files = {"file": ("file", file)} if file is not None else None
        headers = profile.headers()
        warm.busy += 1
        try:
            async with warm.client.stream(method, url, json=body, files=files, params=params, headers=headers) as response:
                content = await _read(response, action)
        except httpx2.InvalidURL as exc:
            raise GatewayError(f"cannot {action}: the service names an invalid URL", kind=ErrorKind.UNAVAILABLE) from exc
        except httpx2.DecodingError as exc:
            raise GatewayError(f"cannot {action}: the answer cannot be decoded", kind=ErrorKind.UNAVAILABLE) from exc
        finally:
            warm.busy -= 1
            await _close_retired(warm)
        warm.answered = _boot_time()
        if not response.is_success:
            raise refusal(
                response.status_code,
                content,
                action=action,
                url=url,
                profile=profile,
                sandbox=sandbox,
                retry_after=response.headers.get("retry-after", ""),
                location=response.headers.get("location", ""),
            )
        if not content:
            return None
        try:
            return json.loads(content)
        except (ValueError, RecursionError) as exc:
            raise _not_json(action) from exc

    def _key(self, url: str, profile: Profile) -> tuple[str | None, bool, str]:
        return self._proxies.for_url(url), url.startswith("https://"), profile.ca_file

    def _warm(self, url: str, profile: Profile) -> _Warm:
        key = self._key(url, profile)
        warm = self._clients.get(key)
        if warm is None:
            # A context without authorities costs nothing and trusts nobody: plain HTTP needs no more.
            context = tls_context(profile.ca_file) if key[1] else ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            client = httpx2.AsyncClient(
                verify=context,
                proxy=key[0],
                trust_env=False,
                timeout=httpx2.Timeout(None, connect=CONNECT_TIMEOUT, pool=CONNECT_TIMEOUT),  # `call` has the deadline
                limits=httpx2.Limits(max_connections=32, max_keepalive_connections=8, keepalive_expiry=KEPT),
                headers={"User-Agent": f"gatewayd/{VERSION}"},
            )
            warm = self._clients[key] = _Warm(client)
        return warm

    async def _leave_stale(self, path: str, profile: Profile, age: float) -> None:
        url = path if path.startswith(("http://", "https://")) else profile.endpoint
        warm = self._clients.get(self._key(url, profile))
        if warm is not None and _boot_time() - warm.answered > age:
            await self._retire(url, profile)

    async def _retire(self, url: str, profile: Profile) -> None:
        """Make new connections from now on; those in use end with their requests."""
        if (warm := self._clients.pop(self._key(url, profile), None)) is not None:
            warm.retired = True
            await _close_retired(warm)

    async def aclose(self) -> None:
        """Close the warm connections; idempotent."""
        clients, self._clients = list(self._clients.values()), {}
        for warm in clients:
            await warm.client.aclose()


def _boot_time() -> float:
    """Seconds; unlike the monotonic clock's, they pass while this machine sleeps."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


async def _close_retired(warm: _Warm) -> None:
    if warm.retired and not warm.busy:
        await warm.client.aclose()


def box_path(name: str, *more: str) -> str:
    """The path of a sandbox. Raises GatewayError (usage) for a name that can be none."""
    if not name or len(name) > 256 or name in (".", ".."):
        raise GatewayError(f"{name[:80]!r} is no sandbox name", kind=ErrorKind.USAGE)
    return "/".join((BOXES, quote(name, safe=""), *more))


def backoff(attempt: int, base: float = BACKOFF_BASE, ceiling: float = BACKOFF_MAX) -> float:
    """Seconds to wait before retry number `attempt` + 1: doubling, with jitter, never above the ceiling."""
    return min(ceiling, base * 2.0 ** min(attempt, 16)) * random.uniform(0.5, 1.0)  # noqa: S311 - jitter is no secret


def _delay_after(exc: ServiceRefused, attempt: int, repeatable: bool) -> float | None:
    """Seconds until the next attempt, or None when there must be none."""
    if exc.status == 429:  # the request was not carried out
        wanted = exc.retry_after if exc.retry_after is not None else backoff(attempt)
        return wanted if wanted <= RETRY_AFTER_MAX else None
    if exc.status not in RETRIED or not repeatable:
        return None
    return max(backoff(attempt), min(exc.retry_after or 0.0, RETRY_AFTER_MAX))


def _transport_failure(exc: httpx2.TransportError, action: str, url: str, profile: Profile) -> GatewayError:
    if isinstance(exc, httpx2.ProxyError):
        return GatewayError(
            f"cannot {action}: the HTTP proxy refuses the connection", kind=ErrorKind.UNAVAILABLE, hint="check HTTPS_PROXY"
        )
    cause: BaseException = TimeoutError() if isinstance(exc, httpx2.TimeoutException) else exc
    return connection_failure(cause, action=action, url=url, profile=profile)


async def _read(response: httpx2.Response, action: str) -> bytes:
    content = bytearray()
    async for chunk in response.aiter_bytes():
        content += chunk
        if len(content) > ANSWER_MAX:
            raise GatewayError(f"cannot {action}: the answer is larger than {ANSWER_MAX >> 20} MiB", kind=ErrorKind.UNAVAILABLE)
    return bytes(content)


def _object(answer: Any, action: str) -> dict[str, Any]:
    if not isinstance(answer, dict):
        raise _not_json(action)
    return answer


def _not_json(action: str) -> GatewayError:
    return GatewayError(
        f"cannot {action}: the answer is not what a sandbox service sends",
        kind=ErrorKind.UNAVAILABLE,
        hint="check the profile's endpoint",
    )

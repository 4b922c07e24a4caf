"""One WebSocket to a sandbox's ``/tunnel`` and the yamux session on it (protocol: /tunnel)."""

from __future__ import annotations

import asyncio
import logging
import ssl
import struct
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import (
    ConnectionClosed,
    ConnectionClosedOK,
    InvalidHandshake,
    InvalidProxy,
    InvalidProxyMessage,
    InvalidProxyStatus,
    InvalidStatus,
    InvalidURI,
    WebSocketException,
)

from gatewayd.api import VERSION, ErrorKind
from gatewayd.config import Profile, Proxies, tls_context
from gatewayd.errors import DialRefused, GatewayError, MuxClosed, printable
from gatewayd.sandbox.failures import connection_failure, refusal
from gatewayd.tasks import TaskOwner
from gatewayd.yamux.aio import Mux, MuxStream, SessionConfig

log = logging.getLogger(__name__)

OPEN_TIMEOUT = 30.0  # seconds for TCP, TLS and the upgrade; a stopped sandbox is started meanwhile
DIAL_TIMEOUT = 30.0  # seconds for the status byte of a new stream
PROBE_AFTER = 3.0  # seconds without a status after which the link itself is probed
PROBE_TIMEOUT = 5.0  # seconds for the answer to that probe; the keepalive would take far longer to notice
MESSAGE_MAX = 4 << 20  # bytes of one WebSocket message; message boundaries mean nothing
QUEUE_MAX = 16  # received messages waiting to be read
WRITE_LIMIT = 256 << 10  # bytes in the transport's buffer above which senders wait

CONNECT_VERSION = 1
STATUS_OK, STATUS_NOT_ALLOWED, STATUS_DIAL_FAILED, STATUS_BAD_VERSION = range(4)


class NoRedirect(connect):
    """`websockets.connect`, following no redirect: the key goes to the host it was meant for and nowhere else."""

    def process_redirect(self, exc: Exception) -> Exception | str:
        return exc


@dataclass(frozen=True)
class Target:
    """A WebSocket to be opened."""

    url: str  # ws:// or wss://
    profile: Profile  # whose key goes along
    sandbox: str  # its name, for messages
    what: str  # as in "cannot WHAT: …"
    proxies: Proxies = field(default_factory=Proxies)


async def open_websocket(
    target: Target, *, ping_interval: float | None = None, max_size: int = MESSAGE_MAX, close_timeout: float = 2.0
) -> ClientConnection:
    """Open a WebSocket without compression; what can go wrong is told as a `GatewayError` (`ServiceRefused` with a status)."""
    context: ssl.SSLContext | None = None
    if target.url.startswith("wss://"):
        context = tls_context(target.profile.ca_file)
    headers: Mapping[str, str] = target.profile.headers()
    try:
        return await NoRedirect(
            target.url,
            additional_headers=headers,
            user_agent_header=f"gatewayd/{VERSION}",
            compression=None,
            proxy=target.proxies.for_url(target.url),
            ssl=context,
            open_timeout=OPEN_TIMEOUT,
            ping_interval=ping_interval,
            close_timeout=close_timeout,
            max_size=max_size,
            max_queue=QUEUE_MAX,
            write_limit=WRITE_LIMIT,
        )
    except InvalidProxyStatus as exc:
        cause = f"the HTTP proxy answers {exc.response.status_code}"
        raise GatewayError(
            f"cannot {target.what}: {cause}", kind=ErrorKind.UNAVAILABLE, hint="check HTTPS_PROXY and NO_PROXY"
        ) from exc
    except (InvalidProxy, InvalidProxyMessage) as exc:
        cause = "the HTTP proxy does not work as one"
        raise GatewayError(f"cannot {target.what}: {cause}", kind=ErrorKind.UNAVAILABLE, hint="check HTTPS_PROXY") from exc
    except InvalidStatus as exc:
        response = exc.response
        raise refusal(
            response.status_code,
            bytes(response.body or b""),
            action=target.what,
            url=target.url,
            profile=target.profile,
            sandbox=target.sandbox,
            retry_after=response.headers.get("Retry-After", ""),
            location=response.headers.get("Location", ""),
        ) from exc
    except InvalidURI as exc:
        raise GatewayError(f"cannot {target.what}: the service names an invalid URL", kind=ErrorKind.UNAVAILABLE) from exc
    except InvalidHandshake as exc:
        cause = "the service does not answer with a WebSocket"
        raise GatewayError(
            f"cannot {target.what}: {cause}", kind=ErrorKind.UNAVAILABLE, hint="the sandbox may have stopped: try again"
        ) from exc
    except (OSError, EOFError, WebSocketException) as exc:
        raise connection_failure(exc, action=target.what, url=target.url, profile=target.profile) from exc


class WebSocketTransport:
    """A WebSocket as the `MessageTransport` of a `Mux`."""

    def __init__(self, websocket: ClientConnection) -> None:
        self.close_code = 0  # what the peer's close frame said; 0 before it and without one
        self._websocket = websocket

    async def send(self, data: bytes) -> None:
        """Returns when the transport's buffer is below its limit. Raises GatewayError."""
        try:
            await self._websocket.send(data)
        except ConnectionClosed as exc:
            raise _lost(exc) from exc

    async def recv(self) -> bytes:
        """One message. Raises EOFError at the orderly end, GatewayError otherwise."""
        try:
            data = await self._websocket.recv()
        except ConnectionClosedOK as exc:
            self._ended(exc)
            raise EOFError from exc
        except ConnectionClosed as exc:
            self._ended(exc)
            raise _lost(exc) from exc
        if isinstance(data, str):
            raise GatewayError("the service sent text on a tunnel", kind=ErrorKind.UNAVAILABLE)
        return data

    def _ended(self, exc: ConnectionClosed) -> None:
        if exc.rcvd is not None and exc.rcvd_then_sent:
            self.close_code = exc.rcvd.code

    async def close(self) -> None:
        """Idempotent; waits for the peer's close frame at most the close timeout."""
        await self._websocket.close()


class Link:
    """A live connection to one sandbox: any number of streams. Ends once and is then replaced, never revived."""

    def __init__(self, mux: Mux, sandbox: str, transport: WebSocketTransport | None = None) -> None:
        self.sandbox = sandbox  # its name, for messages
        self.connected_at = time.time()  # Unix time
        self._mux = mux
        self._transport = transport  # None where it is no WebSocket
        self._tasks = TaskOwner(f"link {sandbox}")

    @classmethod
    async def open(cls, target: Target, config: SessionConfig | None = None) -> Link:
        """Dial. Raises GatewayError; nothing is left open then."""
        websocket = await open_websocket(target)
        transport = WebSocketTransport(websocket)
        link = cls(Mux(transport, client=True, name=target.sandbox, config=config), target.sandbox, transport)
        link._tasks.start(link._mux.run(), "mux")
        return link

    @property
    def closed(self) -> bool:
        """Whether no stream can be opened any more."""
        return self._mux.closed

    @property
    def close_code(self) -> int:
        """With what WebSocket close code the service ended it; 0 when it did not, or without one."""
        return self._transport.close_code if self._transport is not None else 0

    @property
    def streams(self) -> int:
        """Open streams."""
        return self._mux.streams

    @property
    def mux(self) -> Mux:
        """For figures: rtt, bytes_in, bytes_out, error."""
        return self._mux

    async def wait_closed(self) -> None:
        """Until the session has ended, however that came."""
        await self._mux.wait_closed()

    async def dial(self, port: int) -> MuxStream:
        """A stream connected to `port` on the sandbox's loopback.

        Raises:
            DialRefused: nothing listens there.
            MuxClosed: the link broke before the answer; a new link may be tried, nothing was sent.
            GatewayError: kind refused (port not allowed), unsupported, timeout or unavailable.
        """
        what = f"cannot connect to port {port} of sandbox {self.sandbox!r}"
        stream = await self._mux.open_stream()
        try:
            async with asyncio.timeout(DIAL_TIMEOUT):
                await stream.write(struct.pack(">BH", CONNECT_VERSION, port))
                answer = await self._status(stream, what)
        except TimeoutError as exc:
            stream.abort()
            raise GatewayError(f"{what}: no answer within {DIAL_TIMEOUT:.0f} s", kind=ErrorKind.TIMEOUT) from exc
        except BaseException:
            stream.abort()
            raise
        if answer == bytes((STATUS_OK,)):
            return stream
        stream.abort()
        if not answer:
            if self._mux.closed:
                raise MuxClosed(f"{what}: the connection was lost")
            raise GatewayError(f"{what}: the service closed the stream without an answer", kind=ErrorKind.UNAVAILABLE)
        raise _dial_failure(answer[0], what, port)

    async def _status(self, stream: MuxStream, what: str) -> bytes:
        """The status byte, or b"" at the end. Raises MuxClosed when the link is dead though its connection is not."""
        try:
            async with asyncio.timeout(PROBE_AFTER):
                return await stream.read(1)
        except TimeoutError:
            log.info("%s: no answer for %.0f s, probing the link", what, PROBE_AFTER)
        try:
            async with asyncio.timeout(PROBE_TIMEOUT):
                await self._mux.ping()
        except TimeoutError as exc:
            raise MuxClosed(f"{what}: the connection does not answer any more") from exc
        return await stream.read(1)

    async def aclose(self) -> None:
        """End the session in order, with deadlines; idempotent."""
        try:
            await self._mux.aclose()
        finally:
            await self._tasks.aclose()


def _dial_failure(status: int, what: str, port: int) -> GatewayError:
    if status == STATUS_DIAL_FAILED:
        return DialRefused(
            f"{what}: nothing listens on it",
            hint=f"start the server inside; it must listen on 127.0.0.1:{port} or 0.0.0.0:{port}",
        )
    if status == STATUS_NOT_ALLOWED:
        return GatewayError(f"{what}: the service does not allow this port", kind=ErrorKind.REFUSED)
    if status == STATUS_BAD_VERSION:
        return GatewayError(f"{what}: the service speaks another tunnel version", kind=ErrorKind.UNSUPPORTED)
    return GatewayError(f"{what}: the service answers with the unknown status {status}", kind=ErrorKind.UNAVAILABLE)


def _lost(exc: ConnectionClosed) -> GatewayError:
    """Why a WebSocket ended, in words: the peer's close code, or that there was none."""
    if exc.rcvd is None:
        return GatewayError("the connection to the service was lost", kind=ErrorKind.UNAVAILABLE)
    reason = f" {printable(exc.rcvd.reason, 120)}" if exc.rcvd.reason else ""
    return GatewayError(f"the service closed the connection (code {exc.rcvd.code}{reason})", kind=ErrorKind.UNAVAILABLE)

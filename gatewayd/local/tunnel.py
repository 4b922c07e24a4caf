"""WS /tunnel, the service's side: a yamux session whose streams are TCP connections to the sandbox's ports (protocol section 2).

Each stream begins with a connect header: version, port (big-endian). The answer is one status byte; after 0 the stream is the
connection.
"""

from __future__ import annotations

import asyncio
import logging
import struct

from gatewayd.errors import GatewayError
from gatewayd.local.runtime.base import PortRefused, RuntimeFailure
from gatewayd.local.sandbox import Run, Sandbox
from gatewayd.relay import SocketStream, relay
from gatewayd.yamux.aio import MessageTransport, Mux, MuxStream, SessionConfig

log = logging.getLogger(__name__)

VERSION = 1
HEADER = struct.Struct(">BH")
CONNECTED, PORT_NOT_ALLOWED, DIAL_FAILED, UNSUPPORTED_VERSION = range(4)

HEADER_DEADLINE = 10.0  # seconds for a new stream's connect header
DIAL_DEADLINE = 10.0  # seconds for a connection inside the sandbox
MAX_TUNNELS = 256  # of one sandbox
CONFIG = SessionConfig(max_streams=4096)


class Tunnel:
    """One client's tunnel into one run of a sandbox."""

    def __init__(self, transport: MessageTransport, sandbox: Sandbox, run: Run) -> None:
        self._sandbox = sandbox
        self._run = run
        self._mux = Mux(transport, client=False, name=f"tunnel {sandbox.record.name}", config=CONFIG, on_stream=self._serve)

    @property
    def busy(self) -> bool:
        """A connection is open in it."""
        return self._mux.streams > 0

    async def run(self) -> None:
        """Serve until the client goes or the run ends."""
        if self._sandbox.run is not self._run:
            await self._mux.aclose()
            return
        self._run.tunnels.add(self)
        log.info("sandbox %s: tunnel opened", self._sandbox.record.name)
        try:
            await self._mux.run()
        finally:
            self._run.tunnels.discard(self)
            self._sandbox.touch()
            log.info("sandbox %s: tunnel closed: %s", self._sandbox.record.name, self._mux.error or "in order")

    async def aclose(self) -> None:
        """Tell the client to go away and end every stream; idempotent."""
        await self._mux.aclose()

    async def _serve(self, stream: MuxStream) -> None:
        """One stream: header, dial, status, and then bytes."""
        header = await self._header(stream)
        if header is None:
            stream.abort()
            return
        version, port = HEADER.unpack(header)
        if version != VERSION:
            await self._refuse(stream, UNSUPPORTED_VERSION, f"version {version}")
        elif port == 0:
            await self._refuse(stream, PORT_NOT_ALLOWED, "port 0")
        else:
            try:
                async with asyncio.timeout(DIAL_DEADLINE):
                    sock = await self._run.box.connect(port)
            except (PortRefused, RuntimeFailure, OSError, TimeoutError) as exc:
                await self._refuse(stream, DIAL_FAILED, str(exc) or f"port {port}: {type(exc).__name__}")
                return
            target = SocketStream.from_socket(sock)
            try:
                await stream.write(bytes([CONNECTED]))
            except BaseException:
                target.abort()
                raise
            result = await relay(stream, target)
            self._sandbox.touch()
            log.debug("sandbox %s: port %d: closed: %s", self._sandbox.record.name, port, result)

    async def _header(self, stream: MuxStream) -> bytes | None:
        """The connect header, or None when it does not come."""
        header = b""
        try:
            async with asyncio.timeout(HEADER_DEADLINE):
                while len(header) < HEADER.size:
                    data = await stream.read(HEADER.size - len(header))
                    if not data:
                        return None
                    header += data
        except TimeoutError:
            log.info("sandbox %s: a stream sent no connect header", self._sandbox.record.name)
            return None
        return header

    async def _refuse(self, stream: MuxStream, status: int, why: str) -> None:
        log.info("sandbox %s: connect refused (%d): %s", self._sandbox.record.name, status, why)
        try:
            await stream.write(bytes([status]))
            await stream.write_eof()
        except GatewayError as exc:
            log.debug("sandbox %s: the refusal was not heard: %s", self._sandbox.record.name, exc)

"""X11 forwarding: a display inside the sandbox that leads to the client's, and the cookie that opens it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
from typing import TYPE_CHECKING

from gatewayd.errors import GatewayError, printable
from gatewayd.sandbox.session import ProcessSpec

if TYPE_CHECKING:
    from gatewayd.frontends.ssh.forwards import Forwards, Listener
    from gatewayd.frontends.ssh.target import Target

log = logging.getLogger(__name__)

BASE_PORT = 6000  # of display 0
FIRST, LAST = 10, 25  # displays tried; the first as sshd's
XAUTH_DEADLINE = 20.0  # seconds
PROTOCOL = re.compile(rb"[A-Za-z0-9-]{1,64}")
COOKIE_MAX = 256  # bytes


async def open_display(
    target: Target, forwards: Forwards, protocol: bytes, cookie: bytes, screen: int
) -> tuple[str, Listener] | None:
    """DISPLAY for a session and the listener behind it. None: no free display, or no xauth in the image."""
    if PROTOCOL.fullmatch(protocol) is None or not 0 < len(cookie) <= COOKIE_MAX or screen > 255:
        return None
    try:
        if await target.text_only():
            return None
    except GatewayError:
        return None  # the session itself will say why
    for number in range(FIRST, LAST + 1):
        listener = await forwards.on_display(BASE_PORT + number)
        if listener is None:
            continue
        try:
            authorized = await _authorize(target, number, protocol, cookie)
        except BaseException:
            listener.close()
            raise
        if authorized:
            return f"localhost:{number}.{screen}", listener
        listener.close()
        return None
    return None


async def _authorize(target: Target, number: int, protocol: bytes, cookie: bytes) -> bool:
    """Put the cookie into the user's file inside, by way of standard input: arguments can be seen by others."""
    name = b"unix:%d" % number
    script = b"remove %s\nadd %s %s %s\n" % (name, name, protocol, cookie.hex().encode())
    session = None
    try:
        async with asyncio.timeout(XAUTH_DEADLINE):
            session = await target.start(ProcessSpec(command="xauth -q -", user=target.user, name="xauth"))
            with contextlib.suppress(GatewayError):  # there is none, or it has ended: its status says so
                await session.write(script)
                session.write_eof()
            status = await session.wait()
    except (GatewayError, TimeoutError) as exc:
        log.info("cannot run xauth in sandbox %s: %s", target.sandbox, printable(exc, 200))
        return False
    finally:
        if session is not None:
            await session.aclose()
    if status.code != 0:
        log.info("xauth in sandbox %s ended with status %s: no display", target.sandbox, status.code)
    return status.code == 0

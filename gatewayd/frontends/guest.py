"""The op `guest` of connect.sock: a connection to the sandbox's guest, whose token never leaves the daemon."""

from __future__ import annotations

import logging
from typing import Any

from gatewayd import api
from gatewayd.api import ErrorKind
from gatewayd.errors import GatewayError
from gatewayd.frontends.fields import Fields
from gatewayd.frontends.peer import CancelOnHangup, Client
from gatewayd.guest import wire
from gatewayd.relay import relay
from gatewayd.sandbox.accounts import Account
from gatewayd.sandbox.boxes import Notice
from gatewayd.sandbox.guest_client import Guests

log = logging.getLogger(__name__)


async def serve_guest(
    client: Client, account: Account, guests: Guests, sandbox: str, request: Fields, notice: Notice, *, wake: bool
) -> None:
    """Connect as the request says, tell the guest's answer, relay the frames of docs/guest-protocol.md.

    The answer's `others` are ports of guests of other versions; a request whose `guest` is one of them goes to that one alone.

    Raises:
        GatewayError: nothing was answered yet.
    """
    session_id = _session_id(request.text("session"))
    mode = request.whole("mode", wire.Mode.OPEN, most=wire.Mode.ATTACH)
    received = request.whole("received", 0)
    port = request.whole("guest", 0, most=65535)
    with CancelOnHangup(client.sock):
        remote, answer = await guests.connect(
            account, sandbox, session_id=session_id, mode=mode, received=received, wake=wake, notice=notice, port=port
        )
    try:
        reply: dict[str, Any] = {"status": answer.status, "received": answer.received}
        reply |= {"base": answer.base, "credit": answer.credit}
        if others := guests.others(account, sandbox):
            reply["others"] = others
        await client.send({"ok": reply})
    except BaseException:
        remote.abort()
        raise
    if answer.status != wire.Status.OK:
        await remote.aclose()
        return
    log.info("guest session %s… in %s connected", session_id.hex()[:8], sandbox)
    result = await relay(client.stream(), remote)
    because = "" if result.error is None else f": {result.error}"
    log.info("guest session %s… in %s disconnected%s", session_id.hex()[:8], sandbox, because)


def _session_id(text: str) -> bytes:
    try:
        session_id = bytes.fromhex(text)
    except ValueError:
        session_id = b""
    if len(session_id) != wire.ID_SIZE or len(text) != 2 * wire.ID_SIZE:
        raise GatewayError(f"session must be {2 * wire.ID_SIZE} hexadecimal digits", kind=ErrorKind.USAGE)
    return session_id


def may_wake(request: Fields, default: bool) -> bool:
    """Whether a request may start a stopped sandbox."""
    return request.flag(api.FIELD_WAKE, default)

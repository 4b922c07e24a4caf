"""Connections to the world, dialled by the service on this machine's network; each address is judged before it is dialled."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from ipaddress import ip_address

from gatewayd.local.egress.addresses import Address, Reach
from gatewayd.local.egress.policy import Policy
from gatewayd.local.egress.resolver import NameUnknown, Resolver

_DIAL_DEADLINE = 10.0  # seconds for one address
_MAX_DIALS = 4  # addresses of a name that are tried


class Refused(Exception):
    """The sandbox may not have this; the message says why."""


async def dial(host: str, port: int, resolver: Resolver, reach: Reach, policy: Callable[[], Policy]) -> tuple[socket.socket, str]:
    """A connected socket to a host (canonical name or address), and the address it leads to.

    Raises:
        Refused: none of its addresses may be dialled.
        OSError: none could be reached.
    """
    try:
        addresses: list[Address] = [ip_address(host)]
    except ValueError:
        try:
            addresses = await resolver.addresses(host)
        except NameUnknown:
            raise OSError(f"there is no {host}") from None
    refusal, failure = "", OSError("no address")
    for address in addresses[:_MAX_DIALS]:
        why = reach.refusal(address) or policy().denies(host, str(address))
        if why:
            refusal = f"{address}: {why}"
            continue
        try:
            return await _connect(address, port), str(address)
        except (OSError, TimeoutError) as exc:
            failure = OSError(f"{address}: {getattr(exc, 'strerror', None) or 'no answer'}")
            refusal = ""
    if refusal:
        raise Refused(refusal)
    raise failure


async def _connect(address: Address, port: int) -> socket.socket:
    sock = socket.socket(socket.AF_INET if address.version == 4 else socket.AF_INET6, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        async with asyncio.timeout(_DIAL_DEADLINE):
            await asyncio.get_running_loop().sock_connect(sock, (str(address), port))
    except BaseException:
        sock.close()
        raise
    return sock

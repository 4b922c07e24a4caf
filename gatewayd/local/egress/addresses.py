"""Which addresses sandboxes may reach: the public ones, and what of the others this service was told to open.

What counts is the address that is dialled, never a name: a name can lead anywhere, and elsewhere the next time.
"""

from __future__ import annotations

import socket
from collections.abc import Iterable
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

from gatewayd.local.runtime.base import Network

Address = IPv4Address | IPv6Address
Net = IPv4Network | IPv6Network

NAMES4 = IPv4Network("198.18.0.0/15")  # stand for names inside sandboxes (RFC 2544: never routed)
NAMES6 = IPv6Network("fdf9:7c3a:51e2::/48")

# Not public (the IANA special-purpose registries), the metadata addresses of clouds among them.
_CLOSED = (
    *("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12", "192.0.0.0/24"),
    *("192.0.2.0/24", "192.168.0.0/16", "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24", "224.0.0.0/4", "240.0.0.0/4"),
    *("168.63.129.16/32", "::/127", "::ffff:0:0/96", "64:ff9b:1::/48", "100::/64", "2001:db8::/32", "fc00::/7", "fe80::/10"),
    *("fec0::/10", "ff00::/8"),
)
_NEVER = tuple(ip_network(text) for text in ("127.0.0.0/8", "::1/128", "0.0.0.0/8", "::/128"))  # this machine's loopback
_NAT64 = IPv6Network("64:ff9b::/96")  # RFC 6052


class Reach:
    """The addresses that may be dialled."""

    def __init__(self, opened: Iterable[str] = ()) -> None:
        """`opened` holds networks in CIDR notation. Raises ValueError for what is none, or is this machine's loopback."""
        self._opened: list[Net] = []
        for text in opened:
            network = ip_network(text)
            if any(network.version == never.version and network.overlaps(never) for never in _NEVER):
                raise ValueError(f"{text}: this machine's loopback is never open to sandboxes")
            self._opened.append(network)
        self._closed = tuple(ip_network(text) for text in _CLOSED)

    def network(self) -> Network:
        """What a runtime refuses before a connection comes here: shorter for a sandbox than a connection that breaks."""
        names = (str(NAMES4), "fc00::/7")  # they come here: the latter holds NAMES6, and is judged here too
        closed = [text for text in _CLOSED if text not in names]
        own = [str(ip_network(address)) for address in _own_addresses()]
        opened = [str(network) for network in self._opened]
        return Network(tuple(_distinct(closed + own)), tuple(_distinct(opened)))

    def refusal(self, address: Address) -> str:
        """Why an address is not dialled; "" when it is."""
        plain = _embedded(address)
        if any(_within(plain, never) for never in _NEVER) or plain.is_loopback or plain.is_unspecified:
            return "this machine's loopback"
        if any(_within(plain, network) for network in self._opened):
            return ""
        if any(_within(plain, network) for network in self._closed) or not plain.is_global or plain.is_multicast:
            return "not a public address"
        if _is_own(plain):
            return "an address of this machine"
        return ""


def _within(address: Address, network: Net) -> bool:
    return address.version == network.version and address in network


def _embedded(address: Address) -> Address:
    """The IPv4 address that an IPv6 one leads to, if it does (RFC 4291, 6052, 3056)."""
    if isinstance(address, IPv6Address):
        if address.scope_id is not None:
            address = IPv6Address(int(address))
        if address.ipv4_mapped is not None:
            return address.ipv4_mapped
        if address.sixtofour is not None:
            return address.sixtofour
        if address in _NAT64:
            return IPv4Address(int(address) & 0xFFFF_FFFF)
    return address


def _is_own(address: Address) -> bool:
    """Whether it is on one of this machine's interfaces now: packets to it would come from it."""
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((str(address), 9))  # sends nothing
            return ip_address(probe.getsockname()[0]) == address
    except OSError:
        return False  # there is no way to it: dialling will say so


def _own_addresses() -> list[Address]:
    """The addresses that face the world; others are found when they are dialled."""
    found = []
    for family, public in ((socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:4860:4860::8888")):
        try:
            with socket.socket(family, socket.SOCK_DGRAM) as probe:
                probe.connect((public, 9))
                found.append(ip_address(probe.getsockname()[0]))
        except OSError:
            continue
    return found


def _distinct(texts: Iterable[str]) -> list[str]:
    """Without networks that lie in others: a packet filter takes no overlaps."""
    nets = sorted((ip_network(text) for text in set(texts)), key=lambda net: net.prefixlen)
    kept: list[Net] = []
    for net in nets:
        if not any(net.version == other.version and net.subnet_of(other) for other in kept):  # type: ignore[arg-type]
            kept.append(net)
    return [str(net) for net in kept]

"""Addresses that stand for names: a sandbox's DNS queries are answered with them, so a connection tells which name it is for."""

from __future__ import annotations

from collections import OrderedDict
from ipaddress import IPv4Address, IPv6Address

from gatewayd.local.egress.addresses import NAMES4, NAMES6, Address

_FIRST = 256  # the addresses before it are the service's own (`inside.network`)
_LAST = NAMES4.num_addresses - 2
MAX_NAMES = 8192  # kept for one sandbox; the longest unused are forgotten


class NameTable:
    """The names of one sandbox. An address is not given to another name before all others have been used."""

    def __init__(self) -> None:
        self._by_name: OrderedDict[str, int] = OrderedDict()  # name → number, longest unused first
        self._by_number: dict[int, str] = {}
        self._next = _FIRST

    def number(self, name: str) -> int:
        """The number of a name, a new one if need be."""
        known = self._by_name.get(name)
        if known is not None:
            self._by_name.move_to_end(name)
            return known
        if len(self._by_name) >= MAX_NAMES:
            _, oldest = self._by_name.popitem(last=False)
            del self._by_number[oldest]
        while self._next in self._by_number:
            self._advance()
        number = self._next
        self._advance()
        self._by_name[name] = number
        self._by_number[number] = name
        return number

    def _advance(self) -> None:
        self._next = self._next + 1 if self._next < _LAST else _FIRST

    def name(self, address: Address) -> str | None:
        """The name that an address stands for, if it does."""
        base = NAMES4 if address.version == 4 else NAMES6
        name = self._by_number.get(int(address) - int(base.network_address))
        if name is not None:
            self._by_name.move_to_end(name)
        return name


def stands_for_a_name(address: Address) -> bool:
    """Whether an address is one of those, given out or not."""
    return address in (NAMES4 if address.version == 4 else NAMES6)


def ipv4(number: int) -> IPv4Address:
    """The IPv4 address with that number."""
    return NAMES4.network_address + number


def ipv6(number: int) -> IPv6Address:
    """The IPv6 address with that number."""
    return NAMES6.network_address + number

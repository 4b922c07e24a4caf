"""The rules that lead everything a sandbox sends to the service (`inside.network`), as nft(8) reads them."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from ipaddress import ip_network
from typing import Any

from gatewayd.local.runtime.base import Finding, Network
from gatewayd.local.runtime.checks import SEARCH
from gatewayd.local.runtime.inside.network import GATE4, GATE6, GATE_PORT

NOTE_MISSING = "no network: nft is not installed (apt-get install nftables)"


def find_nft() -> str | None:
    """Absolute path of nft(8)."""
    return shutil.which("nft", path=SEARCH)


def plan(network: Network | None) -> tuple[dict[str, Any] | None, str]:
    """What the monitor is told, and what it lacks for people to read."""
    if network is None:
        return None, ""
    nft = find_nft()
    return (None, NOTE_MISSING) if nft is None else ({"nft": nft, "rules": rules(network)}, "")


def finding() -> Finding:
    """Whether sandboxes here can have a network."""
    path = find_nft()
    if path is None:
        return Finding("network", False, "nft is not installed: sandboxes have no way out", "apt-get install nftables")
    return Finding("network", True, "by way of the service (nftables)")


def _of_family(networks: Sequence[str], version: int) -> str:
    return ", ".join(text for text in networks if ip_network(text).version == version)


def rules(network: Network) -> str:
    """Rules for one network namespace."""
    lines = []
    for version, word, gate, loopback in ((4, "ip", GATE4, "127.0.0.0/8"), (6, "ip6", f"[{GATE6}]", "::1")):
        family = f"meta nfproto ipv{version}"
        lines.append(f"{word} daddr {loopback} return")
        lines += [f"{family} meta l4proto {kind} th dport 53 dnat {word} to {gate}:{GATE_PORT}" for kind in ("tcp", "udp")]
        tcp = f"meta l4proto tcp dnat {word} to {gate}:{GATE_PORT}"
        if opened := _of_family(network.opened, version):
            lines.append(f"{word} daddr {{ {opened} }} {tcp}")
        if closed := _of_family(network.closed, version):
            lines.append(f"{word} daddr {{ {closed} }} return")
        lines.append(f"{family} {tcp}")
    led = "\n    ".join(lines)
    return f"""table inet gatewayd {{
  chain lead {{
    type nat hook output priority -100; policy accept;
    {led}
  }}
  chain refuse {{
    type filter hook output priority 0; policy accept;
    ct state established,related accept
    ip daddr 127.0.0.0/8 accept
    ip6 daddr ::1 accept
    ct status dnat accept
    meta l4proto tcp reject with tcp reset
    reject
  }}
}}
"""

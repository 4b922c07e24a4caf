"""The command that shows what a sandbox reached of the network."""

from __future__ import annotations

import json
import shutil
import subprocess

import pytest

from .conftest import BIN, Gateway

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(shutil.which("nft", path="/usr/sbin:/sbin:/usr/bin") is None, reason="nftables is not installed"),
]


def test_decisions_are_shown_and_followed(gateway: Gateway, box: str) -> None:
    try_it = "python3 -c 'import socket; socket.create_connection((\"fd12::7\", 81), timeout=5).recv(1)' 2>/dev/null"
    gateway.sh(box, f"! {try_it}")
    found = [one for one in gateway.json("egress", box)["decisions"] if one["host"] == "fd12::7"]
    assert [(one["port"], one["verdict"], one["reason"]) for one in found] == [(81, "deny", "fd12::7: not a public address")]
    table = gateway.sandbox("egress", box, "--format", "pretty").stdout
    assert "fd12::7" in table
    assert "not a public address" in table
    following = subprocess.Popen([BIN / "sandbox", "egress", box, "-f"], env=gateway.env, stdout=subprocess.PIPE, text=True)
    try:
        assert following.stdout is not None
        known = json.loads(following.stdout.readline())
        gateway.sh(box, f"! {try_it.replace('81', '82')}")
        while known["port"] != 82:
            known = json.loads(following.stdout.readline())
        assert known["verdict"] == "deny"
    finally:
        following.kill()
        following.communicate(timeout=10)


def test_opaque_values_are_kept_and_not_told(gateway: Gateway) -> None:
    config = '{"rules": [{"name": "r", "match_hosts": ["api.example.com"], "env_vars": {"PLACE": "holder"}, '
    config += '"headers": [{"name": "Authorization", "type": "opaque", "value": "Bearer hidden-value"}]}]}'
    box = "given"
    gateway.json("create", box, "--proxy-config", config, "--wait")
    again = config.replace('hidden-value"', 'hidden-value-2"')
    shown = gateway.json("update", box, "--proxy-config", again)
    assert shown["proxy_config"]["rules"][0]["headers"] == [{"name": "Authorization", "type": "opaque", "is_set": True}]
    assert gateway.sh(box, "echo $PLACE; env | grep -c hidden-value || true; echo $SSL_CERT_FILE") == (
        "holder\n0\n/run/gatewayd/ca-bundle.pem\n"
    )
    gateway.sandbox("stop", box, "--wait")
    refused = gateway.sandbox("update", box, "--proxy-config", "{}", code=65)
    assert "can be changed while it is ready" in refused.stderr

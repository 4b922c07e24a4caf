"""What a sandbox reaches without a proxy_config or with access control, and what it never reaches."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi.exceptions import RequestValidationError

from gatewayd.local.creation import refuse_proxy_config
from gatewayd.local.egress import gate
from gatewayd.local.models import CreateBody
from gatewayd.local.runtime import packetfilter

from .conftest import World
from .servers import Server

# Connects, and says what came of it: "open", or the error. A connection that is closed at once without a byte is "closed".
PROBE = """
import json, socket, sys
def probe(target):
    host, port = target.rsplit(":", 1)
    try:
        with socket.create_connection((host, int(port)), timeout=10) as sock:
            sock.sendall(b"GET / HTTP/1.1\\r\\nHost: x\\r\\n\\r\\n")
            return "open" if sock.recv(1) else "closed"
    except OSError as exc:
        return type(exc).__name__
print(json.dumps({target: probe(target) for target in sys.argv[1:]}))
"""
SHUT = {"ConnectionRefusedError", "ConnectionResetError", "closed", "gaierror", "OSError"}


async def probe(world: World, sandbox: Any, *targets: str) -> dict[str, str]:
    found: dict[str, str] = json.loads(await world.ok(sandbox, f"python3 -c '{PROBE}' {' '.join(targets)}"))
    return found


async def test_names_and_addresses_are_reached_untouched(world: World, https: Server, address: str) -> None:
    sandbox = await world.create()
    url = f"https://api.test:{https.port}/x"
    assert await world.ok(sandbox, f"curl -sk {url}; curl -sk4 {url}; curl -sk6 {url}") == "hello /x" * 3
    assert await world.ok(sandbox, f"curl -sk https://{address}:{https.port}/y") == "hello /y"
    assert https.names[:3] == ["api.test"] * 3
    issuer = await world.ok(
        sandbox, f"openssl s_client -connect api.test:{https.port} -servername api.test </dev/null 2>/dev/null | grep issuer="
    )
    assert "CA of a test" in issuer
    entry = await world.until(sandbox, kind="tcp", host="api.test", verdict="allow")
    assert (entry["port"], entry["sent"] > 100, entry["received"] > 100) == (https.port, True, True)


async def test_its_own_listeners_stay_its_own(world: World) -> None:
    sandbox = await world.create()
    script = """
import socket
for family, address in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1"), (socket.AF_INET, "127.9.9.9")):
    server = socket.create_server((address, 5353), family=family)
    client = socket.create_connection((address, 5353))
    server.accept()[0].sendall(b"mine")
    print(client.recv(9).decode())
    udp = socket.socket(family, socket.SOCK_DGRAM)
    udp.bind((address, 53))
    udp.sendto(b"mine too", udp.getsockname())
    print(udp.recv(9).decode())
"""
    assert await world.ok(sandbox, f"python3 -c '{script}'") == "mine\nmine too\n" * 3
    assert world.decisions(sandbox) == []


@pytest.fixture
def everywhere() -> Iterator[int]:
    """A port that this machine listens on at all its addresses; nobody may have connected at the end."""
    with socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True) as server:
        server.setblocking(False)
        yield server.getsockname()[1]
        with pytest.raises(BlockingIOError):
            server.accept()


async def test_this_machine_and_private_networks_are_out_of_reach(world: World, everywhere: int) -> None:
    sandbox = await world.create()
    numbers = ["127.0.0.1", "127.0.0.53", "0.0.0.0", "10.0.0.1", "192.168.0.1", "172.16.0.1", "169.254.169.254", "100.64.0.1"]
    numbers += ["::1", "::", "::ffff:127.0.0.1", "64:ff9b::7f00:1", "2002:7f00:1::", "fe80::1", "fd00::1", "fd00:ec2::254"]
    world.names.update({f"n{place}.test": [number] for place, number in enumerate(numbers)})
    targets = [f"{number}:{everywhere}" for number in (*numbers, "198.18.0.1", "198.18.9.9", "fdf9:7c3a:51e2::77")]
    found = await probe(world, sandbox, *targets, *(f"{name}:{everywhere}" for name in world.names if name.startswith("n")))
    assert set(found.values()) <= SHUT, found
    denied = {entry["host"] for entry in world.decisions(sandbox) if entry["verdict"] == "deny"}
    assert {"n0.test", "n6.test", "n8.test", "n10.test"} <= denied


async def test_a_name_that_changes_its_mind_is_judged_again(world: World, http: Server, everywhere: int) -> None:
    """DNS rebinding: harmless when it is asked for, this machine when it is connected to."""
    sandbox = await world.create()
    world.names["turn.test"] = ["93.184.215.14"]
    await world.ok(sandbox, "getent ahosts turn.test")
    world.names["turn.test"] = ["127.0.0.1"]
    assert sandbox.run is not None
    assert sandbox.run.gate is not None
    sandbox.run.gate._resolver._kept.clear()  # its ten seconds are over
    found = await probe(world, sandbox, f"turn.test:{everywhere}")
    assert set(found.values()) <= SHUT
    world.names["mixed.test"] = ["127.0.0.1", "169.254.169.254", *world.names["api.test"]]  # what may be dialled is
    assert await probe(world, sandbox, f"mixed.test:{http.port}") == {f"mixed.test:{http.port}": "open"}


async def test_an_allow_list(world: World, https: Server, http: Server, address: str) -> None:
    patterns = ["API.test.", "*.wild.test", "~x[0-9]+\\.test", "bücher.test"]
    sandbox = await world.create({"access_control": {"allow_list": patterns}})
    world.names.update({"x12.test": [address], "x.test": [address], "evil-x1.test": [address]})
    port = http.port
    allowed = [f"{name}:{port}" for name in ("api.test", "API.TEST.", "a.wild.test", "x12.test", "xn--bcher-kva.test")]
    denied = [f"{name}:{port}" for name in ("other.test", "x.test", "evil-x1.test", "wild.test", address)]
    world.asked.clear()
    found = await probe(world, sandbox, *allowed, *denied)
    assert {target for target, outcome in found.items() if outcome == "open"} == set(allowed), found
    assert not {"other.test", "x.test", "evil-x1.test"} & set(world.asked)  # not even looked up
    curl = f"curl -sk -o /dev/null -w '%{{http_code}}' --connect-to ::api.test:{https.port}"
    assert await world.ok(sandbox, f"{curl} https://api.test/") == "200"
    assert (await world.run(sandbox, f"{curl} https://other.test/")).out == "000"  # another name within TLS
    assert await world.ok(sandbox, f"curl -sk https://api.test:{https.port}/") == "hello /"
    assert "CA of a test" in await world.ok(sandbox, f"curl -skv https://api.test:{https.port}/ 2>&1 | grep issuer")


async def test_a_deny_list(world: World, http: Server, address: str) -> None:
    sandbox = await world.create({"access_control": {"deny_list": ["other.test", "93.184.0.0/16"]}})
    world.names["far.test"] = ["93.184.215.14"]  # a denied network behind another name
    found = await probe(world, sandbox, *(f"{name}:{http.port}" for name in ("api.test", address, "other.test", "far.test")))
    assert [outcome == "open" for outcome in found.values()] == [True, True, False, False], found
    reasons = [entry["reason"] for entry in world.decisions(sandbox) if entry["verdict"] == "deny"]
    assert any("deny list" in reason for reason in reasons)


async def test_dns(world: World) -> None:
    sandbox = await world.create()
    assert await world.ok(sandbox, "cat /etc/resolv.conf") == "nameserver 198.18.0.1\n"
    script = """
import socket, struct
def query(name, kind, tcp=False, server="9.9.9.9"):
    labels = b"".join(bytes([len(part)]) + part.encode() for part in name.split("."))
    message = struct.pack(">6H", 7, 256, 1, 0, 0, 0) + labels + b"\\0" + struct.pack(">2H", kind, 1)
    if tcp:
        sock = socket.create_connection((server, 53), timeout=5)
        sock.sendall(struct.pack(">H", len(message)) + message)
        answer = sock.recv(999)[2:]
    else:
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sock.settimeout(5)
        sock.sendto(message, (server, 53))
        answer = sock.recv(999)
    code, count = answer[3] & 15, struct.unpack_from(">H", answer, 6)[0]
    return code, count, answer[-4:] if count and kind == 1 else b""
first = query("api.test", 1)
assert first[:2] == (0, 1) and first[2][:2] == bytes([198, 18]), first
assert query("API.Test", 1, tcp=True) == first
assert query("api.test", 28)[:2] == (0, 1)
assert query("api.test", 16)[:2] == (0, 0)
assert query("nowhere.test", 1)[:2] == (3, 0)
assert query("1.0.0.127.in-addr.arpa", 12)[:2] == (3, 0)
assert query("other.test", 1)[2] != first[2]
"""
    await world.ok(sandbox, f"python3 -c '{script}'")


async def test_sandboxes_do_not_reach_each_other(world: World, everywhere: int) -> None:
    one, other = await world.create(), await world.create()
    assert one.run is not None
    assert other.run is not None
    wait = "until curl -s 127.0.0.1:8099 >/dev/null; do :; done"
    await world.ok(one, f"setsid -f python3 -m http.server 8099 >/dev/null 2>&1; {wait}")
    found = await probe(world, other, "127.0.0.1:8099", "198.18.0.1:8099", "::1:8099")
    assert set(found.values()) <= SHUT
    number = "import socket; print(socket.gethostbyname('api.test'))"
    given = await world.ok(one, f'python3 -c "{number}"')
    found = await probe(world, other, f"{given.strip()}:80")  # an address that a name was given in another sandbox
    assert set(found.values()) <= SHUT


async def test_many_connections_wait_their_turn(world: World, http: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "MAX_CONNECTIONS", 4)
    sandbox = await world.create()
    script = f"""
import socket
socks = [socket.create_connection(("api.test", {http.port})) for _ in range(12)]
for sock in socks:
    sock.sendall(b"GET / HTTP/1.0\\r\\n\\r\\n")
for sock in socks:
    assert sock.recv(9), "no answer"
    sock.close()
"""
    await world.ok(sandbox, f"python3 -c '{script}'")
    assert len(http.seen) == 12


async def test_it_ends_with_the_sandbox(world: World, http: Server) -> None:
    sandbox = await world.create()
    assert sandbox.run is not None
    gated = sandbox.run.gate
    assert gated is not None
    running = asyncio.ensure_future(world.run(sandbox, f"curl -s http://api.test:{http.port}/stream"))
    assert await asyncio.to_thread(http.asked.wait, 10)
    await world.boxes.stop(sandbox)
    assert (await running).code != 0
    assert len(gated._tasks) == 0
    await world.boxes.start(sandbox)
    http.go_on.set()
    assert await world.ok(sandbox, f"curl -s http://api.test:{http.port}/again") == "hello /again"


async def test_without_the_packet_filter_there_is_no_network(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packetfilter, "find_nft", lambda: None)
    sandbox = await world.boxes.create(CreateBody(wait_for_ready=True))
    assert sandbox.run is not None
    assert sandbox.run.gate is None
    assert "no network: nft is not installed" in (sandbox.record.status_message or "")
    assert (await world.run(sandbox, "python3 -c 'import socket; socket.create_connection((\"1.1.1.1\", 80))'")).code != 0
    monkeypatch.setattr(packetfilter, "find_nft", lambda: "/bin/false")
    other = await world.boxes.create(CreateBody(wait_for_ready=True))
    assert "no network: the packet filter could not be loaded" in (other.record.status_message or "")
    assert other.run is not None
    assert other.run.gate is None


@pytest.mark.parametrize("config", [{"rules": [{"name": "r"}]}, {"access_control": {"allow_list": []}}])
def test_runtimes_without_a_network_refuse_what_they_cannot_do(config: dict[str, Any]) -> None:
    with pytest.raises(RequestValidationError) as caught:
        refuse_proxy_config(CreateBody.model_validate({"proxy_config": config}), "docker")
    [error] = caught.value.errors()
    assert (error["loc"], "docker runtime" in error["msg"]) == (("body", "proxy_config"), True)
    refuse_proxy_config(CreateBody.model_validate({"proxy_config": {"rules": []}}), "docker")

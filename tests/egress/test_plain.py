"""What a sandbox reaches without a proxy_config, and what it never reaches."""

from __future__ import annotations

from .conftest import World
from .servers import Server


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

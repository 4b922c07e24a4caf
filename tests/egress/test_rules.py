"""Rules: headers that the sandbox never sees, set on requests of whatever program it runs."""

from __future__ import annotations

from typing import Any

from .conftest import World
from .servers import Server

OPAQUE, WORKSPACE = "s3cret-opaque-value", "s3cret-workspace-value"


def rule(**fields: Any) -> dict[str, Any]:
    headers = [
        {"name": "X-Plain", "type": "plaintext", "value": "seen by all"},
        {"name": "Authorization", "type": "opaque", "value": f"Bearer {OPAQUE}"},
        {"name": "X-Work", "type": "workspace_secret", "value": "key={WORK}"},
    ]
    return {"name": "api", "match_hosts": ["api.test"], "headers": headers, **fields}


async def test_every_program_is_given_the_headers_and_trusts(world: World, https: Server) -> None:
    world.boxes.egress.secrets.put("WORK", WORKSPACE)
    sandbox = await world.create({"rules": [rule(env_vars={"API_KEY": "placeholder"})]})
    url = f"https://api.test:{https.port}"
    programs = {
        "curl": f"curl -sS {url}/curl -H 'Authorization: mine' -H 'x-work: mine'",
        "python": f"python3 -c \"import urllib.request as u; print(u.urlopen('{url}/python').read().decode())\"",
        "node": f"node -e \"fetch('{url}/node').then(async r => console.log(await r.text()))\"",
        "openssl": f"printf 'GET /openssl HTTP/1.1\\r\\nHost: api.test\\r\\nConnection: close\\r\\n\\r\\n' | "
        f"openssl s_client -quiet -verify_return_error -connect api.test:{https.port} -servername api.test 2>/dev/null",
        "env": "echo hello /$API_KEY",
    }
    for name, command in programs.items():
        assert ("hello /placeholder" if name == "env" else f"hello /{name}") in await world.ok(sandbox, command)
    assert https.headers("authorization") == [f"Bearer {OPAQUE}"] * 4
    assert https.headers("x-work") == [f"key={WORKSPACE}"] * 4
    assert https.headers("X-Plain") == ["seen by all"] * 4
    assert https.names == ["api.test"] * 4
    entry = await world.until(sandbox, kind="http", path="/curl")
    assert (entry["rules"], entry["status"], entry["verdict"], entry["method"]) == (["api"], 200, "allow", "GET")

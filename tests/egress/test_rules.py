"""Rules: headers that the sandbox never sees, set on requests of whatever program it runs."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from gatewayd.local.envelope import ServiceError
from gatewayd.local.proxyconfig import shown

from .conftest import World, spawned
from .servers import Server

OPAQUE, WORKSPACE = "s3cret-opaque-value", "s3cret-workspace-value"
HEADER = {"name": "X-Plain", "type": "plaintext", "value": "seen by all"}
SECRET = {"name": "Authorization", "type": "opaque", "value": f"Bearer {OPAQUE}"}


def rule(**fields: Any) -> dict[str, Any]:
    headers = [
        HEADER,
        SECRET,
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


async def test_values_are_told_to_nobody(world: World, https: Server) -> None:
    """Not to the sandbox's files, variables and processes, not in an answer, not in the journal, not on disk."""
    world.boxes.egress.secrets.put("WORK", WORKSPACE)
    sandbox = await world.create({"rules": [rule(env_vars={"API_KEY": "placeholder"})]})
    url = f"https://api.test:{https.port}"
    await world.ok(sandbox, f"curl -sS {url}/a; curl -sS -X TRACE {url}/b; curl -sS -H 'Host: other.test' {url}/c")
    assert https.headers("authorization") == [f"Bearer {OPAQUE}"]
    script = """
import glob, os
needle = b"s3cret" + b"-"
for folder, folders, files in os.walk("/"):
    folders[:] = [name for name in folders if folder != "/" or name not in ("proc", "usr", "dev")]
    for path in (os.path.join(folder, name) for name in files):
        if os.path.isfile(path) and not os.path.islink(path) and needle in open(path, "rb").read():
            print(path)
for path in glob.glob("/proc/[0-9]*/environ") + glob.glob("/proc/[0-9]*/cmdline"):
    try:
        text = open(path, "rb").read()
    except OSError:
        continue
    if needle in text:
        print(path)
"""
    found = await world.run(sandbox, f"python3 -c '{script}'")
    assert found.code == 0, found
    assert found.out == ""
    answered = json.dumps([shown(sandbox.record.proxy_config), world.decisions(sandbox), world.boxes.egress.secrets.keys()])
    assert OPAQUE not in answered
    assert WORKSPACE not in answered
    config = shown(sandbox.record.proxy_config)
    assert config is not None
    assert config["rules"][0]["headers"][1] == {"name": "Authorization", "type": "opaque", "is_set": True}
    stored = b"".join(path.read_bytes() for path in world.state.glob("*") if path.is_file())
    assert OPAQUE.encode() not in stored
    assert WORKSPACE.encode() not in stored
    for name in ("egress-ca.key", "secrets.key"):
        assert (world.state / name).stat().st_mode & 0o777 == 0o600


async def test_bodies_stream_both_ways(world: World, https: Server) -> None:
    sandbox = await world.create({"rules": [rule(headers=[HEADER])]})
    url = f"https://api.test:{https.port}"
    script = f"""
import socket, ssl, sys
sock = ssl.create_default_context().wrap_socket(socket.create_connection(("api.test", {https.port})), server_hostname="api.test")
sock.sendall(b"GET /stream HTTP/1.1\\r\\nHost: api.test\\r\\n\\r\\n")
data = b""
while b"first" not in data:
    data += sock.recv(999)
print("first", flush=True)
sys.stdin.readline()
"""
    await world.ok(sandbox, f"python3 -c '{script}'")  # what has come is there before the rest has been sent
    https.go_on.set()
    assert await world.ok(sandbox, f"curl -sS {url}/stream {url}/close") == "firstsecond" + "until the end"
    assert await world.ok(sandbox, f"curl -sS {url}/big | wc -c") == f"{8 << 20}\n"
    await world.ok(sandbox, "head -c 3000000 /dev/zero >/tmp/zeros")
    size = "curl -sS -o /dev/null -w '%{size_download}\\n' -T /tmp/zeros"
    assert await world.ok(sandbox, f"{size} {url}/put") == "3000000\n"
    assert await world.ok(sandbox, f"{size} -H 'Transfer-Encoding: chunked' {url}/put") == "3000000\n"
    seen = https.seen[-2:]
    assert [one["headers"].get("Transfer-Encoding") for one in seen] == [None, "chunked"]
    assert [one["headers"].get("Expect") for one in seen] == ["100-continue"] * 2
    assert set(https.headers("x-plain")) == {"seen by all"}
    assert await world.ok(sandbox, f"curl -sSI {url}/head | head -1") == "HTTP/1.1 200 OK\r\n"


async def test_a_connection_is_kept_and_upgraded(world: World, https: Server) -> None:
    sandbox = await world.create({"rules": [rule(headers=[HEADER])]})
    url = f"https://api.test:{https.port}"
    await world.ok(sandbox, f"curl -sS {url}/1 {url}/2 -d x {url}/3")
    assert len({one["peer"] for one in https.seen}) == 1
    script = f"""
import socket, ssl
sock = ssl.create_default_context().wrap_socket(socket.create_connection(("api.test", {https.port})), server_hostname="api.test")
head = ["GET /ws HTTP/1.1", "Host: api.test", "Upgrade: websocket", "Connection: Upgrade", "Sec-WebSocket-Key: x", "", ""]
sock.sendall("\\r\\n".join(head).encode())
data = b""
while not data.endswith(b"\\r\\n\\r\\n"):
    data += sock.recv(1)
sock.sendall(b"abc")
print(data.split()[1].decode(), sock.recv(9).decode())
"""
    assert await world.ok(sandbox, f"python3 -c '{script}'") == "101 cba\n"
    assert set(https.headers("x-plain")) == {"seen by all"}


async def test_git_clones_over_https(world: World, https: Server, tmp_path: Path) -> None:
    repository = tmp_path / "made"
    commands = (
        f"git init -q {repository} && cd {repository} && echo content >file && git add file && "
        "git -c user.name=t -c user.email=t@t commit -qm one && git update-server-info"
    )
    process = await asyncio.create_subprocess_shell(commands)
    assert await process.wait() == 0
    folder = repository / ".git"
    for path in folder.rglob("*"):
        if path.is_file():
            https.files[f"/made.git/{path.relative_to(folder)}"] = path.read_bytes()
    sandbox = await world.create({"rules": [rule(headers=[HEADER], match_paths=["/made.git/*"])]})
    await world.ok(sandbox, f"cd /root && GIT_SMART_HTTP=0 git clone -q https://api.test:{https.port}/made.git && cat made/file")
    assert set(https.headers("x-plain")) == {"seen by all"}


async def test_paths_that_lead_elsewhere_get_nothing(world: World, https: Server) -> None:
    sandbox = await world.create({"rules": [rule(headers=[HEADER], match_paths=["/v1/*", "~^/exact$"])]})
    url = f"https://api.test:{https.port}"
    given = ["/v1/x", "/v1/a/b?q=/../..", "/exact"]
    plain = ["/v2/x", "/v1/../v2/x", "/v1/%2e%2e/v2/x", "/v1/..%2fv2", "/", "/V1/x", "/v1"]
    urls = " ".join(f"'{url}{path}'" for path in given + plain)
    await world.ok(sandbox, f"curl -sS --path-as-is {urls}")
    assert https.headers("x-plain") == ["seen by all"] * len(given) + [None] * len(plain)


async def test_secrets_need_tls_and_the_right_host(world: World, https: Server, http: Server) -> None:
    sandbox = await world.create({"rules": [rule(), {**rule(headers=[HEADER]), "name": "wild", "match_hosts": ["*.wild.test"]}]})
    url = f"https://api.test:{https.port}"
    code = "curl -s -o /dev/null -w '%{http_code} '"
    tricks = {
        f"{code} http://api.test:{http.port}/": "403 ",  # a secret would go unencrypted
        f"{code} {url}/": "403 ",  # the workspace secret is not there
        f"{code} -H 'Host: other.test' {url}/": "421 ",
        f"{code} -H 'Host:' {url}/": "400 ",
        f"{code} --request-target http://other.test/ {url}/": "421 ",
        f"{code} --connect-to other.test:443:api.test:{https.port} -k https://other.test/": "000 ",  # SNI is not the host
        f"openssl s_client -noservername -connect api.test:{https.port} </dev/null 2>/dev/null | grep -c BEGIN": "0\n",
    }
    for command, outcome in tricks.items():
        assert (await world.run(sandbox, command)).out == outcome, command
    assert https.seen == http.seen == []
    world.boxes.egress.secrets.put("WORK", WORKSPACE)
    spellings = ("api.test", "API.TEST", "api.test.", "Api.Test.")
    urls = " ".join(f"https://{name}:{https.port}/" for name in spellings)
    await world.ok(sandbox, f"curl -sS {urls} https://a.wild.test:{https.port}/ http://a.wild.test:{http.port}/")
    assert https.headers("x-plain") == ["seen by all"] * 5
    assert http.headers("x-plain") == ["seen by all"]
    reasons = {entry["reason"] for entry in world.decisions(sandbox) if entry["verdict"] == "deny"}
    assert any("not sent without TLS" in reason for reason in reasons)
    assert any("no workspace secret WORK" in reason for reason in reasons)
    assert "TLS without a server name" in reasons


async def test_a_server_that_is_not_trusted_gets_nothing(world: World, https: Server, address: str) -> None:
    world.names["wrong.test"] = [address]  # its certificate is for other names
    sandbox = await world.create({"rules": [rule(match_hosts=["wrong.test"], headers=[HEADER])]})
    assert (await world.run(sandbox, f"curl -sk https://wrong.test:{https.port}/")).code != 0
    assert https.seen == []
    entry = await world.until(sandbox, kind="tls", verdict="deny")
    assert "the server's TLS" in entry["reason"]


async def test_changes_count_at_once_and_spare_what_still_matches(world: World, https: Server) -> None:
    sandbox = await world.create({"rules": [rule(headers=[HEADER, SECRET])]})
    process = await spawned(
        world,
        sandbox,
        f"""
import http.client, ssl, sys
kept = http.client.HTTPSConnection("api.test", {https.port})
other = http.client.HTTPSConnection("other.test", {https.port}, context=ssl._create_unverified_context())
for connection in (kept, other):
    connection.request("GET", "/before")
    connection.getresponse().read()
print("ready", flush=True)
sys.stdin.readline()
kept.request("GET", "/after")
print(kept.getresponse().status, flush=True)
try:
    other.request("GET", "/after")
    print(other.getresponse().status)
except OSError:
    print("ended")
""",
    )
    assert await process.line() == "ready\n"
    again = shown(sandbox.record.proxy_config)
    assert again is not None
    again["rules"][0]["headers"][0]["value"] = "changed"
    await world.patch(sandbox, {**again, "access_control": {"deny_list": ["other.test"]}})
    process.go_on()
    assert [await process.line(), await process.line()] == ["200\n", "ended\n"]
    assert https.headers("x-plain") == ["seen by all", None, "changed"]
    assert https.headers("authorization") == [f"Bearer {OPAQUE}", None, f"Bearer {OPAQUE}"]  # kept: it was not repeated
    assert https.seen[0]["peer"] == https.seen[2]["peer"]
    await world.boxes.stop(sandbox)
    with pytest.raises(ServiceError) as caught:
        await world.patch(sandbox, {})
    assert (caught.value.status, caught.value.error) == (400, "InvalidRequest")


async def test_java_reads_the_trust_store(world: World, tmp_path: Path) -> None:
    """This machine's Java: its settings in /etc are not in the default snapshot."""
    keytool = shutil.which("keytool")
    if keytool is None:
        pytest.skip("Java is not installed")
    sandbox = await world.create({"rules": [rule(headers=[HEADER])]})
    assert "-Djavax.net.ssl.trustStore=/run/gatewayd/truststore.p12" in await world.ok(sandbox, "echo $JAVA_TOOL_OPTIONS")
    assert sandbox.run is not None
    fd, _ = await sandbox.run.box.open_read("/run/gatewayd/truststore.p12")
    (tmp_path / "store").write_bytes(os.pread(fd, 1 << 22, 0))
    os.close(fd)
    command = [keytool, "-list", "-keystore", str(tmp_path / "store"), "-storepass", "changeit"]
    listed = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, check=False)
    assert listed.stdout.count("trustedCertEntry") > 10, listed

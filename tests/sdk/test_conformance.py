"""Every public method of the SDK's own sandbox clients, in both forms: one call that succeeds, one that fails."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from langsmith import AsyncLangsmith, Langsmith
from langsmith import sandbox as sdk

from tests.images.maker import Image, Layer
from tests.sdk.conformance import FAILED, OK, REFUSED, World, finished, seen

if TYPE_CHECKING:
    from tests.sdk.conftest import Service

# the SDK calls websockets' connect() in a way that newer websockets deprecate
pytestmark = pytest.mark.filterwarnings(r"ignore:connect\(\) must be used as a context manager:DeprecationWarning")

NOBODY = "nobody-has-this-name"
NOT_FOUND, REFUSAL = sdk.ResourceNotFoundError, sdk.ValidationError


@pytest.fixture(params=["sync", "async"])
async def world(request: pytest.FixtureRequest, service: Service) -> AsyncIterator[World]:
    """Both forms of the SDK in turn."""
    if request.param == "sync":
        with service.client() as client, Langsmith(api_key=service.key, base_url=service.endpoint, max_retries=0) as generated:
            yield World("sync", client, generated)
    else:
        async with (
            service.async_client() as client,
            AsyncLangsmith(api_key=service.key, base_url=service.endpoint, max_retries=0) as generated,
        ):
            yield World("async", client, generated)
    finished.add(f"{request.module.__name__.rpartition('.')[2]}.{request.node.name}")


def stranger(world: World, service: Service) -> Any:
    """The same client with a wrong key."""
    kind = sdk.SandboxClient if world.mode == "sync" else sdk.AsyncSandboxClient
    return kind(api_endpoint=f"{service.endpoint}/v2/sandboxes", api_key="wrong")


async def closed(world: World, client: Any) -> None:
    """Close a client, twice."""
    for _ in range(2):
        await world.ok(client.close if hasattr(client, "close") else client.aclose)


async def test_boxes(world: World, name: str) -> None:
    client = world.client
    made = await world.ok(client.create_sandbox, name=name, labels={"a": "b"}, wait_for_ready=False)
    await world.fails(client.create_sandbox, sdk.SandboxClientError, "already in use", name=name)
    await world.fails(client.create_sandbox, REFUSAL, "name", name="Not A Name")
    await world.fails(client.sandbox, REFUSAL, "greater than or equal to 1", vcpus=0)
    assert (await world.ok(client.wait_for_sandbox, name, poll_interval=0.01)).status == "ready"
    assert (await world.ok(client.get_sandbox, name)).id == made.id
    assert [made.id] == [box.id for box in await world.ok(client.list_sandboxes) if box.name == name]
    assert (await world.ok(client.update_sandbox, name, idle_ttl_seconds=120)).idle_ttl_seconds == 120
    await world.ok(client.stop_sandbox, name)
    assert (await world.ok(client.get_sandbox_status, name)).status == "stopped"
    assert (await world.ok(client.start_sandbox, name)).status == "ready"
    await world.ok(client.delete_sandbox, name)
    for method in (client.wait_for_sandbox, client.get_sandbox, client.get_sandbox_status, client.start_sandbox):
        await world.fails(method, NOT_FOUND, name, name)
    for method in (client.stop_sandbox, client.delete_sandbox):
        await world.fails(method, NOT_FOUND, name, name)
    await world.fails(client.update_sandbox, NOT_FOUND, name, name, idle_ttl_seconds=120)


async def test_a_wrong_key(world: World, service: Service) -> None:
    async with world.inside(stranger(world, service)) as client:
        for method in (client.list_sandboxes, client.list_snapshots):
            await world.fails(method, sdk.SandboxAuthenticationError, "API key is wrong")


async def test_the_other_form(world: World, name: str) -> None:
    async with world.sandbox(name=name) as made:
        if world.mode == "sync":
            other = await world.ok(world.client.to_async)
            twin = await world.ok(made.to_async, client=other)
        else:
            other = await world.ok(world.client.to_sync)
            twin = await world.ok(made.to_sync, client=other)
        assert (await world.settle(twin.run("echo twin"))).stdout == "twin\n"
        await closed(world, other)
        await world.get(world.client, "registries")
        again = await world.ok(
            type(made).from_dict, data={"name": made.name, "dataplane_url": made.dataplane_url}, client=world.client
        )
        assert (await world.ok(again.run, "echo again")).stdout == "again\n"


async def test_run(world: World, name: str) -> None:
    async with world.sandbox(name=name) as made:
        result = await world.ok(made.run, "echo out; echo err >&2; exit 3")
        assert (result.stdout, result.stderr, result.exit_code) == ("out\n", "err\n", 3)
        assert not await world.get(result, "success")
        await world.fails(made.run, sdk.CommandTimeoutError, "timed out|timeout", "sleep 1000", timeout=1)
        await world.fails(made.run, sdk.SandboxOperationError, "nowhere", "true", cwd="/nowhere")
        config = sdk.RunConfig(work_dir="/tmp", env_vars={"A": "b"})
        assert (await world.ok(made.run, "pwd; echo $A", run_config=config)).stdout == "/tmp\nb\n"
        assert await world.ok(sdk.RunConfig.from_dict, await world.ok(config.to_payload)) == config


async def test_handles(world: World, name: str) -> None:
    async with world.sandbox(name=name) as made:
        handle = await world.ok(made.run, "cat; echo end >&2", wait=False, close_input=False)
        command, pid = await world.get(handle, "command_id"), await world.get(handle, "pid")
        assert command
        assert pid > 0
        await world.ok(handle.send_input, "größe\n")
        await world.ok(handle.close_input)
        await world.fails(handle.send_input, sdk.SandboxOperationError, "stdin is closed", "x")
        chunks = [(chunk.stream, chunk.data) async for chunk in world.each(handle)]
        assert sorted(chunks) == [("stderr", "end\n"), ("stdout", "größe\n")]
        assert (await world.get(handle, "last_stdout_offset"), await world.get(handle, "last_stderr_offset")) == (8, 4)
        assert (await world.get(handle, "result")).exit_code == 0
        again = await world.ok(made.reconnect, command, stdout_offset=2)
        assert (await world.get(again, "result")).stdout == "öße\n"
        rest = await world.ok(handle.reconnect)
        assert (await world.get(rest, "result")).stdout == ""
        running = await world.ok(made.run, "echo started; exec sleep 1000", wait=False)
        await world.ok(running.kill)
        assert (await world.settle((await world.ok(made.reconnect, running.command_id)).result)).exit_code == 137


async def test_handles_fail(world: World, name: str) -> None:
    async with world.sandbox(name=name) as made:
        for use in ("result", "iteration"):
            late = await world.ok(made.run, "sleep 1000", wait=False, timeout=1)
            if use == "result":
                await world.get_fails(late, "result", sdk.CommandTimeoutError, "timed out|timeout")
            else:
                with pytest.raises(sdk.CommandTimeoutError):
                    assert [chunk async for chunk in world.each(late)] == []
        gone = await world.ok(made.run, "true", wait=False, ttl_seconds=0)
        assert (await world.settle(gone.result)).exit_code == 0
        for method, args in ((made.reconnect, ("no-such-command",)), (gone.reconnect, ())):

            async def result(method: Any = method, args: Any = args) -> Any:
                return await world.settle((await world.settle(method(*args))).result)

            with pytest.raises(sdk.SandboxOperationError, match=r"(?i)not found|expired"):
                await result()
            seen[f"{type(method.__self__).__name__}.reconnect"].add(FAILED)


async def test_files(world: World, name: str) -> None:
    async with world.sandbox(name=name) as made:
        await world.ok(made.write, "/srv/a/file.txt", b"\x00needle\nhay\n")
        await world.ok(made.write, "/srv/a/text.txt", "hay\nneedle\n")
        assert await world.ok(made.read, "/srv/a/file.txt") == b"\x00needle\nhay\n"
        stat = await world.ok(made.stat, "/srv/a/file.txt")
        assert stat.size_bytes == 12
        part = await world.ok(made.read_range, "/srv/a/file.txt", start=1, end=6, if_range=stat.etag)
        assert (part.content, part.partial, await world.get(part, "end")) == (b"needle", True, 7)
        unchanged = await world.ok(made.read_range, "/srv/a/file.txt", start=0, if_none_match=stat.etag)
        assert unchanged.unchanged
        for method in (made.read, made.stat):
            await world.fails(method, NOT_FOUND, "missing", "/srv/missing")
        await world.fails(made.read_range, NOT_FOUND, "missing", "/srv/missing", start=0)
        await world.fails(made.read_range, sdk.SandboxOperationError, "416|range", "/srv/a/file.txt", start=100)
        await world.fails(made.write, sdk.SandboxOperationError, "directory|folder", "/srv/a", b"a folder is there")


async def test_searching_files(world: World, name: str) -> None:
    async with world.sandbox(name=name) as made:
        await world.ok(made.write, "/srv/a/one.txt", "hay\nneedle\n")
        await world.ok(made.write, "/srv/a/b/two.txt", "hay\n")
        found = await world.ok(made.glob, "**/*.txt", "/srv/a")
        assert sorted(entry.path for entry in found) == ["/srv/a/b/two.txt", "/srv/a/one.txt"]
        assert sorted(entry.path for entry in await world.ok(made.ls, "/srv/a")) == ["/srv/a/b", "/srv/a/one.txt"]
        [match] = await world.ok(made.grep, "needle", "/srv/a")
        assert (match.path, match.line) == ("/srv/a/one.txt", 2)
        for kind in (sdk.GlobResult, sdk.GrepResult):
            assert [*await world.ok(kind.from_dict, {"matches": []})] == []
            seen[f"{kind.__name__}.__iter__"].add(OK)
        for method, args in ((made.glob, ("*", "/nowhere")), (made.ls, ("/nowhere",)), (made.grep, ("x", "/nowhere"))):
            await world.fails(method, sdk.SandboxClientError, "nowhere", *args)


async def test_a_sandbox_of_its_own(world: World, name: str) -> None:
    made = await world.ok(world.client.create_sandbox, name=name)
    await world.ok(made.stop)
    await world.ok(made.start)
    assert made.status == "ready"
    await world.ok(made.delete)
    for method in (made.start, made.stop, made.delete):
        await world.fails(method, NOT_FOUND, name)


async def test_tunnels(world: World, name: str) -> None:
    async with world.sandbox(name=name) as made:
        await world.ok(made.run, "socat TCP-LISTEN:7000,fork EXEC:cat >/dev/null 2>&1 </dev/null &")
        await world.ok(made.run, "until grep -q ':1B58 00' /proc/net/tcp; do sleep 0.02; done", timeout=10)
        await world.fails(made.tunnel, ValueError, "remote_port", 0)
        tunnel = await world.ok(made.tunnel, 7000, local_port=free_port())
        async with world.inside(tunnel):
            assert await world.get(tunnel, "remote_port") == 7000
            assert await echo(await world.get(tunnel, "local_port"), b"there and back") == b"there and back"
        await world.ok(tunnel.close)
        async with world.inside(await world.ok(made.tunnel, 7001, local_port=free_port())) as nothing:
            assert await echo(nothing.local_port, b"nobody listens") == b""


def free_port() -> int:
    """A free local port. The SDK's own choice is the remote port's number, which a closed tunnel may still hold."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


async def echo(port: int, data: bytes) -> bytes:
    """What a local port answers before it closes."""
    async with asyncio.timeout(20):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(data)
        try:
            return await reader.readexactly(len(data))
        except (asyncio.IncompleteReadError, ConnectionResetError):
            return b""
        finally:
            writer.close()


async def test_snapshots(world: World, name: str, tmp_path: Path) -> None:
    client = world.client
    [snapshot] = await world.ok(client.list_snapshots, name_contains="default")
    assert (await world.ok(client.get_snapshot, snapshot.id)).name == "default"
    assert (await world.ok(client.wait_for_snapshot, snapshot.id)).status == "ready"
    assert [tag.tag for tag in await world.ok(client.list_snapshot_tags, "default")] == ["latest"]
    for method in (client.get_snapshot, client.wait_for_snapshot, client.list_snapshot_tags):
        await world.fails(method, NOT_FOUND, NOBODY, NOBODY)
    await world.fails(client.delete_snapshot, sdk.SandboxClientError, "cannot be deleted", snapshot.id)
    await world.fails(client.create_snapshot, REFUSAL, "must be an image", name, "Not An Image", 1 << 30)
    built = await world.ok(client.create_snapshot, name, archive_of(tmp_path), 64 << 20, tag="v1")
    assert (built.status, built.tags) == ("ready", ["v1"])
    (tmp_path / "Dockerfile").write_text("FROM scratch\n")
    # the SDK builds with BuildKit in a sandbox of its own; there is none in this service's one snapshot
    await world.refused(
        client.create_snapshot_from_dockerfile, sdk.ResourceCreationError, "build failed", name, "Dockerfile", context=tmp_path
    )
    async with world.sandbox(name=name, snapshot=f"{name}:v1") as made:
        assert made.snapshot_id == built.id
        assert await world.settle(made.read("/note")) == b"hello"
        await world.fails(client.delete_snapshot, sdk.SandboxClientError, "is used by", built.id)
        first = await world.ok(client.capture_snapshot, name, f"{name}-captured")
        second = await world.ok(made.capture_snapshot, f"{name}-captured")
        await world.fails(client.capture_snapshot, REFUSAL, "there is no Docker", name, "exported", docker_image="app")
        await world.fails(made.capture_snapshot, REFUSAL, "a name has", "Not A Name")
    assert (await world.settle(client.get_snapshot(first.id))).tags == []
    assert (await world.settle(client.get_snapshot(f"{name}-captured"))).id == second.id
    for one in (built, first, second):
        await world.ok(client.delete_snapshot, one.id)


def archive_of(folder: Path) -> str:
    """An image of one file."""
    layer = Layer().add("note", b"hello").content()
    return f"oci-archive:{Image([layer]).archive(folder / 'image.tar')}"


async def test_links(world: World, name: str) -> None:
    async with world.sandbox(name=name) as made:
        await world.refused(world.client.service, REFUSAL, "use a tunnel", name, 8000)
        await world.refused(made.service, REFUSAL, "use a tunnel", 8000)
        await world.refused(world.client.generate_download_url, REFUSAL, "use /download", name, "/file")
        await world.refused(made.generate_download_url, REFUSAL, "use /download", "/file")


async def test_proxies(world: World, name: str) -> None:
    """What the SDK's builders make is kept; secrets stay where they are."""
    headers = [{"name": "X-Key", **sdk.opaque_secret("x")}, {"name": "X-Other", **sdk.workspace_secret("OTHER")}]
    rule = {"name": "r", "match_hosts": ["example.com"], "headers": headers}
    config = sdk.proxy_config(rules=[rule, sdk.attribution(headers={"X-User": "me"})])
    async with world.sandbox(name=name, proxy_config=config):
        await world.ok(world.client.update_sandbox, name, proxy_config=config)
        await world.ok(world.client.stop_sandbox, name)
        with pytest.raises(sdk.SandboxNotReadyError):
            await world.settle(world.client.update_sandbox(name, proxy_config=config))
    for builder in ("proxy_config", "opaque_secret", "workspace_secret", "attribution"):
        seen[builder].add(OK)


async def test_mounts_and_clouds(world: World) -> None:
    """What the SDK's builders make is refused, with the field's name, and no sandbox is made."""
    aws = sdk.aws_auth(access_key_id=sdk.opaque_secret("a"), secret_access_key=sdk.opaque_secret("b"))
    gcp = sdk.gcp_auth(service_account_json=sdk.opaque_secret("{}"), scopes=["s"])
    cases: dict[str, dict[tuple[str, ...], Any]] = {
        "proxy_config": {
            ("aws_auth",): sdk.proxy_config(rules=[aws]),
            ("gcp_auth",): sdk.proxy_config(rules=[gcp]),
        },
        "mount_config": {
            ("mount_config", "s3_mount"): sdk.mount_config(
                mounts=[sdk.s3_mount(id="m", mount_path="/mnt/m", bucket="bucket")],
                auth=[aws],
            ),
            ("git_mount",): sdk.mount_config(
                mounts=[sdk.git_mount(id="m", mount_path="/mnt/m", remote_url="https://example.com/x.git")]
            ),
            ("gcs_mount",): sdk.mount_config(
                mounts=[sdk.gcs_mount(id="m", mount_path="/mnt/m", bucket="bucket")],
                auth=[gcp],
            ),
            ("context_hub_mount",): sdk.mount_config(mounts=[sdk.context_hub_mount(id="m", mount_path="/mnt/m", repo="a/b")]),
        },
    }
    for field, configs in cases.items():
        for builders, config in configs.items():
            error = await world.fails(world.client.create_sandbox, REFUSAL, "not available", **{field: config})
            assert error.field == (0 if field == "proxy_config" else field)  # the rule's place in it
            for builder in builders:
                seen[builder].add(REFUSED)
    more: tuple[dict[str, Any], ...] = ({"preserve_memory_on_stop": True}, {"restore_memory": True}, {"persistent": False})
    for options in more:
        [field] = options
        assert (await world.fails(world.client.create_sandbox, REFUSAL, "not available", **options)).field == field

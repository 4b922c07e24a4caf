"""The generated resources of the SDK (`Langsmith().sandboxes`), in both forms: one call that succeeds, one that fails."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import langsmith

from tests.sdk.conformance import FAILED, OK, World, seen
from tests.sdk.test_conformance import world

if TYPE_CHECKING:
    from tests.sdk.conftest import Service

__all__ = ["world"]  # the fixture

NOBODY = "nobody-has-this-name"
NOT_FOUND, UNPROCESSABLE = langsmith.NotFoundError, langsmith.UnprocessableEntityError


async def everything(world: World, page: Any) -> list[Any]:
    """All items of a list call, page by page, by the SDK's own pagination."""
    if world.mode == "sync":
        return list(page)
    return [item async for item in page]


async def test_boxes(world: World, name: str) -> None:
    boxes = await world.get(world.generated.sandboxes, "boxes")
    made = await world.ok(boxes.create, name=name, labels={"run": name})
    await world.fails(boxes.create, langsmith.ConflictError, "already in use", name=name)
    await world.fails(boxes.create, UNPROCESSABLE, "vcpus", vcpus=0)
    assert (await world.ok(boxes.retrieve, name)).id == made.id
    assert (await world.ok(boxes.start, name)).status == "ready"
    assert (await world.ok(boxes.get_status, name)).status == "ready"
    assert (await world.ok(boxes.update, name, idle_ttl_seconds=120)).idle_ttl_seconds == 120
    other = await world.ok(boxes.create, name=f"{name}-2", labels={"run": name})
    page = boxes.list(label=[f"run={name}"], page_size=1, sort_by="name")  # two pages: the cursor is followed
    assert [box.id for box in await everything(world, page)] == [made.id, other.id]
    seen[f"{type(boxes).__name__}.list"].add(OK)
    await world.fails(boxes.list, UNPROCESSABLE, "limit", limit=0)
    await world.ok(boxes.stop, name)
    for one in (made, other):
        await world.ok(boxes.delete, one.name)
    for method in (boxes.retrieve, boxes.start, boxes.stop, boxes.get_status, boxes.update, boxes.delete):
        await world.fails(method, NOT_FOUND, name, name)


async def test_what_boxes_do_not_do(world: World, name: str) -> None:
    boxes = world.generated.sandboxes.boxes
    await world.settle(boxes.create(name=name))
    await world.refused(boxes.generate_service_url, UNPROCESSABLE, "use a tunnel", name, port=80)
    await world.refused(boxes.delete_service_url, NOT_FOUND, "no port 80 of sandbox", name, port=80)
    assert await everything(world, boxes.list_service_urls(name)) == []
    seen[f"{type(boxes).__name__}.list_service_urls"].add(OK)
    await world.fails(boxes.list_service_urls, NOT_FOUND, NOBODY, NOBODY)
    await world.refused(boxes.generate_download_url, UNPROCESSABLE, "use /download", name, path="/file")
    await world.settle(boxes.delete(name))


async def test_snapshots(world: World, name: str) -> None:
    snapshots = await world.get(world.generated.sandboxes, "snapshots")
    [snapshot] = await everything(world, snapshots.list(name_contains="default"))
    seen[f"{type(snapshots).__name__}.list"].add(OK)
    assert (await world.ok(snapshots.retrieve, snapshot.id)).name == "default"
    assert [tag.tag for tag in (await world.ok(snapshots.retrieve_by_name, "default")).tags] == ["latest"]
    await world.fails(snapshots.list, UNPROCESSABLE, "limit", limit=0)
    await world.fails(snapshots.retrieve, NOT_FOUND, NOBODY, NOBODY)
    await world.fails(snapshots.retrieve_by_name, NOT_FOUND, NOBODY, NOBODY)
    bad = {"docker_image": "Not An Image", "name": name}
    await world.fails(snapshots.create, UNPROCESSABLE, "must be an image", **bad, fs_capacity_bytes=1 << 30)
    await world.fails(snapshots.delete, UNPROCESSABLE, "cannot be deleted", snapshot.id)
    nowhere = "oci-archive:/nowhere/image.tar"
    made = await world.ok(snapshots.create, name=name, docker_image=nowhere, fs_capacity_bytes=1 << 30)
    await world.ok(snapshots.delete, made.id)
    boxes = world.generated.sandboxes.boxes
    await world.settle(boxes.create(name=name))
    captured = await world.ok(boxes.create_snapshot, name, body_name=name, tag="v1")
    found = await world.settle(world.client.wait_for_snapshot(captured.id, poll_interval=0.05))
    assert (found.status, found.tags) == ("ready", ["v1"])
    await world.fails(boxes.create_snapshot, UNPROCESSABLE, "include_memory", name, body_name=name, include_memory=True)
    await world.settle(boxes.delete(name))
    await world.settle(snapshots.delete(captured.id))


async def test_registries(world: World, name: str) -> None:
    registries = await world.get(world.generated.sandboxes, "registries")
    account = {"url": "registry.example.com", "username": "robot", "password": "x"}
    made = await world.ok(registries.create, name=name, **account)
    await world.fails(registries.create, langsmith.ConflictError, "already in use", name=name, **account)
    assert (await world.ok(registries.retrieve, name)).id == made.id
    assert (await world.ok(registries.update, name, url="other.example.com")).url == "other.example.com"
    assert [one.name for one in (await world.ok(registries.list)).registries] == [name]
    await world.fails(registries.list, UNPROCESSABLE, "limit", limit=0)
    await world.ok(registries.delete, name)
    for method in (registries.retrieve, registries.update, registries.delete):
        await world.fails(method, NOT_FOUND, "not found", name)


async def test_raw_and_streamed_answers(world: World) -> None:
    sandboxes = world.generated.sandboxes
    for owner, part, method, good in (
        (sandboxes, "boxes", "list", ()),
        (sandboxes.boxes, "", "list", ()),
        (sandboxes.snapshots, "", "retrieve", ("default",)),
        (sandboxes.registries, "", "list", ()),
    ):
        for form in ("with_raw_response", "with_streaming_response"):
            view = await world.get(owner, form)
            call = getattr(getattr(view, part) if part else view, method)
            assert await status(world, form, call(*good)) == 200
            bad: dict[str, Any] = {"limit": 0} if method == "list" else {}
            try:
                await status(world, form, call(*(() if bad else (NOBODY,)), **bad))
            except langsmith.APIStatusError as error:
                assert error.status_code == (422 if bad else 404)  # noqa: PT017 - sync and async calls fail at different places
                seen[f"{type(owner).__name__}.{form}"].add(FAILED)


async def status(world: World, form: str, value: Any) -> int:
    """The status of an answer, raw or streamed."""
    if form == "with_raw_response":
        return int((await world.settle(value)).status_code)
    if world.mode == "sync":
        with value as answer:
            return int(answer.status_code)
    async with value as answer:
        return int(answer.status_code)


async def test_a_wrong_key(world: World, service: Service) -> None:
    boxes = world.generated.with_options(api_key="wrong").sandboxes.boxes
    await world.fails(boxes.retrieve, langsmith.AuthenticationError, "API key is wrong", NOBODY)

"""The routes about snapshots (protocol section 1)."""

from __future__ import annotations

from operator import attrgetter
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request, Response

from gatewayd.local.description import answers
from gatewayd.local.imagemodels import CaptureBody, SnapshotBody
from gatewayd.local.listing import Order
from gatewayd.local.records import SnapshotRecord
from gatewayd.local.rest_server import Cursor, Direction, boxes_of, has_label
from gatewayd.local.snapshots import Snapshots

MAX_PAGE = 500

router = APIRouter()


def snapshots_of(request: Request) -> Snapshots:
    """The service's snapshots."""
    return boxes_of(request).snapshots


def view(snapshots: Snapshots, record: SnapshotRecord) -> dict[str, Any]:
    """A snapshot as answered."""
    progress = snapshots.progress(record)
    config = record.image_config
    return {
        "id": record.id,
        "name": record.name,
        "status": record.status,
        "status_message": record.status_message or (progress.text() if progress is not None else None),
        "description": record.description,
        "docker_image": record.docker_image,
        "image_digest": record.image_digest,
        "fs_capacity_bytes": record.fs_capacity_bytes,
        "fs_used_bytes": snapshots.size(record),
        "source_sandbox_id": record.source_sandbox_id,
        "registry_id": record.registry_id,
        "created_at": record.created_at or None,
        "updated_at": record.updated_at or None,
        "created_by": None,
        "tags": list(record.tags),
        "labels": dict(record.labels),
        "run_config": record.run_config,
        "image_config": None if not config else {"entrypoint": config.get("entrypoint", []), "cmd": config.get("cmd", [])},
        "progress": progress.view() if progress is not None else None,
    }


@router.post("/snapshots", responses=answers("SnapshotView", 404, 507))
async def build_snapshot(request: Request, body: SnapshotBody) -> dict[str, Any]:
    """Begin to build a snapshot from a container image. Its `status` and `progress` tell how it goes."""
    snapshots = snapshots_of(request)
    return view(snapshots, await snapshots.settled(snapshots.build(body)))


@router.post("/boxes/{name}/snapshot", responses=answers("SnapshotView", 404, 409, 507))
async def capture_snapshot(request: Request, name: str, body: CaptureBody) -> dict[str, Any]:
    """Begin to capture a sandbox's files: of a running one, as they are at one moment. Nothing below /tmp, and no processes."""
    snapshots = snapshots_of(request)
    return view(snapshots, await snapshots.settled(snapshots.capture(boxes_of(request).get(name), body)))


@router.get("/snapshots", responses=answers("SnapshotList"))
async def list_snapshots(
    request: Request,
    limit: Annotated[int, Query(ge=1, le=MAX_PAGE)] = 50,
    offset: Annotated[int, Query(ge=0)] = 0,
    page_size: Annotated[int | None, Query(ge=1, le=MAX_PAGE)] = None,
    cursor: Cursor = None,
    name_contains: str | None = None,
    status: Literal["building", "ready", "failed", "deleting"] | None = None,
    sort_by: Literal["name", "status", "created_at"] = "created_at",
    sort_direction: Direction | None = None,
    sort_order: Direction | None = None,
    label: Annotated[list[str] | None, Query(max_length=64)] = None,
    created_by: Annotated[Literal["me"] | None, Query(description="all snapshots here are yours")] = None,
) -> dict[str, Any]:
    """List snapshots: filtered, sorted (newest first unless said otherwise), a page at a time."""
    snapshots = snapshots_of(request)
    found = [
        record
        for record in snapshots.all()
        if (not name_contains or name_contains.lower() in record.name.lower())
        and status in (None, record.status)
        and all(has_label(record.labels, wanted) for wanted in label or ())
    ]
    descending = (sort_order or sort_direction or ("desc" if sort_by == "created_at" else "asc")) == "desc"
    order = Order[SnapshotRecord](sort_by, descending, attrgetter(sort_by), attrgetter("id"))
    page = order.page(found, page_size or limit, cursor=cursor, offset=offset)
    shown = [view(snapshots, record) for record in page.entries]
    return {"snapshots": shown, "items": shown, "next_cursor": page.next_cursor, "offset": page.offset}


@router.get("/snapshots/{reference:path}", responses=answers("SnapshotView", 404))
async def get_snapshot(request: Request, reference: str) -> dict[str, Any]:
    """A snapshot by id, name:tag or name: its `latest`, else its newest one without a tag."""
    snapshots = snapshots_of(request)
    return view(snapshots, snapshots.get(reference))


@router.delete("/snapshots/{reference:path}", status_code=204, responses=answers(None, 404, 409, 422))
async def delete_snapshot(request: Request, reference: str) -> Response:
    """Delete a snapshot that no sandbox is made from; one that is being made is given up."""
    await snapshots_of(request).delete(reference)
    return Response(status_code=204)


@router.get("/snapshots-by-name/{name:path}", responses=answers("SnapshotTags", 404))
async def get_snapshot_tags(request: Request, name: str) -> dict[str, Any]:
    """The tags of a snapshot name."""
    found = [(tag, record.id) for record in snapshots_of(request).tags(name) for tag in record.tags]
    return {"name": name, "tags": [{"tag": tag, "snapshot_id": identity} for tag, identity in sorted(found)]}

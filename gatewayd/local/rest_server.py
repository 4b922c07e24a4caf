"""The control plane's routes (protocol section 1), the same under /v2/sandboxes and /api/v2/sandboxes."""

from __future__ import annotations

from collections.abc import Mapping
from operator import attrgetter
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request, Response
from pydantic import AfterValidator

from gatewayd.local.boxes import Boxes
from gatewayd.local.description import answers
from gatewayd.local.listing import MAX_CURSOR, Order
from gatewayd.local.models import DEFAULT_SNAPSHOT_ID, CreateBody, PatchBody
from gatewayd.local.proxyconfig import shown
from gatewayd.local.store import Record

PREFIXES = ("/v2/sandboxes", "/api/v2/sandboxes")  # the SDK's own client; the generated clients
MAX_PAGE = 1000  # sandboxes in one answer; also the page when none is asked for, since the SDK reads only one

router = APIRouter()

SortKey = Literal["name", "status", "created_at", "stopped_at", "idle_ttl_seconds", "delete_after_stop_seconds"]
StatusName = Literal["provisioning", "ready", "failed", "stopped", "deleting"]
Direction = Literal["asc", "desc"]
Cursor = Annotated[str | None, Query(min_length=1, max_length=MAX_CURSOR)]


def _no_tags(value: list[str] | None) -> list[str] | None:
    if value:
        raise ValueError("this service has no resource tags; use labels")
    return value


NoTags = Annotated[list[str] | None, Query(), AfterValidator(_no_tags)]


def boxes_of(request: Request) -> Boxes:
    """The service's sandboxes."""
    boxes: Boxes = request.app.state.boxes
    return boxes


def view(record: Record, request: Request) -> dict[str, Any]:
    """A sandbox as answered. What this service does not have is null."""
    millicores = record.millicores
    vcpus = None if millicores is None else millicores / 1000
    return {
        "id": record.id,
        "name": record.name,
        "status": record.status,
        "status_message": record.status_message,
        # from the request, so that it holds when the port changed; by id, so that it survives a rename
        "dataplane_url": f"{request.url.scheme}://{request.headers['host']}/dataplane/{record.id}",
        "created_at": record.created_at,
        "updated_at": record.updated_at,
        "created_by": None,
        "idle_ttl_seconds": record.idle_ttl_seconds,
        "delete_after_stop_seconds": record.delete_after_stop_seconds,
        "stopped_at": record.stopped_at,
        "snapshot_id": record.snapshot_id or DEFAULT_SNAPSHOT_ID,
        "vcpus": int(vcpus) if vcpus is not None and vcpus.is_integer() else vcpus,
        "cpu_millicores": millicores,
        "mem_bytes": record.mem_bytes,
        "fs_capacity_bytes": record.fs_capacity_bytes,
        "size_class": None,
        "labels": dict(record.labels),
        "run_config": record.run_config,
        "proxy_config": shown(record.proxy_config),
        "mount_config": None,
        "preserve_memory_on_stop": False,
        "persistent": True,
    }


@router.post("/boxes", responses=answers("SandboxView", 408, 409, 503, 507))
async def create_box(request: Request, body: CreateBody) -> dict[str, Any]:
    """Create a sandbox and start it."""
    sandbox = await boxes_of(request).create(body)
    return view(sandbox.record, request)


@router.get("/boxes", responses=answers("SandboxList"))
async def list_boxes(
    request: Request,
    limit: Annotated[int | None, Query(ge=1, le=MAX_PAGE)] = None,
    offset: Annotated[int, Query(ge=0)] = 0,
    page_size: Annotated[int | None, Query(ge=1, le=MAX_PAGE)] = None,
    cursor: Cursor = None,
    name_contains: str | None = None,
    status: StatusName | None = None,
    sort_by: SortKey = "created_at",
    sort_direction: Direction | None = None,
    sort_order: Direction | None = None,
    label: Annotated[list[str] | None, Query(max_length=64)] = None,
    created_by: Annotated[Literal["me"] | None, Query(description="all sandboxes here are yours")] = None,
    tag_value_id: NoTags = None,
) -> dict[str, Any]:
    """List sandboxes: filtered, sorted (newest first unless said otherwise), a page at a time."""
    records = [
        sandbox.record
        for sandbox in boxes_of(request).all()
        if (not name_contains or name_contains.lower() in sandbox.record.name)
        and (status is None or sandbox.record.status == status)
        and all(has_label(sandbox.record.labels, wanted) for wanted in label or ())
    ]
    descending = (sort_order or sort_direction or ("desc" if sort_by == "created_at" else "asc")) == "desc"
    order = Order[Record](sort_by, descending, attrgetter(sort_by), attrgetter("id"))
    page = order.page(records, page_size or limit or MAX_PAGE, cursor=cursor, offset=offset)
    shown = [view(record, request) for record in page.entries]
    return {"sandboxes": shown, "items": shown, "next_cursor": page.next_cursor, "offset": page.offset}


def has_label(labels: Mapping[str, str], wanted: str) -> bool:
    """`key` for its presence, `key=value` for its value."""
    key, equals, value = wanted.partition("=")
    return key in labels and (not equals or labels[key] == value)


@router.get("/boxes/{name}", responses=answers("SandboxView", 404))
async def get_box(request: Request, name: str) -> dict[str, Any]:
    """One sandbox."""
    return view(boxes_of(request).get(name).record, request)


@router.get("/boxes/{name}/status", responses=answers("SandboxStatus", 404))
async def get_box_status(request: Request, name: str) -> dict[str, Any]:
    """Its status alone, cheap to poll."""
    record = boxes_of(request).get(name).record
    return {"status": record.status, "status_message": record.status_message}


@router.patch("/boxes/{name}", responses=answers("SandboxView", 400, 404, 409, 507))
async def update_box(request: Request, name: str, body: PatchBody) -> dict[str, Any]:
    """Change a sandbox."""
    boxes = boxes_of(request)
    sandbox = boxes.get(name)
    await boxes.update(sandbox, body)
    return view(sandbox.record, request)


@router.delete("/boxes/{name}", status_code=204, responses=answers(None, 404))
async def delete_box(request: Request, name: str) -> Response:
    """Stop a sandbox and remove all of it."""
    boxes = boxes_of(request)
    await boxes.delete(boxes.get(name))
    return Response(status_code=204)


@router.post("/boxes/{name}/start", responses=answers("SandboxView", 404, 409, 503))
async def start_box(request: Request, name: str) -> dict[str, Any]:
    """Start a sandbox: answered when it is ready, or failed with the reason in status_message."""
    boxes = boxes_of(request)
    sandbox = boxes.get(name)
    await boxes.start(sandbox)
    return view(sandbox.record, request)


@router.post("/boxes/{name}/stop", responses=answers("SandboxView", 404, 409))
async def stop_box(request: Request, name: str) -> dict[str, Any]:
    """Stop a sandbox: answered when nothing of it runs. Its files stay."""
    boxes = boxes_of(request)
    sandbox = boxes.get(name)
    await boxes.stop(sandbox)
    return view(sandbox.record, request)

"""What LangSmith's service has and this one has not, each with its answer (protocol section 1).

Lists are empty, which is the truth; nothing of any name can be looked up, 404; what cannot be made is 422 and says what to do.
"""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from starlette.exceptions import HTTPException

from gatewayd.local.description import answers
from gatewayd.local.envelope import ServiceError, unsupported
from gatewayd.local.listing import invalid
from gatewayd.local.rest_server import MAX_PAGE, Cursor, boxes_of

router = APIRouter()  # below each prefix of the control plane
dataplane_router = APIRouter()  # at the top

PageSize = Annotated[int, Query(ge=1, le=MAX_PAGE)]


def _refuse_cursor(cursor: str | None) -> None:
    if cursor is not None:
        raise invalid("cursor", "is not a next_cursor of this list")


@router.post("/boxes/{name}/service-url", responses=answers(None, 404, 422))
async def no_service_url(request: Request, name: str) -> None:
    """Ports are reached through /tunnel."""
    boxes_of(request).get(name)
    raise unsupported("this service makes no service URLs; use a tunnel to the port")


@router.get("/boxes/{name}/service-urls", responses=answers("ServiceUrlList", 404))
async def list_service_urls(request: Request, name: str, page_size: PageSize = 50, cursor: Cursor = None) -> dict[str, Any]:
    """No port is shared."""
    boxes_of(request).get(name)
    _refuse_cursor(cursor)
    return {"items": [], "next_cursor": None}


@router.delete("/boxes/{name}/service-urls", responses=answers(None, 404))
async def no_such_service_url(request: Request, name: str, port: Annotated[int | None, Query(ge=1, le=65535)] = None) -> None:
    """No port is shared that could be taken back."""
    boxes_of(request).get(name)
    what = "no port" if port is None else f"no port {port}"
    raise ServiceError(404, "NotFound", f"{what} of sandbox '{name[:200]}' is shared")


@router.post("/boxes/{name}/download-url", responses=answers(None, 404, 422))
async def no_download_url(request: Request, name: str) -> None:
    """Files are read through /download."""
    boxes_of(request).get(name)
    raise unsupported("this service makes no download links; use /download")


@dataplane_router.get("/dataplane/{box_id}/execute/ws", include_in_schema=False)
@dataplane_router.get("/dataplane/{box_id}/tunnel", include_in_schema=False)
async def no_plain_http() -> None:
    """What is a WebSocket has no answer to a plain request (RFC 9110 section 15.5.22)."""
    raise HTTPException(426, "this is a WebSocket: ask for an upgrade", {"Upgrade": "websocket", "Connection": "Upgrade"})

"""The routes about registries (protocol section 1). A password goes in and never comes out."""

from __future__ import annotations

from operator import attrgetter
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response

from gatewayd.local.description import answers
from gatewayd.local.imagemodels import RegistryBody, RegistryPatch
from gatewayd.local.listing import Order
from gatewayd.local.records import RegistryRecord
from gatewayd.local.registries import Registries
from gatewayd.local.rest_server import MAX_PAGE, Cursor
from gatewayd.local.snapshot_routes import snapshots_of

router = APIRouter()


def registries_of(request: Request) -> Registries:
    """The service's registries."""
    return snapshots_of(request).registries


def view(record: RegistryRecord) -> dict[str, Any]:
    """A registry as answered."""
    return {
        "id": record.id,
        "name": record.name,
        "url": record.url,
        "username": record.username,
        "auth_type": "DOCKER_CONFIG",
        "has_ca_cert": record.ca is not None,
        "created_at": record.created_at,
        "updated_at": record.updated_at,
    }


@router.post("/registries", responses=answers("RegistryView", 409, 507))
async def create_registry(request: Request, body: RegistryBody) -> dict[str, Any]:
    """Remember a registry and its credentials; the password is kept encrypted."""
    return view(registries_of(request).create(body))


@router.get("/registries", responses=answers("RegistryList"))
async def list_registries(
    request: Request,
    limit: Annotated[int, Query(ge=1, le=MAX_PAGE)] = 50,
    page_size: Annotated[int | None, Query(ge=1, le=MAX_PAGE)] = None,
    offset: Annotated[int, Query(ge=0)] = 0,
    cursor: Cursor = None,
    name_contains: str | None = None,
) -> dict[str, Any]:
    """List registries by name."""
    found = [one for one in registries_of(request).all() if not name_contains or name_contains.lower() in one.name.lower()]
    order = Order[RegistryRecord]("name", False, attrgetter("name"), attrgetter("id"))
    page = order.page(found, page_size or limit, cursor=cursor, offset=offset)
    shown = [view(record) for record in page.entries]
    return {"registries": shown, "items": shown, "next_cursor": page.next_cursor, "offset": page.offset}


@router.get("/registries/{name}", responses=answers("RegistryView", 404))
async def get_registry(request: Request, name: str) -> dict[str, Any]:
    """A registry by name or id."""
    return view(registries_of(request).get(name))


@router.patch("/registries/{name}", responses=answers("RegistryView", 404, 409, 507))
async def update_registry(request: Request, name: str, body: RegistryPatch) -> dict[str, Any]:
    """Change a registry. A url of another host without a new password forgets the old one."""
    return view(registries_of(request).update(name, body))


@router.delete("/registries/{name}", status_code=204, responses=answers(None, 404))
async def delete_registry(request: Request, name: str) -> Response:
    """Forget a registry and its credentials; what is being built goes on."""
    registries_of(request).delete(name)
    return Response(status_code=204)

"""The shapes of answers, for the OpenAPI description (protocol section 1). Answers are made in `rest_server`."""

from __future__ import annotations

from typing import Any, Literal

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel, RootModel

from gatewayd.local.models import RunConfig

DESCRIPTION = """
The embedded sandbox service: LangSmith's sandbox API on one machine.

The control plane answers under two prefixes with the same operations: `/v2/sandboxes`, which LangSmith's hand-written SDK clients
use, and `/api/v2/sandboxes`, for its generated clients. The data plane of a sandbox is below its `dataplane_url`; its WebSockets,
`/execute/ws` and `/tunnel`, are beyond what OpenAPI can describe.

Every request carries the API key in `X-Api-Key`. Errors are `{"detail": {"error", "message", "error_id"}}`; the log has the
`error_id` too. Refused values are 422 with their place (`loc`).
"""
TAGS = [  # the first ones in the order of rest_server.PREFIXES
    {"name": "sandboxes", "description": "The control plane, as the hand-written clients ask for it."},
    {"name": "sandboxes (generated clients)", "description": "The same operations under the generated clients' prefix."},
    {"name": "workspace", "description": "What LangSmith keeps for a whole workspace: nothing of it is here."},
    {"name": "data plane", "description": "Inside one sandbox: commands and files. A stopped sandbox is started by a request."},
]


class ErrorDetail(BaseModel):
    """What went wrong."""

    error: str  # type, for programs
    message: str  # for people
    error_id: str  # also in the service's log


class ErrorAnswer(BaseModel):
    """Every error but a refused value."""

    detail: ErrorDetail


class SandboxStatus(BaseModel):
    """The status of a sandbox alone."""

    status: Literal["provisioning", "ready", "failed", "stopped", "deleting"]
    status_message: str | None


class SandboxView(SandboxStatus):
    """A sandbox. What this service does not have is null."""

    id: str
    name: str
    dataplane_url: str
    created_at: str
    updated_at: str
    created_by: str | None
    idle_ttl_seconds: int
    delete_after_stop_seconds: int
    stopped_at: str | None
    snapshot_id: str
    vcpus: float | None
    cpu_millicores: int | None
    mem_bytes: int | None
    fs_capacity_bytes: int | None
    size_class: str | None
    labels: dict[str, str]
    run_config: RunConfig | None
    proxy_config: None
    mount_config: None
    preserve_memory_on_stop: bool
    persistent: bool


class SandboxList(BaseModel):
    """A page of sandboxes; `items` repeats `sandboxes`."""

    sandboxes: list[SandboxView]
    items: list[SandboxView]
    next_cursor: str | None
    offset: int


class SnapshotView(BaseModel):
    """A snapshot."""

    id: str
    name: str
    status: Literal["building", "ready", "failed", "deleting"]
    status_message: str | None
    docker_image: str | None
    image_digest: str | None
    fs_capacity_bytes: int
    fs_used_bytes: int
    source_sandbox_id: str | None
    registry_id: str | None
    created_at: str | None
    updated_at: str | None
    tags: list[str]
    labels: dict[str, str]
    run_config: RunConfig | None


class SnapshotList(BaseModel):
    """A page of snapshots; `items` repeats `snapshots`."""

    snapshots: list[SnapshotView]
    items: list[SnapshotView]
    next_cursor: str | None
    offset: int


class SnapshotTag(BaseModel):
    """Where a tag points."""

    tag: str
    snapshot_id: str


class SnapshotTags(BaseModel):
    """The tags of a snapshot name."""

    name: str
    tags: list[SnapshotTag]


class RegistryList(BaseModel):
    """A page of registries, of which there are none; `items` repeats `registries`."""

    registries: list[None]
    items: list[None]
    next_cursor: None
    offset: int


class ServiceUrlList(BaseModel):
    """A page of shared ports, of which there are none."""

    items: list[None]
    next_cursor: None


class SecretList(RootModel[list[None]]):
    """The workspace secrets, of which there are none."""


_MEANINGS = {
    400: "the request makes no sense, or the sandbox cannot be started",
    403: "this Host name is not answered",
    401: "no API key, or a wrong one",
    404: "there is nothing of that name",
    408: "not ready within `timeout`",
    409: "the name is taken, or the sandbox is being deleted",
    422: "not available in this service",
    503: "the service is ending",
    507: "no space is left on the disk that holds the service's state",
}


def answers(model: type[BaseModel] | None, *errors: int) -> dict[int | str, dict[str, Any]]:
    """`responses=` of a route: its answer, and the errors it can end in."""
    made: dict[int | str, dict[str, Any]] = {} if model is None else {200: {"model": model}}
    for status in sorted({401, 403, *errors}):
        made[status] = {"model": ErrorAnswer, "description": _MEANINGS[status]}
    return made


def describe(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI description, made once."""
    if app.openapi_schema is None:
        schema = get_openapi(title=app.title, version=app.version, description=DESCRIPTION, routes=app.routes, tags=TAGS)
        schema.setdefault("components", {})["securitySchemes"] = {"key": {"type": "apiKey", "in": "header", "name": "X-Api-Key"}}
        schema["security"] = [{"key": []}]
        for operation in (operation for path in schema["paths"].values() for operation in path.values()):
            for content in operation["responses"].get("200", {}).get("content", {}).values():
                if (reference := content["schema"].get("$ref")) is not None:
                    content["schema"] = {"$ref": reference}  # without what FastAPI adds for the handlers' plain dict
        app.openapi_schema = schema
    return app.openapi_schema

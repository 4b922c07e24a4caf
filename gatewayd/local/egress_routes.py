"""The routes about the network: workspace secrets (protocol section 1), and the record of what was decided, which is our own."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import StreamingResponse
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StrictStr

from gatewayd.local.description import answers
from gatewayd.local.egress.policy import value_problem
from gatewayd.local.envelope import ServiceError
from gatewayd.local.rest_server import boxes_of
from gatewayd.local.workspacesecrets import WorkspaceSecrets

SECRETS = "/api/v1/workspaces/current/secrets"

MAX_WAIT = 25.0  # seconds

router = APIRouter()  # below each prefix of the control plane
workspace_router = APIRouter()  # at the top


def _value(value: str) -> str:
    if (problem := value_problem(value)) is not None:
        raise ValueError(f"it {problem}: no header could carry it")
    return value


Value = Annotated[StrictStr, Field(max_length=16 * 1024), AfterValidator(_value)]


class SecretBody(BaseModel):
    """One secret; without a value it is removed."""

    model_config = ConfigDict(hide_input_in_errors=True)

    key: Annotated[StrictStr, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,255}$")]
    value: Value | None = None


class ValueBody(BaseModel):
    """The value of a secret."""

    model_config = ConfigDict(hide_input_in_errors=True)

    value: Value


def _secrets(request: Request) -> WorkspaceSecrets:
    return boxes_of(request).egress.secrets


@workspace_router.get(SECRETS, responses=answers("SecretList"))
async def list_secrets(request: Request) -> list[dict[str, str]]:
    """Their keys; never a value."""
    return [{"key": key} for key in _secrets(request).keys()]  # noqa: SIM118 - no mapping


@workspace_router.post(SECRETS, responses=answers("SecretList", 404, 503, 507))
async def put_secrets(request: Request, body: SecretBody | list[SecretBody]) -> list[dict[str, str]]:
    """Keep one secret or several; one without a value is removed."""
    for one in body if isinstance(body, list) else [body]:
        if one.value is None:
            _secrets(request).delete(one.key)
        else:
            _secrets(request).put(one.key, one.value)
    return await list_secrets(request)


@workspace_router.put(SECRETS + "/{key}", responses=answers("SecretView", 503, 507))
async def put_secret(request: Request, key: str, body: ValueBody) -> dict[str, str]:
    """Keep a secret."""
    if not key.isascii() or not key.isidentifier():
        raise ServiceError(422, "InvalidRequest", "a key is made of letters, digits and underscores")
    _secrets(request).put(key, body.value)
    return {"key": key}


@workspace_router.get(SECRETS + "/{key}", responses=answers("SecretView", 404))
async def get_secret(request: Request, key: str) -> dict[str, str]:
    """Whether there is one: its key."""
    if key not in _secrets(request).keys():  # noqa: SIM118 - no mapping
        raise ServiceError(404, "NotFound", f"Workspace secret '{key[:200]}' not found")
    return {"key": key}


@workspace_router.delete(SECRETS + "/{key}", status_code=204, responses=answers(None, 404, 507))
async def delete_secret(request: Request, key: str) -> Response:
    """Forget a secret; requests that need it are refused from now on."""
    _secrets(request).delete(key)
    return Response(status_code=204)


@router.get("/boxes/{name}/egress", responses=answers("EgressLog", 404))
async def egress_log(
    request: Request,
    name: str,
    follow: Annotated[bool, Query(description="lines of JSON, without an end")] = False,
    after: Annotated[int, Query(ge=0, description="the serial of the last one that is known")] = 0,
    wait: Annotated[float, Query(ge=0, le=MAX_WAIT, description="seconds to wait for a new one, if there is none")] = 0,
) -> Any:
    """What was decided about a sandbox's traffic, oldest first. Of this service alone."""
    boxes = boxes_of(request)
    journal = boxes.egress.journal(boxes.get(name).record.id)
    if not follow:
        return {"decisions": await journal.after(after, wait)}

    async def lines() -> AsyncIterator[bytes]:
        async for entry in journal.follow():
            yield json.dumps(entry, separators=(",", ":")).encode() + b"\n"

    return StreamingResponse(lines(), media_type="application/x-ndjson")

"""The OpenAPI description: what routes say about themselves, and what is added to make it whole."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

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
    {"name": "workspace", "description": "What LangSmith keeps for a whole workspace: the secrets of proxy rules."},
    {"name": "data plane", "description": "Inside one sandbox: commands and files. A stopped sandbox is started by a request."},
]
_REFERENCE = "#/components/schemas/{model}"
_MEANINGS = {
    400: "the request makes no sense, or the sandbox cannot be started or is not ready",
    403: "this Host name is not answered",
    401: "no API key, or a wrong one",
    404: "there is nothing of that name",
    408: "not ready within `timeout`",
    409: "the name is taken, the thing is in use, or the sandbox is being deleted",
    422: "not available in this service",
    503: "the service is ending",
    507: "no space is left on the disk that holds the service's state",
}


def answers(model: str | None, *errors: int) -> dict[int | str, dict[str, Any]]:
    """`responses=` of a route: its answer, a class of `schemas` by name, and the errors it can end in."""
    made: dict[int | str, dict[str, Any]] = {} if model is None else {200: {"content": _content(model)}}
    for status in sorted({401, 403, *errors}):
        made[status] = {"content": _content("ErrorAnswer"), "description": _MEANINGS[status]}
    return made


def _content(model: str) -> dict[str, Any]:
    return {"application/json": {"schema": {"$ref": _REFERENCE.format(model=model)}}}


def describe(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI description, made once."""
    if app.openapi_schema is None:
        from gatewayd.local import schemas  # only now: most services are never asked

        schema = get_openapi(title=app.title, version=app.version, description=DESCRIPTION, routes=app.routes, tags=TAGS)
        models = [value for value in vars(schemas).values() if isinstance(value, type) and value.__module__ == schemas.__name__]
        shapes = models_json_schema(
            [(model, "serialization") for model in models if issubclass(model, BaseModel)], ref_template=_REFERENCE
        )
        components = schema.setdefault("components", {})
        components["schemas"] = {**shapes[1]["$defs"], **components.get("schemas", {})}
        components["securitySchemes"] = {"key": {"type": "apiKey", "in": "header", "name": "X-Api-Key"}}
        schema["security"] = [{"key": []}]
        for operation in (operation for path in schema["paths"].values() for operation in path.values()):
            for content in operation["responses"].get("200", {}).get("content", {}).values():
                if (reference := content["schema"].get("$ref")) is not None:
                    content["schema"] = {"$ref": reference}  # without what FastAPI adds for the handlers' plain dict
        app.openapi_schema = schema
    return app.openapi_schema

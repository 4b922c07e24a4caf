"""Routes of control.sock about snapshots, and about the registries whose images they are built from."""

from __future__ import annotations

import logging
from typing import Any
from urllib.parse import quote

from gatewayd.api import ErrorKind
from gatewayd.errors import GatewayError, ServiceRefused, printable
from gatewayd.frontends.table import Call, Reply, Route, Services, digits
from gatewayd.sandbox.accounts import Account
from gatewayd.sandbox.rest_client import box_path

log = logging.getLogger(__name__)

SNAPSHOTS, REGISTRIES = "/v2/sandboxes/snapshots", "/v2/sandboxes/registries"
BUILD_FIELDS = ("name", "docker_image", "fs_capacity_bytes", "registry_id", "tag", "labels", "run_config", "description")
CAPTURE_FIELDS = ("name", "tag", "fs_capacity_bytes", "docker_image", "labels", "run_config", "description")
REGISTRY_FIELDS = ("name", "url", "username", "password", "ca_cert")
FILTERS = ("name_contains", "status", "sort_by", "sort_direction")
PAGE = 100  # snapshots asked for when the caller does not say
_DEADLINE = 60.0  # seconds; a deletion waits for the layers to be gone


async def build_snapshot(services: Services, call: Call) -> Reply:
    call.body.only(*BUILD_FIELDS)
    account, name = services.accounts.select(call.caller), call.body.text("name")
    action = f"build snapshot {printable(name, 80)!r}"
    made = await account.rest.call("POST", SNAPSHOTS, action=action, body=call.body.some(*BUILD_FIELDS))
    log.info("snapshot %s: being built (profile %s)", printable(name, 80), account.name)
    return Reply(_object(made, action), 201)


async def capture_snapshot(services: Services, call: Call) -> Reply:
    call.body.only(*CAPTURE_FIELDS)
    account, sandbox = services.accounts.select(call.caller), call.path["name"]
    action = f"capture sandbox {printable(sandbox, 80)!r}"
    path, body = box_path(sandbox, "snapshot"), call.body.some(*CAPTURE_FIELDS)
    made = await account.rest.call("POST", path, action=action, sandbox=sandbox, body=body, deadline=_DEADLINE)
    return Reply(_object(made, action), 201)


async def list_snapshots(services: Services, call: Call) -> Reply:
    call.query.only("limit", "offset", *FILTERS)
    account = services.accounts.select(call.caller)
    params = {**call.query.some(*FILTERS), "limit": digits(call.query, "limit", PAGE), "offset": digits(call.query, "offset", 0)}
    found = _object(await account.rest.call("GET", SNAPSHOTS, action="list snapshots", params=params), "list snapshots")
    return Reply({"snapshots": found.get("snapshots") or []})


async def get_snapshot(services: Services, call: Call) -> Reply:
    return Reply(await _one(services.accounts.select(call.caller), "GET", call.path["reference"]))


async def delete_snapshot(services: Services, call: Call) -> Reply:
    account, reference = services.accounts.select(call.caller), call.path["reference"]
    await _one(account, "DELETE", reference)
    log.info("deleted snapshot %s (profile %s)", printable(reference, 80), account.name)
    return Reply(None, 204)


async def create_registry(services: Services, call: Call) -> Reply:
    """The body holds a password: nothing of it is logged, or repeated."""
    call.body.only(*REGISTRY_FIELDS)
    account, action = services.accounts.select(call.caller), "use the registry's credentials"
    made = await account.rest.call("POST", REGISTRIES, action=action, body=call.body.some(*REGISTRY_FIELDS))
    return Reply(_object(made, action), 201)


async def delete_registry(services: Services, call: Call) -> Reply:
    account, name = services.accounts.select(call.caller), call.path["name"]
    await account.rest.call("DELETE", f"{REGISTRIES}/{quote(name, safe='')}", action="forget the registry's credentials")
    return Reply(None, 204)


async def _one(account: Account, method: str, reference: str) -> Any:
    shown = printable(reference, 80)
    action = f"{'delete' if method == 'DELETE' else 'get'} snapshot {shown!r}"
    if not reference or len(reference) > 512 or {".", ".."} & set(reference.split("/")):
        raise GatewayError(f"{shown!r} is no snapshot", kind=ErrorKind.USAGE)
    try:
        answer = await account.rest.call(method, f"{SNAPSHOTS}/{quote(reference, safe='')}", action=action, deadline=_DEADLINE)
    except ServiceRefused as exc:
        if exc.status == 404:
            message = f"cannot {action}: there is no such snapshot (profile {account.name})"
            hint = "`sandbox snapshot list` shows the snapshots there are"
            raise GatewayError(message, kind=ErrorKind.NOT_FOUND, hint=hint) from exc
        raise
    return None if method == "DELETE" else _object(answer, action)


def _object(answer: Any, action: str) -> dict[str, Any]:
    if not isinstance(answer, dict):
        raise GatewayError(f"cannot {action}: the answer is not what a sandbox service sends", kind=ErrorKind.UNAVAILABLE)
    return answer


SNAPSHOT_ROUTES: tuple[Route, ...] = (
    Route("GET", "/snapshots", list_snapshots, "List snapshots", query=("limit", "offset", *FILTERS)),
    Route("POST", "/snapshots", build_snapshot, "Begin to build a snapshot from an image", BUILD_FIELDS),
    Route("GET", "/snapshots/{reference:path}", get_snapshot, "Get a snapshot by id, name or name:tag, and how far it is"),
    Route("DELETE", "/snapshots/{reference:path}", delete_snapshot, "Delete a snapshot"),
    Route("POST", "/sandboxes/{name}/snapshot", capture_snapshot, "Begin to capture a sandbox's files", CAPTURE_FIELDS),
    Route("POST", "/registries", create_registry, "Give the service the credentials of a registry", REGISTRY_FIELDS),
    Route("DELETE", "/registries/{name}", delete_registry, "Have the service forget a registry"),
)

"""What control.sock offers: one table of routes, and what each of them does. No HTTP here: see `gatewayd.control`."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import time
from typing import TYPE_CHECKING, Any

from gatewayd.api import DAEMON_LOG, PROFILE_LOCAL, VERSION, ErrorKind
from gatewayd.errors import GatewayError
from gatewayd.frontends.egress import EGRESS_ROUTES
from gatewayd.frontends.snapshots import SNAPSHOT_ROUTES
from gatewayd.frontends.table import Call, Reply, Route, Services, digits
from gatewayd.sandbox import sshd
from gatewayd.sandbox.accounts import Account
from gatewayd.sandbox.boxes import list_boxes, wait_for

if TYPE_CHECKING:
    from gatewayd.api import LinkStatus, SandboxStatus, SshHost, Status

log = logging.getLogger(__name__)

WAIT_DEFAULT, WAIT_MAX = 120.0, 3600.0  # seconds
LIST_DEFAULT = 1000

CREATE_FIELDS = (
    *("name", "snapshot", "snapshot_id", "vcpus", "mem_bytes", "fs_capacity_bytes", "idle_ttl_seconds"),
    *("delete_after_stop_seconds", "env_vars", "labels", "proxy_config"),
)
UPDATE_FIELDS = (
    *("name", "vcpus", "mem_bytes", "fs_capacity_bytes", "idle_ttl_seconds", "delete_after_stop_seconds", "proxy_config"),
)
LIST_FILTERS = ("name_contains", "status", "sort_by", "sort_direction", "label")


async def get_status(services: Services, call: Call) -> Reply:
    config = services.settings.current()
    account = services.accounts.select(call.caller)
    local = await services.embedded.find()
    endpoint = local["endpoint"] if account.name == PROFILE_LOCAL else (await account.access.current()).endpoint
    status: Status = {
        "version": VERSION,
        "pid": os.getpid(),
        "started_at": services.started_at,
        "uptime_seconds": round(time.time() - services.started_at, 3),
        "profile": account.name,
        "endpoint": endpoint,
        "runtime_dir": str(config.runtime_dir),
        "log_file": str(config.state_dir / DAEMON_LOG),
        "links": services.pool.status(),
        "forwards": services.forwards.status(),
        "local": local,
    }
    return Reply(status)


async def shutdown(services: Services, call: Call) -> Reply:
    keep_local = call.body.flag("keep_local")
    services.stop(keep_local)
    return Reply({}, 202)


async def list_sandboxes(services: Services, call: Call) -> Reply:
    call.query.only("limit", "offset", *LIST_FILTERS)
    limit = digits(call.query, "limit", LIST_DEFAULT)
    offset = digits(call.query, "offset", 0)
    account = services.accounts.select(call.caller)
    return Reply({"sandboxes": await list_boxes(account.rest, call.query.some(*LIST_FILTERS), limit, offset)})


async def create_sandbox(services: Services, call: Call) -> Reply:
    call.body.only("wait", "timeout", *CREATE_FIELDS)
    wait, timeout = call.body.flag("wait"), _timeout(call)
    account = services.accounts.select(call.caller)
    box = await account.rest.create({**call.body.some(*CREATE_FIELDS), "wait_for_ready": False})
    name = box.get("name")
    if not isinstance(name, str) or not name:
        raise GatewayError("cannot create a sandbox: the service names none", kind=ErrorKind.UNAVAILABLE)
    log.info("created sandbox %s (profile %s)", name, account.name)
    services.directory.forget(account, name)
    if wait and box.get("status") != "ready":
        box = await wait_for(account.rest, name, "ready", timeout)
    return Reply(box, 201)


async def get_sandbox(services: Services, call: Call) -> Reply:
    return Reply(await services.accounts.select(call.caller).rest.get(call.path["name"]))


async def get_sandbox_status(services: Services, call: Call) -> Reply:
    account, name = services.accounts.select(call.caller), call.path["name"]
    answer = await account.rest.status(name)
    status: SandboxStatus = {
        "status": answer.get("status", ""),
        "status_message": answer.get("status_message"),
        "ssh": services.carrier(account, name) or None,
        "link": _link(services, account, name),
    }
    return Reply(status)


async def update_sandbox(services: Services, call: Call) -> Reply:
    call.body.only(*UPDATE_FIELDS)
    account, name = services.accounts.select(call.caller), call.path["name"]
    box = await account.rest.update(name, call.body.some(*UPDATE_FIELDS))
    if box.get("name", name) != name:  # the old name leads nowhere, or soon somewhere else
        await services.pool.forget(account, name)
    return Reply(box)


async def delete_sandbox(services: Services, call: Call) -> Reply:
    account, name = services.accounts.select(call.caller), call.path["name"]
    await account.rest.delete(name)
    await services.pool.forget(account, name)
    log.info("deleted sandbox %s (profile %s)", name, account.name)
    return Reply(None, 204)


async def start_sandbox(services: Services, call: Call) -> Reply:
    call.body.only("wait", "timeout")
    account, name = services.accounts.select(call.caller), call.path["name"]
    await account.rest.start(name)
    return Reply(await _settled(account, name, "ready", call))


async def stop_sandbox(services: Services, call: Call) -> Reply:
    call.body.only("wait", "timeout")
    account, name = services.accounts.select(call.caller), call.path["name"]
    await account.rest.stop(name)
    await services.pool.forget(account, name)
    return Reply(await _settled(account, name, "stopped", call))


async def wait_for_sandbox(services: Services, call: Call) -> Reply:
    call.body.only("timeout", "for")
    wanted = call.body.text("for", "ready")
    if wanted not in ("ready", "stopped"):
        raise GatewayError("for must be ready or stopped", kind=ErrorKind.USAGE)
    account = services.accounts.select(call.caller)
    return Reply(await wait_for(account.rest, call.path["name"], wanted, _timeout(call)))


async def get_ssh_host(services: Services, call: Call) -> Reply:
    from gatewayd.frontends.ssh.hostkey import public_host_key

    host: SshHost = {"host_key": await asyncio.to_thread(public_host_key, services.settings.current().state_dir)}
    return Reply(host)


async def add_ssh_keys(services: Services, call: Call) -> Reply:
    account, name, keys = _ssh_request(services, call)
    user, host_keys = await sshd.ensure_running(account, services.directory, name)
    added = await sshd.add_keys(account, services.directory, name, keys)
    return Reply({"user": user, "host_keys": host_keys, "added": added})


async def remove_ssh_keys(services: Services, call: Call) -> Reply:
    account, name, keys = _ssh_request(services, call)
    return Reply({"removed": await sshd.remove_keys(account, services.directory, name, keys)})


ROUTES: tuple[Route, ...] = (
    Route("GET", "/status", get_status, "The daemon, its links and its forwards"),
    Route("POST", "/shutdown", shutdown, "Stop the daemon, and the local service unless it is to be kept", ("keep_local",)),
    Route("GET", "/ssh", get_ssh_host, "The host key that ssh is shown for every sandbox"),
    Route("GET", "/sandboxes", list_sandboxes, "List sandboxes", query=("limit", "offset", *LIST_FILTERS)),
    Route("POST", "/sandboxes", create_sandbox, "Create a sandbox", (*CREATE_FIELDS, "wait", "timeout")),
    Route("GET", "/sandboxes/{name}", get_sandbox, "Get a sandbox"),
    Route("PATCH", "/sandboxes/{name}", update_sandbox, "Change or rename a sandbox", UPDATE_FIELDS),
    Route("DELETE", "/sandboxes/{name}", delete_sandbox, "Delete a sandbox"),
    Route("GET", "/sandboxes/{name}/status", get_sandbox_status, "Get a sandbox's state, and how it is reached"),
    Route("POST", "/sandboxes/{name}/start", start_sandbox, "Start a sandbox", ("wait", "timeout")),
    Route("POST", "/sandboxes/{name}/stop", stop_sandbox, "Stop a sandbox", ("wait", "timeout")),
    Route("POST", "/sandboxes/{name}/wait", wait_for_sandbox, "Wait until a sandbox is ready or stopped", ("for", "timeout")),
    Route("POST", "/sandboxes/{name}/ssh-setup", add_ssh_keys, "Start sshd, allow keys, read the host keys", ("public_keys",)),
    Route("DELETE", "/sandboxes/{name}/ssh-setup", remove_ssh_keys, "Withdraw keys", ("public_keys",)),
    *SNAPSHOT_ROUTES,
    *EGRESS_ROUTES,
)

__all__ = ["ROUTES", "Call", "Reply", "Route", "Services", "openapi"]


def openapi() -> dict[str, Any]:
    """The table as an OpenAPI 3.1 document."""
    paths: dict[str, dict[str, Any]] = {}
    for route in ROUTES:
        operation: dict[str, Any] = {
            "summary": route.summary,
            "operationId": getattr(route.handler, "__name__", route.path),
            "responses": {"default": {"description": 'JSON; errors are {"error": {"kind", "message", "hint"}}'}},
        }
        parameters: list[dict[str, Any]] = [{"name": name, "in": "query", "schema": {"type": "string"}} for name in route.query]
        parameters += [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
            for name in re.findall(r"{(\w+)", route.path)
        ]
        if parameters:
            operation["parameters"] = parameters
        if route.fields:
            schema = {"type": "object", "properties": {name: {} for name in route.fields}, "additionalProperties": False}
            operation["requestBody"] = {"content": {"application/json": {"schema": schema}}}
        paths.setdefault(f"/v1{route.path.replace(':path', '')}", {})[route.verb.lower()] = operation
    return {"openapi": "3.1.0", "info": {"title": "gatewayd", "version": VERSION}, "paths": paths}


async def _settled(account: Account, name: str, wanted: str, call: Call) -> dict[str, Any]:
    if call.body.flag("wait"):
        return await wait_for(account.rest, name, wanted, _timeout(call))
    return await account.rest.get(name)


def _link(services: Services, account: Account, name: str) -> LinkStatus | None:
    links = (link for link in services.pool.status() if (link["sandbox"], link["profile"]) == (name, account.name))
    return next(links, None)


def _ssh_request(services: Services, call: Call) -> tuple[Account, str, list[str]]:
    call.body.only("public_keys")
    keys = sshd.check_public_keys(call.body.texts("public_keys"))
    return services.accounts.select(call.caller), call.path["name"], keys


def _timeout(call: Call) -> float:
    return call.body.number("timeout", WAIT_DEFAULT, most=WAIT_MAX)

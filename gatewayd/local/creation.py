"""From the body of POST /boxes to a sandbox's record."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from functools import partial
from typing import Any

from fastapi.exceptions import RequestValidationError

from gatewayd.local.egress.service import Egress
from gatewayd.local.models import (
    DEFAULT_DELETE_AFTER_STOP,
    DEFAULT_IDLE_TTL,
    DEFAULT_SNAPSHOT_NAME,
    CreateBody,
    PatchBody,
    merged,
)
from gatewayd.local.proxyconfig import stored
from gatewayd.local.records import SnapshotRecord
from gatewayd.local.snapshots import DEFAULT, Snapshots
from gatewayd.local.store import Record


def wanted_snapshot(snapshots: Snapshots, body: CreateBody) -> SnapshotRecord:
    """The snapshot that a sandbox is to be made from.

    Raises:
        RequestValidationError: there is none, or it is not ready; with the field that named it.
    """
    for field in ("snapshot_id", "snapshot_name", "snapshot"):
        if reference := getattr(body, field):
            found = snapshots.find(reference)
            if found is None or (field == "snapshot_id" and found.id != reference):
                hint = "" if len(snapshots.all()) > 1 else f": this service has one, {DEFAULT_SNAPSHOT_NAME!r}"
                raise _invalid(field, f"there is no snapshot {reference[:200]!r}{hint}")
            if found.status != "ready":
                why = f" ({found.status_message})" if found.status_message else ""
                raise _invalid(field, f"snapshot {reference[:200]!r} is not ready: {found.status}{why}")
            return found
    return DEFAULT


def _invalid(field: str, message: str) -> RequestValidationError:
    return RequestValidationError([{"loc": ("body", field), "msg": message, "type": "value_error"}])


def new_record(body: CreateBody, name: str, time: str, snapshot: SnapshotRecord) -> Record:
    """The record of a new sandbox; its commands run as its snapshot says, and over that as the body says."""
    run_config = dict(snapshot.run_config or {})
    if body.run_config is not None:
        run_config = merged(run_config, body.run_config)
    return Record(
        id=str(uuid.uuid4()),
        name=name,
        status="provisioning",
        created_at=time,
        updated_at=time,
        idle_ttl_seconds=DEFAULT_IDLE_TTL if body.idle_ttl_seconds is None else body.idle_ttl_seconds,
        delete_after_stop_seconds=body.delete_after_stop_seconds or DEFAULT_DELETE_AFTER_STOP,
        millicores=millicores(body),
        mem_bytes=body.mem_bytes,
        fs_capacity_bytes=max(body.fs_capacity_bytes or 0, snapshot.fs_capacity_bytes) or None,
        labels={**snapshot.labels, **(body.labels or {})},
        env_vars=body.env_vars or {},
        run_config=run_config or None,
        snapshot_id=None if snapshot is DEFAULT else snapshot.id,
    )


def proxy_config(egress: Egress, body: CreateBody | PatchBody, record: Record) -> Mapping[str, Any] | None:
    """What a record is to have for the proxy_config of a body. Raises RequestValidationError."""
    if body.proxy_config is None:
        return record.proxy_config
    try:
        return stored(body.proxy_config, record.proxy_config, partial(egress.seal, record.id))
    except ValueError as exc:
        raise _invalid("proxy_config", str(exc)) from exc


def refuse_proxy_config(body: CreateBody | PatchBody, runtime: str) -> None:
    """Where sandboxes have no network. Raises RequestValidationError when the body asks for one."""
    asked = body.proxy_config
    if asked is not None and (asked.rules or asked.access_control):
        raise _invalid("proxy_config", f"proxy_config is not available with the {runtime} runtime: its sandboxes have no network")


def millicores(body: CreateBody | PatchBody) -> int | None:
    """Thousandths of a CPU; None when the body does not say."""
    if body.cpu_millicores is not None:
        return body.cpu_millicores
    return None if body.vcpus is None else body.vcpus * 1000

"""Snapshots, their layers and registries as they are stored. Times are ISO 8601, UTC."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class SnapshotRecord:
    """One snapshot (protocol section 1, *snapshot*)."""

    id: str  # UUID
    name: str
    tag: str  # that it gets under its name when it is ready
    status: str  # building, ready, failed, deleting
    created_at: str
    updated_at: str  # of the last change to any field
    status_message: str | None = None  # why it failed
    docker_image: str | None = None  # what it was built from, as asked for
    image_digest: str | None = None  # of that image's manifest, as the registry names it
    fs_capacity_bytes: int = 0  # least size of the disks of sandboxes made from it; 0: none
    source_sandbox_id: str | None = None  # what it was captured from
    registry_id: str | None = None  # whose credentials it was pulled with
    description: str | None = None  # for people
    labels: Mapping[str, str] = field(default_factory=dict)
    tags: Sequence[str] = ()  # that lead to it now; without any it is found by its id alone
    run_config: Mapping[str, Any] | None = None  # user, work_dir, env_vars of its sandboxes' commands
    image_config: Mapping[str, Any] | None = None  # entrypoint and cmd of the image: recorded, never started
    layers: Sequence[str] = ()  # what it is made of, topmost first; set when it is ready


@dataclass(frozen=True)
class LayerRecord:
    """One layer that snapshots are made of."""

    name: str  # as `runtime.base.Layers` names it
    size: int  # bytes of content
    created_at: str


@dataclass(frozen=True)
class SecretRecord:
    """A workspace secret."""

    key: str
    created_at: str
    sealed: str  # its value, encrypted (`vault`)


@dataclass(frozen=True)
class RegistryRecord:
    """Where private images come from."""

    id: str  # UUID
    name: str  # unique
    url: str  # as given
    created_at: str
    updated_at: str
    username: str | None = None
    secret: str | None = None  # the password, encrypted (`vault`)
    ca: str | None = None  # certificates, PEM, that the registry's own is checked against, too

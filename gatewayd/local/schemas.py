"""The shapes of answers, for the OpenAPI description only (protocol section 1). Answers are made in `rest_server`.

Imported when somebody asks for the description: every model costs memory and time.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, RootModel

from gatewayd.local.models import RunConfig


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


class ProxyHeaderView(BaseModel):
    """A header that requests are given; the value of an opaque one is never told."""

    name: str
    type: Literal["plaintext", "opaque", "workspace_secret"]
    value: str = ""  # not of an opaque one
    is_set: bool = False  # of an opaque one alone


class ProxyRuleView(BaseModel):
    """What requests to some hosts are given."""

    name: str
    enabled: bool
    match_hosts: list[str]
    match_paths: list[str]
    headers: list[ProxyHeaderView]
    env_vars: dict[str, str] = {}


class ProxyConfigView(BaseModel):
    """The network of a sandbox."""

    rules: list[ProxyRuleView] = []
    no_proxy: list[str] = []
    access_control: dict[str, list[str]] = {}


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
    proxy_config: ProxyConfigView | None
    mount_config: None
    preserve_memory_on_stop: bool
    persistent: bool


class SandboxList(BaseModel):
    """A page of sandboxes; `items` repeats `sandboxes`."""

    sandboxes: list[SandboxView]
    items: list[SandboxView]
    next_cursor: str | None
    offset: int


class ImageConfig(BaseModel):
    """The command of an image, which is recorded and not started."""

    entrypoint: list[str]
    cmd: list[str]


class SnapshotProgress(BaseModel):
    """How far a snapshot is that is being made. Of this service alone."""

    phase: Literal["waiting", "pulling", "unpacking", "capturing"]
    bytes: int
    total_bytes: int | None
    layers: int
    total_layers: int | None


class SnapshotView(BaseModel):
    """A snapshot."""

    id: str
    name: str
    status: Literal["building", "ready", "failed", "deleting"]
    status_message: str | None
    docker_image: str | None
    image_digest: str | None
    description: str | None
    fs_capacity_bytes: int
    fs_used_bytes: int
    source_sandbox_id: str | None
    registry_id: str | None
    created_at: str | None
    updated_at: str | None
    created_by: str | None
    tags: list[str]
    labels: dict[str, str]
    run_config: RunConfig | None
    image_config: ImageConfig | None
    progress: SnapshotProgress | None


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


class RegistryView(BaseModel):
    """A registry; its password is never told."""

    id: str
    name: str
    url: str
    username: str | None
    auth_type: Literal["DOCKER_CONFIG"]
    has_ca_cert: bool
    created_at: str
    updated_at: str


class RegistryList(BaseModel):
    """A page of registries; `items` repeats `registries`."""

    registries: list[RegistryView]
    items: list[RegistryView]
    next_cursor: str | None
    offset: int


class ServiceUrlList(BaseModel):
    """A page of shared ports, of which there are none."""

    items: list[None]
    next_cursor: None


class SecretView(BaseModel):
    """A workspace secret; its value is never told."""

    key: str


class SecretList(RootModel[list[SecretView]]):
    """The workspace secrets."""


class EgressDecision(BaseModel):
    """A DNS query, connection or request, and what was decided. Of this service alone."""

    serial: int
    time: str
    kind: Literal["dns", "tcp", "tls", "http"]
    host: str
    port: int | None
    verdict: Literal["allow", "deny"]
    reason: str
    method: str | None
    path: str | None
    status: int | None
    rules: list[str]
    sent: int | None
    received: int | None


class EgressLog(BaseModel):
    """The last decisions about one sandbox, oldest first."""

    decisions: list[EgressDecision]

"""The bodies of requests about snapshots and registries, checked (protocol section 1)."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, Field, StrictBool, StrictStr

from gatewayd.local.models import DEFAULT_SNAPSHOT_NAME, Capacity, Labels, RunConfig, Text, not_here
from gatewayd.local.references import MAX_REFERENCE, parse, parse_registry

LATEST = "latest"  # the tag that a name alone means
MAX_PEM = 1 << 20  # characters of certificates
MAX_NAME = 255  # characters of a snapshot's name
_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,126}[A-Za-z0-9])?")
_COMPONENTS = re.compile(r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*(?:/[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*)*")
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")


def _plain_name(value: str) -> str:
    if not _NAME.fullmatch(value):
        raise ValueError("a name has up to 128 letters, digits, '.', '_' and '-', and begins and ends with a letter or digit")
    return value


def _snapshot_name(value: str) -> str:
    if value == DEFAULT_SNAPSHOT_NAME:
        raise ValueError(f"{DEFAULT_SNAPSHOT_NAME!r} is the name of the snapshot that is always there")
    if len(value) > MAX_NAME or not _COMPONENTS.fullmatch(value):
        raise ValueError("a name has lowercase letters, digits, and single '.', '_', '-' and '/' between them, 255 at most")
    return value


def _tag(value: str) -> str:
    if not _TAG.fullmatch(value):
        raise ValueError("a tag has up to 128 letters, digits, '_', '.' and '-', and does not begin with '.' or '-'")
    return value


def _image(value: str) -> str:
    parse(value)
    return value


def _url(value: str) -> str:
    parse_registry(value)
    return value


def _pem(value: str) -> str:
    if "-----BEGIN CERTIFICATE-----" not in value or "PRIVATE KEY" in value:
        raise ValueError("must be certificates in PEM, and no keys")
    return value


SnapshotName = Annotated[StrictStr, AfterValidator(_snapshot_name)]
Tag = Annotated[StrictStr, AfterValidator(_tag)]
Image = Annotated[StrictStr, Field(max_length=MAX_REFERENCE), AfterValidator(_image)]
Description = Annotated[Text, Field(max_length=1024)]
RegistryName = Annotated[StrictStr, AfterValidator(_plain_name)]
RegistryAddress = Annotated[StrictStr, Field(max_length=1024), AfterValidator(_url)]
Credential = Annotated[Text, Field(max_length=65536)]
Certificates = Annotated[Text, Field(max_length=MAX_PEM), AfterValidator(_pem)]


class SnapshotBody(BaseModel):
    """POST /snapshots."""

    name: SnapshotName
    docker_image: Image
    fs_capacity_bytes: Capacity | None = None  # also the most that the image may hold
    registry_id: Text | None = None  # id or name
    tag: Tag = LATEST
    labels: Labels | None = None  # over the image's own
    run_config: RunConfig | None = None  # over the image's USER, WORKDIR and ENV
    description: Description | None = None


class CaptureBody(BaseModel):
    """POST /boxes/{name}/snapshot."""

    name: SnapshotName
    tag: Tag = LATEST
    fs_capacity_bytes: Capacity | None = None
    labels: Labels | None = None
    run_config: RunConfig | None = None  # over the sandbox's own
    description: Description | None = None
    docker_image: Annotated[Any, not_here("docker_image (there is no Docker in these sandboxes to export it from)")] = None
    include_memory: Annotated[StrictBool | None, not_here("include_memory (processes are not captured)")] = None
    checkpoint: Annotated[Any, not_here("checkpoint")] = None
    include: Annotated[Any, not_here("include")] = None
    image_config: Annotated[Any, not_here("image_config")] = None


class RegistryBody(BaseModel):
    """POST /registries."""

    name: RegistryName
    url: RegistryAddress
    username: Credential | None = None
    password: Credential | None = None
    ca_cert: Certificates | None = None  # of this service alone: PEM of who signed the registry's certificate
    auth_type: Literal["DOCKER_CONFIG"] | None = None


class RegistryPatch(BaseModel):
    """PATCH /registries/{name}: what is absent or null stays."""

    name: RegistryName | None = None
    url: RegistryAddress | None = None
    username: Credential | None = None
    password: Credential | None = None
    ca_cert: Certificates | None = None
    auth_type: Literal["DOCKER_CONFIG"] | None = None

"""The bodies of requests, checked (protocol sections 1 and 2).

What the cloud ignores is ignored. What would change what a sandbox is or does, and cannot be done here, is refused with its place
in the body: an answer never pretends.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr, model_validator

from gatewayd.local.names import name_problem
from gatewayd.local.proxyconfig import ProxyConfig

DEFAULT_SNAPSHOT_ID = "6f1c1f6e-8a5d-5a5e-9a3e-0d9c1b7d2f10"  # fixed: the snapshot made of the host's own /usr
DEFAULT_SNAPSHOT_NAME = "default"
DEFAULT_IDLE_TTL = 600  # seconds without use after which a sandbox is stopped (protocol section 1, *create*)
DEFAULT_DELETE_AFTER_STOP = 0  # a stopped sandbox is kept until it is deleted

MIN_MEMORY = 16 * 1024 * 1024  # bytes; below it no shell starts
MAX_BYTES = 1 << 50  # 1 PiB, the largest size the protocol knows
MAX_VCPUS = 256
MAX_TTL = 10 * 366 * 86400  # seconds
MAX_ENV = 128 * 1024  # bytes of all names and values together
MAX_LABELS = 64
MAX_LABEL = 256  # characters of a label's key, and of its value
MAX_PATH = 4096  # PATH_MAX


def _name(value: str) -> str:
    if problem := name_problem(value):
        raise ValueError(problem)
    return value


def _ttl(value: int) -> int:
    if value % 60:
        raise ValueError(f"must be a multiple of 60 seconds (0 turns it off), not {value}")
    return value


def _env(value: dict[str, str]) -> dict[str, str]:
    for key, content in value.items():
        if not key or "=" in key or "\0" in key:
            raise ValueError("a variable's name cannot be empty or hold '=' or NUL")
        if "\0" in content:
            raise ValueError(f"the value of {key[:80]!r} holds NUL")
    size = sum(len(key.encode()) + len(content.encode("utf-8", "replace")) for key, content in value.items())
    if size > MAX_ENV:
        raise ValueError(f"variables have at most {MAX_ENV} bytes together, not {size}")
    return value


def _labels(value: dict[str, str]) -> dict[str, str]:
    if len(value) > MAX_LABELS:
        raise ValueError(f"at most {MAX_LABELS} labels, not {len(value)}")
    for key, content in value.items():
        if not key or len(key) > MAX_LABEL or len(content) > MAX_LABEL:
            raise ValueError(f"a label has a key, and key and value have at most {MAX_LABEL} characters each")
        if "=" in key:
            raise ValueError("a label's key cannot hold '='")
    return value


def _no_nul(value: str) -> str:
    if "\0" in value:
        raise ValueError("NUL is not allowed")
    return value


def _absolute(value: str) -> str:
    if not value.startswith("/"):
        raise ValueError("must be an absolute path")
    return _no_nul(value)


Name = Annotated[StrictStr, AfterValidator(_name)]
Ttl = Annotated[StrictInt, Field(ge=0, le=MAX_TTL), AfterValidator(_ttl)]
Env = Annotated[dict[StrictStr, StrictStr], AfterValidator(_env)]
Labels = Annotated[dict[StrictStr, StrictStr], AfterValidator(_labels)]
Memory = Annotated[StrictInt, Field(ge=MIN_MEMORY, le=MAX_BYTES)]
Capacity = Annotated[StrictInt, Field(ge=1024 * 1024, le=MAX_BYTES)]
Vcpus = Annotated[StrictInt, Field(ge=1, le=MAX_VCPUS)]
Millicores = Annotated[StrictInt, Field(ge=50, le=MAX_VCPUS * 1000)]
Text = Annotated[StrictStr, AfterValidator(_no_nul)]
Path = Annotated[Text, Field(min_length=1, max_length=MAX_PATH)]
CommandId = Annotated[StrictStr, Field(pattern=r"^[!-~]{1,128}$")]  # chosen by clients, and seen in logs
AbsolutePath = Annotated[StrictStr, Field(max_length=MAX_PATH), AfterValidator(_absolute)]


def not_here(what: str) -> AfterValidator:
    """Refuse any value that asks for something: absent, null, false and empty ask for nothing."""

    def check(value: Any) -> Any:
        if value:
            raise ValueError(f"{what} is not available in this service")
        return value

    return AfterValidator(check)


def _one_way(what: str) -> AfterValidator:
    """Refuse what /execute/stream cannot carry."""

    def check(value: Any) -> Any:
        if value:
            raise ValueError(f"{what} needs /execute/ws: a stream of events has no way back to the command")
        return value

    return AfterValidator(check)


def _persistent(value: bool | None) -> bool | None:
    if value is False:
        raise ValueError("persistent=false is not available in this service: a sandbox keeps its files until it is deleted")
    return value


SnapshotReference = Annotated[Text, Field(max_length=512)]


class RunConfig(BaseModel):
    """As whom, where and with what variables commands run."""

    model_config = ConfigDict(extra="forbid")

    user: Annotated[Text, Field(min_length=1, max_length=256)] | None = None  # name, uid, name:group or uid:gid
    work_dir: AbsolutePath | None = None
    env_vars: Env | None = None


def merged(old: Mapping[str, Any], change: RunConfig) -> dict[str, Any]:
    """A run_config laid over another: `user` and `work_dir` replace, `env_vars` merge."""
    made = {**old, **change.model_dump(exclude_none=True)}
    if change.env_vars is not None:
        made["env_vars"] = {**old.get("env_vars", {}), **change.env_vars}
    return made


class CreateBody(BaseModel):
    """POST /boxes."""

    name: Name | None = None  # none: one is made up
    snapshot_id: SnapshotReference | None = None
    snapshot_name: SnapshotReference | None = None
    snapshot: SnapshotReference | None = None  # name, name:tag or id
    vcpus: Vcpus | None = None
    cpu_millicores: Millicores | None = None  # goes before vcpus
    mem_bytes: Memory | None = None
    fs_capacity_bytes: Capacity | None = None
    idle_ttl_seconds: Ttl | None = None
    delete_after_stop_seconds: Ttl | None = None
    env_vars: Env | None = None
    labels: Labels | None = None
    run_config: RunConfig | None = None
    wait_for_ready: StrictBool = False
    timeout: Annotated[float, Field(strict=True, gt=0, le=3600)] = 30  # seconds; only with wait_for_ready
    proxy_config: ProxyConfig | None = None
    persistent: Annotated[StrictBool | None, AfterValidator(_persistent)] = None
    mount_config: Annotated[Any, not_here("mount_config")] = None
    volumes: Annotated[Any, not_here("volumes")] = None
    tag_value_ids: Annotated[Any, not_here("tag_value_ids")] = None
    access_delegation: Annotated[Any, not_here("access_delegation")] = None
    preserve_memory_on_stop: Annotated[Any, not_here("preserve_memory_on_stop")] = None
    restore_memory: Annotated[Any, not_here("restore_memory")] = None

    @model_validator(mode="after")
    def _check(self) -> CreateBody:
        if len({value for value in (self.snapshot_id, self.snapshot_name, self.snapshot) if value}) > 1:
            raise ValueError("at most one of snapshot_id, snapshot_name and snapshot may be set")
        return self


class PatchBody(BaseModel):
    """PATCH /boxes/{name}: what is absent or null stays."""

    name: Name | None = None
    idle_ttl_seconds: Ttl | None = None
    delete_after_stop_seconds: Ttl | None = None
    vcpus: Vcpus | None = None
    cpu_millicores: Millicores | None = None
    mem_bytes: Memory | None = None
    fs_capacity_bytes: Capacity | None = None
    labels: Labels | None = None
    run_config: RunConfig | None = None
    proxy_config: ProxyConfig | None = None
    tag_value_ids: Annotated[Any, not_here("tag_value_ids")] = None


class CommandBody(BaseModel):
    """What to run: the fields that /execute and /execute/ws share."""

    command: Text = ""
    shell: Annotated[Text, Field(max_length=MAX_PATH)] | None = None  # none or "": bash, and sh where there is no bash
    env: Env | None = None
    cwd: Path | None = None
    run_config: RunConfig | None = None

    @model_validator(mode="after")
    def _check_layers(self) -> CommandBody:
        if self.run_config is not None and (self.env is not None or self.cwd is not None):
            raise ValueError("run_config cannot be combined with env or cwd")
        return self


class ExecuteBody(CommandBody):
    """POST /execute."""

    timeout: Annotated[float, Field(strict=True, ge=0, le=MAX_TTL)] = 60  # seconds, 0: none


class SessionBody(CommandBody):
    """A command that outlives the request: the fields that /execute/ws and /execute/stream share."""

    command_id: CommandId | None = None  # chosen by the client: a repeated request does not run the command twice
    timeout_seconds: Annotated[float, Field(strict=True, ge=0, le=MAX_TTL)] = 0  # 0: none
    idle_timeout_seconds: Annotated[float, Field(strict=True, le=MAX_TTL)] = 300  # negative: never
    ttl_seconds: Annotated[float, Field(strict=True, le=MAX_TTL)] = 600  # negative: for ever


class ExecuteMessage(SessionBody):
    """The first message of /execute/ws when it starts a command."""

    kill_on_disconnect: StrictBool = False
    pty: StrictBool = False
    close_stdin: StrictBool = False
    ssh_agent_forward: StrictBool = False  # goes before an SSH_AUTH_SOCK in env

    @model_validator(mode="after")
    def _check_command(self) -> ExecuteMessage:
        if not self.command and not self.pty:
            raise ValueError("a command is needed, unless pty asks for a login shell")
        return self


class StreamBody(SessionBody):
    """POST /execute/stream/start: output only, so what needs a way back to the command is refused."""

    command: Annotated[Text, Field(min_length=1)]
    close_stdin: StrictBool = True  # whatever it says, stdin is empty
    pty: Annotated[Any, _one_way("pty")] = None
    kill_on_disconnect: Annotated[Any, _one_way("kill_on_disconnect")] = None
    ssh_agent_forward: Annotated[Any, _one_way("ssh_agent_forward")] = None


class ReconnectMessage(BaseModel):
    """Taking up a command again: the first message of /execute/ws for that, and POST /execute/stream/resume."""

    command_id: CommandId
    stdout_offset: Annotated[StrictInt, Field(ge=0)] = 0
    stderr_offset: Annotated[StrictInt, Field(ge=0)] = 0

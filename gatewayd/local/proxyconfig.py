"""proxy_config: what may be asked for, how it is stored, and how it is answered (protocol section 1, *proxy_config*).

Values of type `opaque` go in and never come out: they are stored encrypted, for the sandbox they were given to alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StrictBool, StrictStr, model_validator

from gatewayd.local.egress.hostnames import matcher, path_matcher
from gatewayd.local.egress.policy import PLACEHOLDER, value_problem

MAX_RULES = 64
MAX_PATTERNS = 256  # of one list
MAX_HEADERS = 32  # of one rule
MAX_VALUE = 16 * 1024  # characters of a header's value
_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]{1,128}")  # RFC 9110 section 5.6.2
# what frames a message or names its host is the proxy's own affair
_RESERVED = frozenset(
    {"host", "content-length", "transfer-encoding", "connection", "upgrade", "te", "trailer", "expect", "keep-alive"}
)


def _host_pattern(value: str) -> str:
    matcher(value)
    return value


def _path_pattern(value: str) -> str:
    path_matcher(value)
    return value


def _header_name(value: str) -> str:
    if not _TOKEN.fullmatch(value):
        raise ValueError("not a header's name")
    if value.lower() in _RESERVED:
        raise ValueError(f"{value} cannot be set by a rule")
    return value


def _variables(value: dict[str, str]) -> dict[str, str]:
    if any(not key or "=" in key or "\0" in key + content for key, content in value.items()):
        raise ValueError("a variable's name cannot be empty or hold '=', and neither name nor value can hold NUL")
    return value


HostPatterns = Annotated[list[Annotated[StrictStr, AfterValidator(_host_pattern)]], Field(max_length=MAX_PATTERNS)]
PathPatterns = Annotated[list[Annotated[StrictStr, AfterValidator(_path_pattern)]], Field(max_length=MAX_PATTERNS)]


class ProxyHeader(BaseModel):
    """A header that requests are given."""

    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)

    name: Annotated[StrictStr, AfterValidator(_header_name)]
    type: Literal["plaintext", "opaque", "workspace_secret"] = "plaintext"
    value: Annotated[StrictStr, Field(max_length=MAX_VALUE)] | None = None
    is_set: StrictBool | None = None  # as answered for `opaque`: keep the value that is there

    @model_validator(mode="after")
    def _check(self) -> ProxyHeader:
        if self.type == "opaque" and self.value is None and self.is_set:
            return self
        if self.value is None or (problem := value_problem(self.value)) is not None:
            raise ValueError("a value is needed" if self.value is None else f"the value {problem}")
        if self.type == "workspace_secret" and not PLACEHOLDER.search(self.value):
            raise ValueError("the value names no workspace secret: write its key in braces, {KEY}")
        return self


class ProxyRule(BaseModel):
    """What requests to some hosts are given."""

    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)

    name: Annotated[StrictStr, Field(min_length=1, max_length=256)]
    enabled: StrictBool = True
    type: StrictStr | None = None
    match_hosts: HostPatterns = []
    match_paths: PathPatterns = []
    headers: Annotated[list[ProxyHeader], Field(max_length=MAX_HEADERS)] = []
    env_vars: Annotated[dict[StrictStr, StrictStr], Field(max_length=256), AfterValidator(_variables)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _known_type(cls, value: Any) -> Any:
        if isinstance(value, dict) and value.get("type") in ("aws", "gcp"):
            raise ValueError(f"rules of type {value['type']} are not available in this service: set headers by rules")
        return value

    @model_validator(mode="after")
    def _check(self) -> ProxyRule:
        if self.type == "attribution":
            if self.match_hosts or any(header.type != "plaintext" for header in self.headers):
                raise ValueError("an attribution rule has plaintext headers and no match_hosts")
        elif self.type not in (None, "", "custom", "header"):
            raise ValueError(f"there is no rule of type {self.type[:40]!r}")
        elif self.headers and not self.match_hosts:
            raise ValueError("a rule that sets headers needs match_hosts")
        return self


class AccessControl(BaseModel):
    """Which hosts may be reached."""

    model_config = ConfigDict(extra="forbid")

    allow_list: HostPatterns | None = None
    deny_list: HostPatterns | None = None

    @model_validator(mode="after")
    def _check(self) -> AccessControl:
        if self.allow_list is not None and self.deny_list is not None:
            raise ValueError("one of allow_list and deny_list, not both")
        return self


class ProxyConfig(BaseModel):
    """The network of one sandbox."""

    model_config = ConfigDict(extra="forbid")

    rules: Annotated[list[ProxyRule], Field(max_length=MAX_RULES)] | None = None
    no_proxy: HostPatterns | None = None
    access_control: AccessControl | None = None
    callbacks: list[Any] | None = None

    @model_validator(mode="after")
    def _check(self) -> ProxyConfig:
        if self.callbacks:
            raise ValueError("callbacks are not available in this service")
        names = [rule.name for rule in self.rules or ()]
        if len(set(names)) < len(names):
            raise ValueError("two rules have the same name")
        return self


def stored(config: ProxyConfig, old: Mapping[str, Any] | None, seal: Callable[[str], str]) -> dict[str, Any] | None:
    """A proxy_config as it is kept; None when it says nothing.

    Args:
        old: the one before: an opaque header that `is_set` keeps its value, if rule and header have the same names.
        seal: encrypts a value. Raises ValueError.

    Raises:
        ValueError: there is no value to keep, or it cannot be encrypted.
    """
    kept = {
        (rule["name"], header["name"].lower()): header["sealed"]
        for rule in (old or {}).get("rules", ())
        for header in rule.get("headers", ())
        if "sealed" in header
    }
    made = config.model_dump(exclude_none=True, exclude={"callbacks"})
    for rule in made.get("rules", ()):
        for header in rule["headers"]:
            header.pop("is_set", None)
            if header["type"] == "opaque":
                value = header.pop("value", None)
                sealed = kept.get((rule["name"], header["name"].lower())) if value is None else seal(value)
                if sealed is None:
                    raise ValueError(f"rule {rule['name']!r} has no value for header {header['name']} yet")
                header["sealed"] = sealed
    return made if any(made.values()) else None


def shown(config: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """A stored proxy_config as answered."""
    if config is None:
        return None
    rules = [{**rule, "headers": [_header(one) for one in rule["headers"]]} for rule in config.get("rules", ())]
    return {**config, "rules": rules}


def _header(header: Mapping[str, Any]) -> dict[str, Any]:
    if "sealed" not in header:
        return dict(header)
    return {"name": header["name"], "type": header["type"], "is_set": True}

"""What one sandbox may reach, and what its requests are given: its proxy_config, made ready to be asked (protocol section 1)."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import unquote

from gatewayd.local.egress.hostnames import Matcher, canonical, matcher, path_matcher

PLACEHOLDER = re.compile(r"\{([A-Za-z_][A-Za-z0-9_]*)\}")  # a workspace secret's name in a header's value
_FIELD_VALUE = re.compile(r"[!-~\x80-\xff]([\t -~\x80-\xff]*[!-~\x80-\xff])?")  # RFC 9110 section 5.5, without its empty case

_MAX_PATH = 4096  # characters of a path that rules are asked about

Reveal = Callable[[str], str]  # what was sealed → the secret, or KEY → the secret; raises KeyError


class SecretMissing(Exception):
    """A request needs a secret that is not there; the message names it, and tells nothing of it."""


class PathTooLong(Exception):
    """A path is longer than rules about paths are asked about; the message says so."""


class _Rule:
    """One enabled rule."""

    def __init__(self, rule: Mapping[str, Any]) -> None:
        self.name = str(rule["name"])
        self.headers: list[Mapping[str, Any]] = list(rule.get("headers", ()))
        self.everywhere = rule.get("type") == "attribution"  # set on whatever is intercepted for another rule's sake
        self._hosts = [matcher(pattern) for pattern in rule.get("match_hosts", ())]
        self._paths = [path_matcher(pattern) for pattern in rule.get("match_paths", ())]

    def for_host(self, host: str) -> bool:
        return any(matches(host) for matches in self._hosts)

    def for_path(self, path: str) -> bool:
        """In every way that a server may read the path: what leads elsewhere by `..` or %2e is another path.

        Raises:
            PathTooLong: that would take the event loop too long.
        """
        if not self._paths:
            return True
        if len(path) > _MAX_PATH:
            raise PathTooLong(f"rule {self.name!r} needs a path of at most {_MAX_PATH} characters, this one has {len(path)}")
        plain = unquote(path, errors="replace").replace("\\", "/")
        resolved = posixpath.normpath(plain) + ("/" if plain.endswith("/") and len(plain) > 1 else "")
        readings = {path, plain, re.sub(r"/{2,}", "/", resolved)}
        return all(any(matches(reading) for matches in self._paths) for reading in readings)


class Policy:
    """A proxy_config. `reveal` opens what was sealed, `secret` gives a workspace secret by its key; both raise KeyError."""

    def __init__(self, config: Mapping[str, Any] | None, reveal: Reveal, secret: Reveal) -> None:
        config = config or {}
        self._reveal = reveal
        self._secret = secret
        self._rules = [_Rule(rule) for rule in config.get("rules", ()) if rule.get("enabled", True)]
        self._unhandled = [matcher(pattern) for pattern in config.get("no_proxy", ())]
        control = config.get("access_control") or {}
        self._allowed = _matchers(control.get("allow_list"))
        self._denied = _matchers(control.get("deny_list"))
        self.environment: dict[str, str] = {}  # of every command
        for rule in config.get("rules", ()):
            if rule.get("enabled", True):
                self.environment.update(rule.get("env_vars") or {})
        self.needs_authority = any(rule.headers and not rule.everywhere for rule in self._rules)

    @property
    def restricts(self) -> bool:
        """Whether not every host is allowed."""
        return self._allowed is not None or self._denied is not None

    def denies(self, host: str, address: str | None = None) -> str:
        """Why a host is out of bounds, "" when it is not. `address` is what its name has led to."""
        known = [host] if address is None or address == host else [host, address]
        if self._denied is not None and any(matches(one) for matches in self._denied for one in known):
            return "on the deny list"
        if self._allowed is not None and not any(matches(host) for matches in self._allowed):
            return "not on the allow list"
        return ""

    def intercepts(self, host: str) -> bool:
        """Whether requests to a host are given headers, so that its connections must be looked into."""
        if any(matches(host) for matches in self._unhandled):
            return False
        return any(rule.headers and rule.for_host(host) for rule in self._rules)

    def headers(self, host: str, path: str, *, encrypted: bool) -> tuple[dict[bytes, bytes], list[str]]:
        """What a request is given, by lower-case name, and the names of the rules that say so. A later rule goes over a former.

        Raises:
            SecretMissing: a value cannot be made, or may not be sent without encryption.
            PathTooLong: a rule about paths applies to the host, and cannot be asked about this one.
        """
        given: dict[bytes, bytes] = {}
        rules = []
        for rule in self._rules:
            if rule.headers and (rule.everywhere or rule.for_host(host)) and rule.for_path(path):
                for header in rule.headers:
                    given[header["name"].lower().encode("ascii")] = self._value(rule.name, header, encrypted=encrypted)
                rules.append(rule.name)
        return given, rules

    def _value(self, rule: str, header: Mapping[str, Any], *, encrypted: bool) -> bytes:
        kind, where = header["type"], f"rule {rule!r}, header {header['name']}"
        if kind != "plaintext" and not encrypted:
            raise SecretMissing(f"{where}: a secret is not sent without TLS")
        try:
            if kind == "opaque":
                value = self._reveal(header["sealed"])
            elif kind == "workspace_secret":
                value = PLACEHOLDER.sub(lambda found: self._secret(found[1]), header["value"])
            else:
                value = header["value"]
        except KeyError as exc:
            raise SecretMissing(f"{where}: {exc.args[0]}") from None
        if (problem := value_problem(value)) is not None:
            raise SecretMissing(f"{where}: its value {problem}")
        return value.encode("latin-1")


def value_problem(value: str) -> str | None:
    """Why a text cannot be the value of a header, if it cannot; without the text."""
    try:
        value.encode("latin-1")
    except UnicodeError:
        return "has characters that no header can carry"
    return None if _FIELD_VALUE.fullmatch(value) else "is empty, or has spaces at an end, line breaks or control characters"


def _matchers(patterns: list[str] | None) -> list[Matcher] | None:
    return None if patterns is None else [matcher(pattern) for pattern in patterns]


def same_host(text: str, host: str) -> bool:
    """Whether a name as a client spells it is `host` (canonical)."""
    try:
        return canonical(text) == host
    except ValueError:
        return False

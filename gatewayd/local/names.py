"""Sandbox names: what is allowed, and names for those who give none."""

from __future__ import annotations

import re
import secrets
from collections.abc import Container

MAX_NAME = 63  # a name is also the sandbox's hostname: one DNS label (RFC 1123 section 2.1)

_LABEL = re.compile(r"[a-z0-9](?:[a-z0-9-]*[a-z0-9])?")

_FIRST = (
    "amber brave brisk calm clear cool crisp deep eager early fair fleet fresh gentle glad grand green happy keen kind late "
    "light lively lucky mellow merry mild neat noble pale plain proud quick quiet rapid ready round sharp silent silver sleek "
    "small smart solid spry still sunny swift tidy vivid warm wise young"
)
_SECOND = (
    "acorn alder aspen badger birch brook cedar cliff cloud coral crane creek dune eagle ember falcon fern finch fjord fox "
    "grove gull harbor heron hill isle jay juniper lake lark linnet lynx maple marsh meadow moss oak otter owl pebble pine "
    "plover pond quail raven reef ridge river robin rowan sable sedge shore sparrow spruce stone swan thrush tide willow wren"
)


def name_problem(name: str) -> str:
    """Why `name` cannot be a sandbox's name, or "" when it can."""
    if not name:
        return "a name cannot be empty"
    if len(name) > MAX_NAME:
        return f"a name has at most {MAX_NAME} characters, not {len(name)}"
    if not _LABEL.fullmatch(name):
        return "a name has lowercase letters, digits and hyphens only, and starts and ends with a letter or digit"
    return ""


def generate_name(taken: Container[str]) -> str:
    """A name that is not in `taken`: two words and four hexadecimal digits."""
    while True:
        name = f"{secrets.choice(_FIRST.split())}-{secrets.choice(_SECOND.split())}-{secrets.token_hex(2)}"
        if name not in taken:
            return name

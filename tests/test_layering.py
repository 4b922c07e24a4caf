"""Imports run one way, and third-party names stay in their rooms: checked on the source itself."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Layer → the layers it may import from. A layer is the longest matching module prefix.
ALLOWED: dict[str, set[str]] = {
    "gatewayd.errors": set(),
    "gatewayd.api": set(),
    "gatewayd.fdpass": set(),
    "gatewayd.tasks": set(),
    "gatewayd.yamux": {"gatewayd.errors"},  # pure: no asyncio, no sockets, no clock
    "gatewayd.relay": {"gatewayd.errors", "gatewayd.tasks"},
    "gatewayd.yamux.aio": {"gatewayd.errors", "gatewayd.tasks", "gatewayd.relay", "gatewayd.yamux", "gatewayd.yamux.muxstream"},
    "gatewayd.yamux.muxstream": {"gatewayd.errors", "gatewayd.yamux", "gatewayd.yamux.aio"},
    "gatewayd.config": {"gatewayd.errors", "gatewayd.api"},
    "gatewayd.guest": set(),
    "gatewayd.guest.guest": set(),  # the file that runs inside a sandbox: nothing of ours is there
    "gatewayd.guest.wire": set(),  # pure, and light: the command imports these three
    "gatewayd.guest.events": set(),
    "gatewayd.guest.session": {"gatewayd.guest", "gatewayd.guest.wire", "gatewayd.guest.events"},
    "gatewayd.sandbox": {
        "gatewayd.errors",
        "gatewayd.api",
        "gatewayd.tasks",
        "gatewayd.config",
        "gatewayd.guest",
        "gatewayd.guest.wire",
        "gatewayd.guest.events",
        "gatewayd.guest.session",
        "gatewayd.relay",
        "gatewayd.yamux",
        "gatewayd.yamux.aio",
    },
    "gatewayd.frontends": {
        "gatewayd.errors",
        "gatewayd.api",
        "gatewayd.fdpass",
        "gatewayd.tasks",
        "gatewayd.config",
        "gatewayd.guest",
        "gatewayd.guest.wire",
        "gatewayd.relay",
        "gatewayd.sandbox",
    },
    "gatewayd.control": {
        "gatewayd.errors",
        "gatewayd.api",
        "gatewayd.tasks",
        "gatewayd.config",
        "gatewayd.frontends",
        "gatewayd.sandbox",
    },
    "gatewayd.sdnotify": set(),
    "gatewayd.daemon": {"gatewayd"},
    "gatewayd.__main__": {"gatewayd"},
    "gatewayd.local.runtime.inside": {"gatewayd.local.runtime.inside"},
    "gatewayd.local.runtime": {"gatewayd.tasks", "gatewayd.local.runtime.inside"},
    "gatewayd.local": {
        "gatewayd.errors",
        "gatewayd.tasks",
        "gatewayd.relay",
        "gatewayd.yamux",
        "gatewayd.yamux.aio",
        "gatewayd.local.runtime",
    },
    "client": {
        "gatewayd.api",
        "gatewayd.fdpass",
        "gatewayd.guest",
        "gatewayd.guest.wire",
        "gatewayd.guest.events",
        "gatewayd.guest.session",
    },
}

# Third-party package → the modules that may name it.
ROOMS: dict[str, tuple[str, ...]] = {
    "asyncssh": ("gatewayd.frontends.ssh",),
    "httpx2": ("gatewayd.sandbox.rest_client",),
    "websockets": ("gatewayd.sandbox.link", "gatewayd.sandbox.exec_ws", "gatewayd.sandbox.dial", "gatewayd.local"),
    "uvicorn": ("gatewayd.control", "gatewayd.local"),
    "starlette": ("gatewayd.control", "gatewayd.local"),
    "fastapi": ("gatewayd.local",),
    "pydantic": ("gatewayd.local",),
    "python_multipart": ("gatewayd.local",),
    "uvloop": ("gatewayd.daemon", "gatewayd.__main__", "gatewayd.local"),
    "click": ("client",),
    "cryptography": ("gatewayd.local.vault", "gatewayd.local.egress.authority", "gatewayd.local.egress.trust"),
    "h11": ("gatewayd.local.egress.requests",),
}

PURE = (
    "gatewayd.yamux.",
    "gatewayd.errors",
    "gatewayd.api",
    "gatewayd.guest.wire",
    "gatewayd.guest.events",
    "gatewayd.guest.session",
)
ASYNC = ("gatewayd.yamux.aio", "gatewayd.yamux.muxstream")  # the I/O around the pure core
IMPURE_MODULES = {"asyncio", "socket", "time", "threading", "select", "selectors", "ssl"}


def modules() -> Iterator[tuple[str, Path]]:
    for package in ("gatewayd", "client"):
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def imports(module: str, path: Path) -> Iterator[str]:
    """Every name imported anywhere in the file, in functions too."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join([*package.split(".")[: len(package.split(".")) - node.level + 1], *([base] if base else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def within(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


def layer(name: str) -> str | None:
    """The longest layer that `name` (a module, or something in one) belongs to."""
    found = [candidate for candidate in ALLOWED if within(name, candidate)]
    return max(found, key=len) if found else None


MODULES = dict(modules())


@pytest.mark.parametrize("module", MODULES)
def test_layers_import_one_way(module: str) -> None:
    own = layer(module)
    if module in ("gatewayd", "client", "gatewayd.local"):
        own = own or module
    assert own is not None, f"{module} is in no layer: say in this file what it may import"
    for name in imports(module, MODULES[module]):
        if not (within(name, "gatewayd") or within(name, "client")):
            continue
        target = layer(name)
        if target == own:
            continue
        assert target is not None, f"{module} imports {name}, which is in no layer"
        allowed = ALLOWED.get(own, set())
        assert target in allowed or ("gatewayd" in allowed and within(target, "gatewayd")), f"{module} must not import {name}"


@pytest.mark.parametrize("module", MODULES)
def test_third_party_names_stay_in_their_rooms(module: str) -> None:
    for name in imports(module, MODULES[module]):
        top = name.partition(".")[0]
        if top in sys.stdlib_module_names or top in ("gatewayd", "client"):
            continue
        assert top in ROOMS, f"{module} imports {name}: no room is named for it"
        assert any(module.startswith(room) for room in ROOMS[top]), f"{module} must not import {name}"


@pytest.mark.parametrize("module", [m for m in MODULES if m.startswith(PURE) and m not in ASYNC])
def test_pure_modules_do_no_io(module: str) -> None:
    used = {name.partition(".")[0] for name in imports(module, MODULES[module])}
    assert not used & IMPURE_MODULES


def test_tasks_are_created_in_one_place() -> None:
    guilty = [
        f"{module}:{node.lineno}"
        for module, path in MODULES.items()
        if module != "gatewayd.tasks"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr in ("create_task", "ensure_future")
    ]
    assert guilty == []


# What must be larger, and why.
LARGE = {"gatewayd.guest.guest": 3000}  # one file by nature: it is put into sandboxes that have nothing but Python


def test_files_stay_small() -> None:
    lines = {module: len(path.read_text().splitlines()) for module, path in MODULES.items()}
    assert {module: count for module, count in lines.items() if count > LARGE.get(module, 600)} == {}

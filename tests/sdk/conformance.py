"""The public surface of the SDK's sandbox clients, and what a conformance run has seen of it."""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import langsmith.resources.sandboxes as resources
import pytest
from langsmith import sandbox as sdk

PROTOCOL = ("__enter__", "__aenter__", "__iter__", "__aiter__")  # what `with` and `for` call counts as public
OK, FAILED, REFUSED = "ok", "failed", "refused"

seen: defaultdict[str, set[str]] = defaultdict(set)  # "Class.method" or "function" → how calls of it ended
finished: set[str] = set()  # the scenarios that have run, "module.name[mode]"


def surface() -> set[str]:
    """Every public method and property of every client class, and every public function, by introspection."""
    names = set()
    for name in dir(sdk):
        value = getattr(sdk, name)
        if name.startswith("_"):
            continue
        if inspect.isfunction(value):
            names.add(name)
        elif inspect.isclass(value) and not issubclass(value, dict | BaseException):
            names |= _members(value)
    for name in dir(resources):
        if name.endswith("Resource"):
            names |= _members(getattr(resources, name))
    return names


def _members(owner: type) -> set[str]:
    """The methods and properties of a class; none of a class that only holds values (made by class methods alone)."""
    members: dict[str, Any] = {}
    for name in dir(owner):
        value = inspect.getattr_static(owner, name)
        if (not name.startswith("_") or name in PROTOCOL) and (callable(value) or hasattr(type(value), "__get__")):
            members[name] = value
    if not any(inspect.isfunction(value) or isinstance(value, property) for value in members.values()):
        return set()
    return {f"{owner.__name__}.{name}" for name in members}


def called(method: Any) -> str:
    """The name under which a call of a bound method, or of a function, is recorded."""
    owner = getattr(method, "__self__", None)
    if owner is None:
        return str(method.__name__)
    return f"{(owner if inspect.isclass(owner) else type(owner)).__name__}.{method.__name__}"


class World:
    """The SDK in one of its two forms, and the judge of what its calls do. One scenario is written for both forms."""

    def __init__(self, mode: str, client: Any, generated: Any) -> None:
        self.mode = mode  # "sync" or "async"
        self.client = client  # SandboxClient or AsyncSandboxClient
        self.generated = generated  # Langsmith or AsyncLangsmith

    async def settle(self, value: Any) -> Any:
        """What a call gave, awaited if it must be."""
        return await value if inspect.isawaitable(value) else value

    async def ok(self, method: Any, *args: Any, **options: Any) -> Any:
        """Call a method that must succeed."""
        result = await self.settle(method(*args, **options))
        seen[called(method)].add(OK)
        return result

    async def get(self, owner: Any, name: str) -> Any:
        """Read an attribute that must be there."""
        result = await self.settle(getattr(owner, name))
        seen[f"{type(owner).__name__}.{name}"].add(OK)
        return result

    async def fails(self, method: Any, error: Any, match: str, *args: Any, outcome: str = FAILED, **options: Any) -> Any:
        """Call a method that must fail with an error; the error."""
        with pytest.raises(error, match=match) as caught:
            await self.settle(method(*args, **options))
        seen[called(method)].add(outcome)
        return caught.value

    async def get_fails(self, owner: Any, name: str, error: Any, match: str) -> None:
        """Read an attribute that must fail with an error."""
        with pytest.raises(error, match=match):
            await self.settle(getattr(owner, name))
        seen[f"{type(owner).__name__}.{name}"].add(FAILED)

    async def refused(self, method: Any, error: Any, match: str, *args: Any, **options: Any) -> Any:
        """Call a method that this service must refuse with an error; the error."""
        return await self.fails(method, error, match, *args, outcome=REFUSED, **options)

    @asynccontextmanager
    async def inside(self, manager: Any) -> AsyncIterator[Any]:
        """`with` or `async with`, whichever it is."""
        if hasattr(manager, "__aenter__"):
            async with manager as value:
                seen[f"{type(manager).__name__}.__aenter__"].add(OK)
                yield value
        else:
            with manager as value:
                seen[f"{type(manager).__name__}.__enter__"].add(OK)
                yield value

    @asynccontextmanager
    async def sandbox(self, **options: Any) -> AsyncIterator[Any]:
        """A sandbox for the length of a block."""
        async with self.inside(await self.ok(self.client.sandbox, **options)) as made:
            yield made

    async def each(self, handle: Any) -> AsyncIterator[Any]:
        """`for` or `async for`, whichever it is; records how it ends."""
        name = f"{type(handle).__name__}.__{'aiter' if hasattr(handle, '__aiter__') else 'iter'}__"
        try:
            if hasattr(handle, "__aiter__"):
                async for chunk in handle:
                    yield chunk
            else:
                for chunk in handle:
                    yield chunk
        except sdk.SandboxClientError:
            seen[name].add(FAILED)
            raise
        seen[name].add(OK)

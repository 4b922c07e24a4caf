"""The fields of a request: taken one by one, each with its type and bounds; what is wrong is told by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gatewayd.api import ErrorKind
from gatewayd.errors import GatewayError, printable

TEXT_MAX = 65536  # characters of one text
ITEMS_MAX = 4096  # of one list or mapping


class Fields:
    """A JSON object whose fields are asked for by name. Every method raises GatewayError (usage)."""

    def __init__(self, data: Mapping[str, Any]) -> None:
        self._data = data

    def __contains__(self, name: str) -> bool:
        return self._data.get(name) is not None

    def only(self, *names: str) -> None:
        """Refuse every other field: a misspelt one would be ignored silently."""
        for name in self._data:
            if name not in names:
                raise _wrong(name, "is no field of this request")

    def some(self, *names: str) -> dict[str, Any]:
        """Those of the fields that are there, unchecked: the service judges them."""
        return {name: self._data[name] for name in names if self._data.get(name) is not None}

    def text(self, name: str, default: str | None = None) -> str:
        """A string; required when there is no default."""
        value = self._data.get(name)
        if value is None:
            if default is None:
                raise _wrong(name, "is missing")
            return default
        if not isinstance(value, str) or len(value) > TEXT_MAX:
            raise _wrong(name, "must be a string")
        return value

    def whole(self, name: str, default: int | None = None, *, least: int = 0, most: int = 2**53) -> int:
        """An integer within bounds; required when there is no default."""
        value = self._data.get(name)
        if value is None:
            if default is None:
                raise _wrong(name, "is missing")
            return default
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise _wrong(name, f"must be a whole number from {least} to {most}")
        return value

    def number(self, name: str, default: float, *, least: float = 0.0, most: float = 86400.0) -> float:
        """A number within bounds."""
        value = self._data.get(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
            raise _wrong(name, f"must be a number from {least:g} to {most:g}")
        return float(value)

    def flag(self, name: str, default: bool = False) -> bool:
        """True or false."""
        value = self._data.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise _wrong(name, "must be true or false")
        return value

    def texts(self, name: str) -> list[str] | None:
        """A list of strings, or None."""
        value = self._data.get(name)
        if value is None:
            return None
        if not isinstance(value, list) or len(value) > ITEMS_MAX or not all(isinstance(item, str) for item in value):
            raise _wrong(name, "must be a list of strings")
        return value

    def mapping(self, name: str) -> dict[str, str]:
        """Names to strings; empty when it is missing."""
        value = self._data.get(name)
        if value is None:
            return {}
        if not isinstance(value, dict) or len(value) > ITEMS_MAX or not all(isinstance(item, str) for item in value.values()):
            raise _wrong(name, "must map names to strings")
        return value

    def port(self, name: str, default: int | None = None, *, least: int = 1) -> int:
        """A TCP port."""
        return self.whole(name, default, least=least, most=65535)


def _wrong(name: str, what: str) -> GatewayError:
    return GatewayError(f"{printable(name, 64)} {what}", kind=ErrorKind.USAGE)

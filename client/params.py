"""Parameter types: sandbox names, sizes, durations, ports, KEY=VALUE pairs, JSON or @FILE. Each error says what is expected."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, Any, NoReturn

import click

from client.proxy import is_name

KIB = 1024
SIZE_UNITS = {"mb": KIB**2, "gb": KIB**3, "tb": KIB**4}
SIZE_MIN = KIB**2  # 1 MiB
SIZE_MAX = KIB**5  # 1 PiB
DURATION_UNITS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}
TIMEOUT_MAX = 7 * 86400.0  # seconds; longer waits than a week are typing errors


class BadWord(click.BadParameter):
    """A value that cannot be used.

    Attributes:
        word: the value as the user typed it, for pointing at it.
    """

    def __init__(self, message: str, word: str, param: click.Parameter | None, ctx: click.Context | None) -> None:
        super().__init__(message, ctx=ctx, param=param)
        self.word = word


if TYPE_CHECKING:
    _ParamType = click.ParamType[Any]
else:
    _ParamType = click.ParamType  # generic in newer releases of click only


class _Type(_ParamType):
    """Base of the types below: text in, value out."""

    def bad(self, message: str, word: str, param: click.Parameter | None, ctx: click.Context | None) -> NoReturn:
        """Refuse `word`."""
        raise BadWord(message, word, param, ctx)


class Name(_Type):
    """A sandbox name: a DNS label."""

    name = "name"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return the name unchanged."""
        text = str(value)
        if not is_name(text):
            self.bad("a sandbox name has 1 to 63 of a-z, 0-9 and -, and neither begins nor ends with -", text, param, ctx)
        return text


class Size(_Type):
    """An amount of memory or disk, in bytes: a number with mb, gb or tb, 1024-based."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return bytes; a fraction of a byte is dropped."""
        if isinstance(value, int):
            return value
        text = str(value)
        match = re.fullmatch(r"([0-9]{1,20})(?:\.([0-9]{1,20}))?([a-z]*)", text.strip().lower())
        if match is None:
            self.bad("a size is a number with a unit, such as 512mb or 1.5gb", text, param, ctx)
        whole, fraction, unit = match[1], match[2] or "", match[3]
        if not unit:
            self.bad(f"a size needs a unit (mb, gb or tb), for example {text.strip()}mb", text, param, ctx)
        if unit not in SIZE_UNITS:
            self.bad(f"there is no unit {unit!r}: use mb, gb or tb", text, param, ctx)
        size = int(whole + fraction) * SIZE_UNITS[unit] // int("1" + "0" * len(fraction))
        if not SIZE_MIN <= size <= SIZE_MAX:
            self.bad("a size is at least 1mb and at most 1024tb", text, param, ctx)
        return size


class Duration(_Type):
    """A time in seconds: a number, or one with s, m, h or d."""

    name = "duration"

    def __init__(self, step: int = 1) -> None:
        self.step = step  # the value must be a multiple of this many seconds

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return seconds."""
        if isinstance(value, int):
            return value
        text = str(value)
        match = re.fullmatch(r"([0-9]{1,10})([smhd]?)", text.strip().lower())
        if match is None:
            self.bad("a duration is a number of seconds, or one with s, m, h or d, such as 90 or 10m", text, param, ctx)
        seconds = int(match[1]) * DURATION_UNITS[match[2]]
        if seconds % self.step:
            self.bad(f"it must be a multiple of {self.step} seconds", text, param, ctx)
        return seconds


class Timeout(_Type):
    """How long to wait, in seconds: a number, fractions allowed, or one with s, m, h or d."""

    name = "timeout"

    def __init__(self, zero: bool = False) -> None:
        self.zero = zero  # whether 0 is allowed

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Return seconds."""
        text = str(value)
        match = re.fullmatch(r"([0-9]{1,10}(?:\.[0-9]{1,9})?)([smhd]?)", text.strip().lower())
        if match is None:
            self.bad("a timeout is a number of seconds, or one with s, m, h or d, such as 30 or 5m", text, param, ctx)
        seconds = float(match[1]) * DURATION_UNITS[match[2]]
        if seconds > TIMEOUT_MAX or not (seconds or self.zero):
            self.bad("a timeout is more than 0 and at most 7d", text, param, ctx)
        return seconds


class Port(_Type):
    """A TCP port."""

    name = "port"

    def __init__(self, zero: bool = False) -> None:
        self.zero = zero  # whether 0, "any free port", is allowed

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return the port."""
        text = str(value)
        least = 0 if self.zero else 1
        if not (text.isascii() and text.isdigit() and len(text) <= 5 and least <= int(text) <= 65535):
            self.bad(f"a port is a number from {least} to 65535", text, param, ctx)
        return int(text)


class Pair(_Type):
    """KEY=VALUE. The value may be a secret: no error shows it."""

    name = "key=value"

    def __init__(self, inherit: bool = False) -> None:
        self.inherit = inherit  # whether a KEY alone takes its value from this process's environment

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, str]:
        """Return key and value."""
        if isinstance(value, tuple):
            return str(value[0]), str(value[1])
        key, equals, text = str(value).partition("=")
        if not key or "\0" in key:
            self.bad("it must read KEY=VALUE", "", param, ctx)
        if not equals:
            if not self.inherit:
                self.bad("it must read KEY=VALUE", "", param, ctx)
            if key not in os.environ:
                self.bad(f"{key} is not set here: give its value as {key}=VALUE", key, param, ctx)
            text = os.environ[key]
        try:
            text.encode()
        except UnicodeEncodeError:
            self.bad(f"the value of {key} is not UTF-8", "", param, ctx)
        return key, text


class Json(_Type):
    """A JSON object, or @FILE with one. It may hold secrets: no error shows it."""

    name = "json|@file"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> dict[str, Any]:
        """Return the decoded object."""
        import json
        from pathlib import Path

        if isinstance(value, dict):
            return value
        text, source = str(value), "it"
        if text.startswith("@"):
            source = text[1:]
            try:
                text = Path(source).read_text(encoding="utf-8")
            except OSError as exc:
                self.bad(f"cannot read {source}: {exc.strerror}", str(value), param, ctx)
            except UnicodeDecodeError:
                self.bad(f"{source} is not UTF-8 text", str(value), param, ctx)
        word = str(value) if source != "it" else ""
        try:
            decoded = json.loads(text)
        except json.JSONDecodeError as exc:
            self.bad(f"{source} is not JSON: {exc.msg} at line {exc.lineno}, column {exc.colno}", word, param, ctx)
        except RecursionError:
            self.bad(f"{source} is nested too deeply", word, param, ctx)
        if not isinstance(decoded, dict):
            self.bad(f"{source} must be a JSON object", word, param, ctx)
        return decoded

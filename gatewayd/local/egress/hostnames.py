"""Host names in one spelling, and the patterns that they are matched with (protocol section 1, *proxy_config*)."""

from __future__ import annotations

import re
from collections.abc import Callable
from ipaddress import ip_address, ip_network

_LABEL = re.compile(r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?")
_MAX_NAME = 253  # characters (RFC 1035 section 2.3.4)
_MAX_PATTERN = 1000  # characters

Matcher = Callable[[str], bool]  # of a canonical name or address


def canonical(name: str) -> str:
    """Lower case, A-labels, without the final dot; addresses in their short form. Raises ValueError for what is no host."""
    text = name.strip()
    if text.startswith("[") and text.endswith("]"):
        text = text[1:-1]
    try:
        return str(ip_address(text))
    except ValueError:
        pass
    text = text.removesuffix(".")
    if not text.isascii():
        try:
            text = text.encode("idna").decode("ascii")
        except UnicodeError:
            raise ValueError(f"not a host name: {name[:80]!r}") from None
    text = text.lower()
    labels = text.split(".")
    # a number at the end makes an address in an odd spelling of it (WHATWG URL, "ends in a number"): 127.1, 0x7f000001
    odd = labels[-1].isdecimal() or re.fullmatch(r"0x[0-9a-f]*", labels[-1])
    if not text or len(text) > _MAX_NAME or odd or not all(_LABEL.fullmatch(label) for label in labels):
        raise ValueError(f"not a host name: {name[:80]!r}")
    return text


def matcher(pattern: str) -> Matcher:
    """What a pattern matches: a name, a glob (`*`: any characters), an address, a network, `~` and a regular expression.

    Raises:
        ValueError: it is none of these.
    """
    if not pattern or len(pattern) > _MAX_PATTERN:
        raise ValueError(f"a pattern has 1 to {_MAX_PATTERN} characters")
    if pattern.startswith("~"):
        return _regular(pattern[1:])
    if "/" in pattern:
        return _network(pattern)
    if "*" in pattern or "?" in pattern:
        return _glob(pattern)
    wanted = canonical(pattern)
    return lambda host: host == wanted


def _regular(text: str) -> Matcher:
    try:
        compiled = re.compile(text, re.IGNORECASE)
    except (re.error, RecursionError, OverflowError) as exc:
        raise ValueError(f"not a regular expression: {exc}") from None
    return lambda host: compiled.fullmatch(host) is not None  # whole names: an expression without ^ and $ opens no others


def _network(text: str) -> Matcher:
    try:
        network = ip_network(text, strict=False)
    except ValueError:
        raise ValueError(f"not a network: {text[:80]!r}") from None

    def matches(host: str) -> bool:
        try:
            address = ip_address(host)
        except ValueError:
            return False
        return address.version == network.version and address in network

    return matches


def _glob(pattern: str) -> Matcher:
    text = pattern.removesuffix(".")
    if not text.isascii():
        text = ".".join(part if part.isascii() else part.encode("idna").decode("ascii") for part in text.split("."))
    if not re.fullmatch(r"[A-Za-z0-9_.:*?-]+", text):
        raise ValueError(f"not a pattern of host names: {pattern[:80]!r}")
    compiled = _wildcards(text.lower())
    return lambda host: compiled.fullmatch(host) is not None


def _wildcards(pattern: str) -> re.Pattern[str]:
    """`*`: any characters, `?`: one. The sandbox chooses what is matched: time is linear in it for each `*`.

    Each ``*`` but the last takes as little as it can and never reconsiders (an atomic group), so that they do not multiply.
    """
    first, *runs = ["".join("." if char == "?" else re.escape(char) for char in run) for run in re.split(r"\*+", pattern)]
    if not runs:
        return re.compile(first, re.DOTALL)
    return re.compile(first + "".join(f"(?>.*?{run})" for run in runs[:-1]) + ".*" + runs[-1], re.DOTALL)


def path_matcher(pattern: str) -> Matcher:
    """As `matcher`, for the path of a URL: exact, glob, `~` and a regular expression. Raises ValueError."""
    if not pattern or len(pattern) > _MAX_PATTERN:
        raise ValueError(f"a pattern has 1 to {_MAX_PATTERN} characters")
    if pattern.startswith("~"):
        return _regular_path(pattern[1:])
    if not pattern.startswith(("/", "*")):
        raise ValueError(f"a path begins with '/': {pattern[:80]!r}")
    compiled = _wildcards(pattern)
    return lambda path: compiled.fullmatch(path) is not None


def _regular_path(text: str) -> Matcher:
    try:
        compiled = re.compile(text)
    except (re.error, RecursionError, OverflowError) as exc:
        raise ValueError(f"not a regular expression: {exc}") from None
    return lambda path: compiled.match(path) is not None

"""Glob patterns over paths, pure: ``**`` for any number of segments; ``*``, ``?`` and ``[...]`` within one; ``\\`` quotes.

Matching takes time linear in the name for each ``*``, whatever the pattern: names come from hostile ground.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_ANYTHING = "*"  # token for any number of characters
_SPECIAL = re.compile(r"([*?\[\\])")


@dataclass(frozen=True)
class _Token:
    """A part of a segment."""

    literal: str = ""  # these characters; "" for the other kinds
    regex: str = ""  # one character that this matches, or _ANYTHING


class Glob:
    """A compiled pattern."""

    def __init__(self, pattern: str) -> None:
        self._segments: list[re.Pattern[str] | None] = []  # None: **
        prefix: list[str] = []  # leading segments without a special character
        tokens: list[_Token] = []
        for segment in pattern.split("/"):
            if segment in ("", "."):
                continue
            if segment == "**":
                self._segments.append(None)
                tokens = []
                continue
            tokens = _tokens(segment)
            if len(prefix) == len(self._segments) and all(token.literal for token in tokens):
                prefix.append("".join(token.literal for token in tokens))
            self._segments.append(_compiled(tokens))
        self.parents = any(name == ".." for name in prefix)  # it names what is not below the folder: nothing matches
        self.folder = "/".join(prefix[: len(self._segments) - 1])  # where every match lies, "" for anywhere
        self._below = self._segments[self.folder.count("/") + 1 if self.folder else 0 :]  # the rest of the pattern
        self.depth = None if None in self._below else len(self._below)  # segments of a match below the folder; None: any number
        self.name = _superset(tokens)  # a pattern of `*` and quoted characters that the last segment of each match fits

    def matches(self, path: str) -> bool:
        """Whether a path fits, given relative to `folder`."""
        return _fits(self._below, path.split("/"))

    def matches_name(self, path: str) -> bool:
        """Whether a path's last segment fits the pattern's last one."""
        last = self._segments[-1] if self._segments else None
        return last is None or last.match(path.rpartition("/")[2]) is not None


def _fits(wanted: list[re.Pattern[str] | None], names: list[str]) -> bool:
    """Segment by segment; after a mismatch the last ** takes one name more."""
    at = position = 0
    back: tuple[int, int] | None = None  # behind the last **, and how far it has taken names
    while position < len(names):
        if at < len(wanted) and (segment := wanted[at]) is None:
            back = (at + 1, position)
            at += 1
        elif at < len(wanted) and segment is not None and segment.match(names[position]):
            at += 1
            position += 1
        elif back is not None:
            back = (back[0], back[1] + 1)
            at, position = back
        else:
            return False
    return all(segment is None for segment in wanted[at:])


def _tokens(segment: str) -> list[_Token]:
    tokens: list[_Token] = []
    at = 0
    while at < len(segment):
        char = segment[at]
        at += 1
        if char == "*":
            if not tokens or tokens[-1].regex != _ANYTHING:
                tokens.append(_Token(regex=_ANYTHING))
        elif char == "?":
            tokens.append(_Token(regex="."))
        elif char == "[" and (end := segment.find("]", at + 1 + (segment[at : at + 1] in ("!", "^")))) > 0:
            tokens.append(_Token(regex=_char_class(segment[at:end])))
            at = end + 1
        else:
            if char == "\\" and at < len(segment):
                char = segment[at]
                at += 1
            tokens.append(_Token(literal=char))
    return tokens


def _char_class(content: str) -> str:
    negated = content[0] in "!^"
    content = content[negated:]
    parts = []
    at = 0
    while at < len(content):
        first = last = content[at]
        if content[at + 1 : at + 2] == "-" and at + 2 < len(content):
            last = content[at + 2]
            at += 2
        at += 1
        if first <= last:
            parts.append(f"{re.escape(first)}-{re.escape(last)}")
    if not parts:  # only ranges that run backwards
        return "." if negated else "(?!)"
    return f"[{'^' if negated else ''}{''.join(parts)}]"


def _compiled(tokens: list[_Token]) -> re.Pattern[str]:
    """Each ``*`` but the last takes as little as it can and never reconsiders (an atomic group): stars do not multiply."""
    runs: list[list[str]] = [[]]
    for token in tokens:
        if token.regex == _ANYTHING:
            runs.append([])
        else:
            runs[-1].append(re.escape(token.literal) if token.literal else token.regex)
    fixed = ["".join(run) for run in runs]
    source = fixed[0]
    if len(fixed) > 1:
        source += "".join(f"(?>.*?{run})" for run in fixed[1:-1]) + ".*" + fixed[-1]
    return re.compile(rf"{source}\Z", re.DOTALL)


def _superset(tokens: list[_Token]) -> str:
    parts = [_SPECIAL.sub(r"\\\1", token.literal) if token.literal else "*" for token in tokens]
    return "".join(part for index, part in enumerate(parts) if part != "*" or parts[index - 1 : index] != ["*"]) or "*"

"""The text of an ssh configuration, as bytes: lines as ssh reads them, blocks between two marks, words, known hosts.

Nothing here touches a file. What is not ours is never taken apart: it is kept byte for byte.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from client.proxy import Failure, printable
from gatewayd.api import ErrorKind

BEGIN, END = b"# begin ", b"# end "  # a label follows
OURS = (b"sandbox-", b"gatewayd")  # how labels begin; other comments of that kind are not ours


def unusable(path: Path, why: str, hint: str = "") -> Failure:
    """The failure (``config``) of a file that cannot be understood."""
    return Failure(ErrorKind.CONFIG, f"cannot use {path}: {why}", hint)


def lines(text: bytes) -> Iterator[tuple[int, bytes]]:
    """Start and text of each line, its end included. Only a newline ends one; a carriage return before it is white space."""
    start = 0
    while start < len(text):
        stop = text.find(b"\n", start) + 1 or len(text)
        yield start, text[start:stop]
        start = stop


def keyword(line: bytes) -> bytes:
    """The keyword of a line, in lower case; b"" for a comment or nothing (ssh_config(5): keyword, blanks or '=', arguments)."""
    words = line.replace(b"=", b" ", 1).split(maxsplit=1)
    return b"" if not words or words[0].startswith(b"#") else words[0].strip(b'"').lower()


def global_lines(text: bytes) -> Iterator[tuple[int, bytes]]:
    """The lines before the first Host or Match: only these are read for every host."""
    for start, line in lines(text):
        if keyword(line) in (b"host", b"match"):
            return
        yield start, line


# --- blocks ----------------------------------------------------------------------------------------------


def marked(label: str, body: bytes) -> bytes:
    """`body` between its two marks."""
    return BEGIN + label.encode() + b"\n" + body + END + label.encode() + b"\n"


def labels(text: bytes) -> list[str]:
    """The labels of the blocks in `text`."""
    return [label.decode() for _, line in lines(text) if (label := _label(line, BEGIN))]


def find(text: bytes, label: str, path: Path) -> tuple[bytes, bytes, bytes]:
    """`text` as what stands before the block of `label`, the block with its marks, and what follows.

    Without such a block all of it stands before.

    Raises:
        Failure: ``config``; a mark is missing, stands twice, or another block begins or ends in between: where the block ends
            cannot be known.
    """
    begin, end = BEGIN + label.encode(), END + label.encode()
    start = stop = -1
    for at, line in lines(text):
        mark = line.rstrip()
        if mark == begin:
            if start >= 0:
                raise unusable(path, f"the line {begin.decode()!r} stands there twice", _BY_HAND)
            start = at
        elif mark == end:
            if start < 0 or stop >= 0:
                raise unusable(path, f"the line {end.decode()!r} has no {begin.decode()!r} before it", _BY_HAND)
            stop = at + len(line)
    if start < 0:
        return text, b"", b""
    if stop < 0:
        raise unusable(path, f"the line {begin.decode()!r} has no {end.decode()!r} after it", _BY_HAND)
    block = text[start:stop]
    inner: list[bytes] = []
    for _, line in list(lines(block))[1:-1]:
        if began := _label(line, BEGIN):
            inner.append(began)
        elif (ended := _label(line, END)) and (not inner or inner.pop() != ended):
            raise unusable(path, f"another block ends inside that of {label}", _BY_HAND)
    if inner:
        raise unusable(path, f"another block begins inside that of {label}", _BY_HAND)
    return text[:start], block, text[stop:]


def _label(line: bytes, mark: bytes) -> bytes:
    label = line[len(mark) :].strip()
    return label if line.startswith(mark) and label.startswith(OURS) else b""


_BY_HAND = "take what is left of the block out by hand, then run `sandbox ssh-setup` again"


def notes(block: bytes, mark: bytes) -> list[str]:
    """The rest of each line of `block` that begins with `mark`."""
    return [line[len(mark) :].decode().strip() for _, line in lines(block) if line.startswith(mark)]


# --- the Include line ------------------------------------------------------------------------------------


def includes(main: bytes, include: bytes) -> bool:
    """Whether the line `include` stands where it counts for every host."""
    return any(line.strip() == include.strip() for _, line in global_lines(main))


def without_include(main: bytes, include: bytes) -> bytes:
    """`main` without that line."""
    for start, line in global_lines(main):
        if line.strip() == include.strip():
            return main[:start] + main[start + len(line) :]
    return main


# --- known hosts -----------------------------------------------------------------------------------------


def with_hosts(known: bytes, ours: Callable[[str], bool], new: bytes) -> bytes:
    """known_hosts with `new` in the place of the lines whose first word (hosts) is `ours`, or at its end."""
    kept: list[bytes] = []
    place = -1
    for _, line in lines(known):
        words = line.split(maxsplit=1)
        if not words or not ours(words[0].decode()):
            kept.append(line if line.endswith(b"\n") else line + b"\n")
        elif place < 0:
            place = len(kept)
    kept.insert(place if place >= 0 else len(kept), new)
    return b"".join(kept)


# --- words -----------------------------------------------------------------------------------------------


def quoted(path: Path) -> str:
    """`path` as one word of an ssh configuration.

    Raises:
        Failure: ``config``; ssh offers no way to write it.
    """
    text = str(path)
    if not text.isprintable() or any(bad in text for bad in ('"', "\\", "${")):
        raise Failure(ErrorKind.CONFIG, f"cannot use {text!r} in an ssh configuration")
    return f'"{text.replace("%", "%%")}"' if any(c in text for c in " '#=,") else text.replace("%", "%%")


def command(words: Sequence[str]) -> str:
    """`words` as a ProxyCommand: ssh expands % and hands the line to the user's shell.

    Raises:
        Failure: ``config``; ssh offers no way to write them.
    """
    line = " ".join(shlex.quote(word) for word in words).replace("%", "%%")
    if not line.isprintable():
        raise Failure(ErrorKind.CONFIG, f"cannot use {words!r} in an ssh configuration")
    return line


def diff(path: Path, before: bytes | None, after: bytes | None) -> str:
    """What changes in a file, as a unified diff; "" when nothing does. None: there is no such file."""
    from difflib import unified_diff

    def split(text: bytes | None) -> list[str]:
        return [printable(line.decode(errors="replace").removesuffix("\n")) for _, line in lines(text or b"")]

    old, new = (str(path) if text is not None else "/dev/null" for text in (before, after))
    changed = list(unified_diff(split(before), split(after), old, new, lineterm=""))
    if not changed and before != after:  # a file that is or becomes empty, or a line end
        changed = [f"--- {old}", f"+++ {new}"]
    return "".join(f"{printable(line)}\n" for line in changed)

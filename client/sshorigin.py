"""The header of ~/.ssh/gatewayd/config: how ~/.ssh/config looked before, so that it can be restored exactly."""

from __future__ import annotations

from client import sshtext

HEADER = b"# Written by `sandbox ssh-setup`: what stands between two marks is replaced as a whole.\n"
ORIGIN = b"# ssh-config: "  # the second line of the header, followed by an Origin


class Origin:
    """How ~/.ssh/config looked before our line, or our copy, came."""

    ALL = "made with ~/.ssh"  # not even ~/.ssh: remove that, too, when it is empty
    MADE = "made"  # there was none: remove it when it is empty again
    ADDED = "added"  # it was there without our line: take the line out
    PRESENT = "present"  # somebody had written our line: leave it


def _is_header(line: bytes) -> bool:
    return line.rstrip() == HEADER.rstrip() or line.startswith(ORIGIN)


def body(text: bytes) -> bytes:
    """`text` without the header."""
    return b"".join(line for _, line in sshtext.lines(text) if not _is_header(line))


def origin_of(text: bytes) -> str:
    """What the header of `text` says; without one, that ~/.ssh/config was there."""
    return next(iter(sshtext.notes(text, ORIGIN)), Origin.ADDED)


def with_origin(text: bytes, origin: str) -> bytes:
    """`text` with a header that says `origin`; the rest stays as it is."""
    line = ORIGIN + origin.encode() + b"\n"
    found = [(start, old) for start, old in sshtext.lines(text) if old.startswith(ORIGIN)]
    if not found:
        return HEADER + line + text
    start, old = found[0]
    return text[:start] + line + text[start + len(old) :]

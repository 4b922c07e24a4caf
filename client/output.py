"""What a command shows: one JSON document, tables for people, or bare names; and messages on standard error.

Everything that came from the service passes `clean` on its way to a person: a sandbox must not be able to act on the terminal.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TextIO

from client.proxy import Failure
from gatewayd.api import ErrorKind

FORMATS = ("json", "pretty", "id")

# CSI, OSC and the other string sequences, and two-byte escapes (ECMA-48), so that no half of a sequence stays behind as text.
_ESCAPES = re.compile(
    r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]?|(?:\x1b[\]PX^_]|[\x9d\x90\x98\x9e\x9f])[^\x07\x1b\x9c]*(?:\x07|\x1b\\|\x9c)?|\x1b.?"
)
_NOT_ASCII = re.compile(r"[^\n -~]")  # outside a string JSON has none of these; inside, some can act on a terminal

COLOURS = {
    "ready": "32",
    "up": "32",
    "running": "32",
    "provisioning": "33",
    "starting": "33",
    "connecting": "33",
    "failed": "31",
    "down": "31",
    "stopped": "2",
}
UNITS = ("B", "KB", "MB", "GB", "TB", "PB")


def clean(value: object) -> str:
    """`value` as one line of text that cannot act on a terminal; None is empty."""
    text = "" if value is None else str(value)
    return "".join(char if char.isprintable() else " " for char in _ESCAPES.sub("", text)).strip()


def message(text: str) -> None:
    """A line on standard error."""
    with suppress(OSError, ValueError, AttributeError):  # nobody reads it, or it is closed: not what the command is about
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()


def note(text: str) -> None:
    """A message of this command."""
    message(f"sandbox: {clean(text)}")


def write(text: str) -> None:
    """Text on standard output, flushed, so that a failure shows here and not at exit.

    Raises:
        BrokenPipeError: nobody reads it.
        Failure: it cannot be written for another reason.
    """
    if sys.stdout is None:  # closed by the caller, who does not want to know
        return
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        forget_stdout()
        raise
    except OSError as exc:
        forget_stdout()
        raise Failure(ErrorKind.FAILED, f"cannot write the output: {exc.strerror or exc}") from exc


def forget_stdout() -> None:
    """Let what is still in a buffer go nowhere, so that nothing tries to write it at exit."""
    null = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, 1)
    finally:
        os.close(null)


def is_terminal(stream: TextIO | None) -> bool:
    """Whether a standard stream is a terminal; one that is closed is none."""
    try:
        return stream is not None and stream.isatty()
    except ValueError:
        return False


def confirm(question: str) -> bool:
    """Ask on the terminal; only an answer that begins with y is a yes.

    `input` and what builds on it lose a ^C that arrives just before they read; the wake-up descriptor does not.

    Raises:
        KeyboardInterrupt: ^C was typed instead.
    """
    import select
    import signal

    sys.stderr.write(f"{clean(question)} [y/N] ")
    sys.stderr.flush()
    wake, woken = os.pipe()
    os.set_blocking(woken, False)
    before = signal.set_wakeup_fd(woken, warn_on_full_buffer=False)
    try:
        while 0 not in select.select([0, wake], [], [])[0]:
            os.read(wake, 64)  # a signal; those that end us have raised by now
        answer = os.read(0, 1024)
    finally:
        signal.set_wakeup_fd(before)
        os.close(wake)
        os.close(woken)
    if not answer:
        message("")  # ^D ends no line
    return answer.strip().lower().startswith(b"y")


def after_interrupt() -> None:
    """On a terminal, end the line that ^C was typed on."""
    if is_terminal(sys.stderr):
        message("")


@contextmanager
def progress(text: str) -> Iterator[None]:
    """On a terminal, says on standard error what is being waited for, and takes it back afterwards."""
    if not is_terminal(sys.stderr):
        yield
        return
    sys.stderr.write(f"{clean(text)} …")
    sys.stderr.flush()
    try:
        yield
    finally:
        sys.stderr.write("\r\x1b[K")
        sys.stderr.flush()


def step(text: str) -> None:
    """Within `progress`: says anew what is being waited for, on the same line."""
    if is_terminal(sys.stderr):
        sys.stderr.write(f"\r\x1b[K{shorten(clean(text), 100)} …")
        sys.stderr.flush()


def as_json(value: object, indent: int | None = 2) -> str:
    """One JSON document and a newline, readable by people and harmless on a terminal."""
    import json

    text = json.dumps(value, indent=indent, ensure_ascii=False)
    return _NOT_ASCII.sub(lambda match: match[0] if match[0].isprintable() else json.dumps(match[0])[1:-1], text) + "\n"


def show(form: str, value: object, pretty: Callable[[], str], ids: Iterable[object]) -> None:
    """Write `value` in the format asked for; `pretty` makes its text for people, `ids` names what it is about."""
    if form == "pretty":
        write(pretty().rstrip("\n") + "\n")
    elif form == "id":
        write("".join(f"{clean(item)}\n" for item in ids))
    else:
        write(as_json(value))


# --- tables ----------------------------------------------------------------------------------------------


def use_colour() -> bool:
    """Whether standard output is a terminal that may be coloured (https://no-color.org)."""
    return not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb" and is_terminal(sys.stdout)


def columns() -> int:
    """Width to fit a table into: the terminal's, or ``$COLUMNS``; unlimited in a pipe."""
    try:
        asked = int(os.environ.get("COLUMNS", "0"))
    except ValueError:
        asked = 0
    if asked > 0:
        return asked
    try:
        return os.get_terminal_size(sys.stdout.fileno()).columns or 80
    except (OSError, ValueError, AttributeError):
        return sys.maxsize


def width(text: str) -> int:
    """Terminal cells that `text` takes."""
    if text.isascii():
        return len(text)
    from unicodedata import combining, east_asian_width

    return sum(0 if combining(char) else 2 if east_asian_width(char) in "WF" else 1 for char in text)


def shorten(text: str, cells: int) -> str:
    """`text` in at most `cells` cells, with an ellipsis where something is missing."""
    if width(text) <= cells:
        return text
    while text and width(text) > cells - 1:
        text = text[:-1]
    return text + "…" if cells > 0 else ""


def table(
    headers: Sequence[str], rows: Iterable[Sequence[object]], *, cells: int | None = None, colour: bool | None = None
) -> str:
    """A table that fits into `cells` (default: the terminal). The widest columns give way first, none below its header."""
    cells = columns() if cells is None else cells
    colour = use_colour() if colour is None else colour
    body = [[clean(value) or "-" for value in row] for row in rows]
    widths = [max(width(row[i]) for row in [list(headers), *body]) for i in range(len(headers))]
    least = [width(header) for header in headers]
    excess = sum(widths) + 2 * (len(widths) - 1) - cells
    while excess > 0:
        spare = [have - need for have, need in zip(widths, least, strict=True)]
        if max(spare) <= 0:
            break
        widest = max((i for i in range(len(widths)) if spare[i] > 0), key=lambda i: widths[i])
        widths[widest] -= 1
        excess -= 1
    lines = []
    for number, row in enumerate([list(headers), *body]):
        parts = []
        for value, space in zip(row, widths, strict=True):
            text = shorten(value, space)
            pad = " " * (space - width(text))
            style = ("1" if number == 0 else COLOURS.get(value)) if colour else None
            parts.append((f"\x1b[{style}m{text}\x1b[0m" if style else text) + pad)
        lines.append("  ".join(parts).rstrip())
    return "\n".join(lines) + "\n"


def facts(pairs: Iterable[tuple[str, object]], *, colour: bool | None = None) -> str:
    """Names and values below each other; pairs without a value are left out."""
    colour = use_colour() if colour is None else colour
    shown = [(name, clean(value)) for name, value in pairs]
    shown = [(name, value) for name, value in shown if value]
    space = max((width(name) for name, _ in shown), default=0)
    lines = []
    for name, value in shown:
        style = COLOURS.get(value) if colour else None
        lines.append(f"{name}{' ' * (space - width(name))}  " + (f"\x1b[{style}m{value}\x1b[0m" if style else value))
    return "\n".join(lines) + "\n"


# --- values ----------------------------------------------------------------------------------------------


def size(value: object) -> str:
    """Bytes for people, 1024-based as the options are: 512MB, 1.5GB; "" for what is no number."""
    if not isinstance(value, int | float) or isinstance(value, bool) or value < 0:
        return ""
    number, unit = float(value), 0
    while number >= 1024 and unit < len(UNITS) - 1:
        number, unit = number / 1024, unit + 1
    return f"{number:.4g}{UNITS[unit]}" if number < 1000 else f"{number:.0f}{UNITS[unit]}"


def duration(seconds: object) -> str:
    """Seconds for people, the two largest units: 3d 4h, 12m, 5s; "" for what is no number."""
    if not isinstance(seconds, int | float) or isinstance(seconds, bool):
        return ""
    left = max(0, int(seconds))
    parts = []
    for unit, length in (("d", 86400), ("h", 3600), ("m", 60), ("s", 1)):
        count, left = divmod(left, length)
        if count:
            parts.append(f"{count}{unit}")
    return " ".join(parts[:2]) or "0s"


def age(stamp: object) -> str:
    """How long ago an ISO 8601 time was; the time itself when it cannot be read."""
    from datetime import UTC, datetime

    if not isinstance(stamp, str) or not stamp:
        return ""
    try:
        then = datetime.fromisoformat(stamp)
    except ValueError:
        return stamp
    if then.tzinfo is None:
        then = then.replace(tzinfo=UTC)
    return duration((datetime.now(UTC) - then).total_seconds())


def labels(value: object) -> str:
    """``k=v`` pairs."""
    return ", ".join(f"{key}={val}" for key, val in value.items()) if isinstance(value, Mapping) else ""


def field(value: Any, name: str) -> Any:
    """`value[name]` of an answer, None when it has no such thing."""
    return value.get(name) if isinstance(value, Mapping) else None

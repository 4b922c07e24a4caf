"""``gatewayd``: the daemon. ``gatewayd local …``: the embedded sandbox service."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from gatewayd.api import EXIT_CODES, VERSION, ErrorKind
from gatewayd.errors import GatewayError

USAGE = """\
usage: gatewayd [--log-level LEVEL]
       gatewayd local --port N --state-dir DIR [--host 127.0.0.1]
       gatewayd --version | --help

Without a word it runs the gateway in the foreground: the daemon behind the `sandbox` command, one per user.
`gatewayd local` runs the embedded sandbox service.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run what `argv` asks for and return the exit code. Nothing escapes as a traceback."""
    args = list(sys.argv[1:] if argv is None else argv)
    try:
        return _dispatch(args)
    except GatewayError as exc:
        return _fail(exc.message, exc.kind, exc.hint)
    except KeyboardInterrupt:
        return _fail("interrupted", ErrorKind.INTERRUPTED)
    except Exception as exc:  # noqa: BLE001 - the last boundary: a defect becomes one line
        return _fail(f"internal error: {_describe(exc)}", ErrorKind.INTERNAL)


def _dispatch(args: list[str]) -> int:
    if args[:1] == ["local"]:
        from gatewayd.local.server import main as local_main

        return local_main(args[1:])
    if args in (["--version"], ["-V"]):
        sys.stdout.write(f"gatewayd {VERSION}\n")
        return 0
    if args in (["--help"], ["-h"]):
        sys.stdout.write(USAGE)
        return 0
    level = "info"
    if args[:1] == ["--log-level"] and len(args) > 1:
        level, args = args[1], args[2:]
    if args:
        sys.stderr.write(f"gatewayd: unknown argument {args[0]!r}\n{USAGE}")
        return EXIT_CODES[ErrorKind.USAGE]
    from gatewayd.daemon import main as daemon_main

    return daemon_main(level)


def _describe(exc: Exception) -> str:
    """The exception and the innermost line it came through, on one line."""
    trace = exc.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    where = f" ({trace.tb_frame.f_globals.get('__name__', '?')}:{trace.tb_lineno})" if trace is not None else ""
    return f"{type(exc).__name__}: {exc}{where}".replace("\n", " ")


def _fail(message: str, kind: str, hint: str = "") -> int:
    sys.stderr.write(f"gatewayd: {message}\n" + (f"hint: {hint}\n" if hint else ""))
    return EXIT_CODES.get(kind, EXIT_CODES[ErrorKind.INTERNAL])


if __name__ == "__main__":
    sys.exit(main())

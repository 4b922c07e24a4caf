"""The command ``sandbox``."""

import os
import sys


def main() -> None:
    """Run the command line and exit. ``sandbox proxy`` is run before anything else is imported: ssh waits for it."""
    try:
        _occupy()
        if sys.argv[1:2] == ["proxy"]:
            from client import proxy

            sys.exit(proxy.main(sys.argv[2:]))
        from client.cli import cli

        cli.main()
    except KeyboardInterrupt:  # while importing
        sys.exit(130)


def _occupy() -> None:
    """Put the null device on each standard descriptor that is closed: else a connection would get its number."""
    for fd in (0, 1, 2):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free


if __name__ == "__main__":
    main()

"""Who listens on a local port, as far as /proc tells."""

from __future__ import annotations

from pathlib import Path

from gatewayd.errors import printable

LISTEN = "0A"  # state of a listening socket in /proc/net/tcp
PROCESSES_MAX = 4096  # looked at before giving up


def port_owner(port: int, proc: Path = Path("/proc")) -> str:
    """The holder as "NAME (pid N)", or "" when it cannot be seen: another user's process, mostly."""
    inodes = _listening_inodes(port, proc)
    if not inodes:
        return ""
    wanted = {f"socket:[{inode}]" for inode in inodes}
    for count, directory in enumerate(proc.iterdir()):
        if count > PROCESSES_MAX:
            break
        if not directory.name.isdigit():
            continue
        try:
            found = any(str(link.readlink()) in wanted for link in (directory / "fd").iterdir())
        except OSError:  # gone, or not ours to look at
            continue
        if found:
            return f"{_name(directory)} (pid {directory.name})"
    return ""


def _listening_inodes(port: int, proc: Path) -> set[str]:
    inodes = set()
    for table in ("tcp", "tcp6"):
        try:
            lines = (proc / "net" / table).read_text().splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            fields = line.split()
            if len(fields) > 9 and fields[3] == LISTEN and fields[1].rpartition(":")[2] == f"{port:04X}":
                inodes.add(fields[9])
    return inodes


def _name(directory: Path) -> str:
    try:
        return printable((directory / "comm").read_text().strip(), 32)
    except OSError:
        return "a process"

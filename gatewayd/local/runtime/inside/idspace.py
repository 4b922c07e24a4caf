"""Making a user namespace whose ids are mapped from outside (user_namespaces(7)).

Whoever wants one forks: the child unshares and waits, the parent maps its ids, the child becomes root in there.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
from pathlib import Path
from typing import Any


class MapError(Exception):
    """The ids could not be mapped; the message is for the user."""


def write_maps(pid: int, id_map: dict[str, Any]) -> None:
    """Map the ids of a process's new user namespace: directly as root, else by newuidmap(1).

    Args:
        id_map: `IdMap.plan()`.

    Raises:
        MapError, OSError: the ids are not ours to give.
    """
    method = id_map["method"]
    if method == "single":
        Path(f"/proc/{pid}/setgroups").write_text("deny")
    for kind in ("uid", "gid"):
        rows = [[str(number) for number in row] for row in id_map[kind]]
        if method == "newuidmap":
            words = [word for row in rows for word in row]
            done = subprocess.run([f"new{kind}map", str(pid), *words], capture_output=True, text=True, check=False)
            if done.returncode != 0:
                raise MapError(f"new{kind}map: {done.stderr.strip()}")
        else:
            Path(f"/proc/{pid}/{kind}_map").write_text("\n".join(" ".join(row) for row in rows))


def become_root() -> None:
    """Take the ids of root in the namespace just mapped."""
    os.setresgid(0, 0, 0)
    os.setresuid(0, 0, 0)
    with contextlib.suppress(PermissionError):  # refused where only one id is mapped; nothing to drop there either
        os.setgroups([])

"""Which ids of this machine a sandbox's users are (user_namespaces(7)).

Inside, root is 0 and there are 65,536 ids. As root on the host they are a range of their own that no account uses; as a plain
user, root inside is the user, and the others come from /etc/subuid through newuidmap(1).
"""

from __future__ import annotations

import os
import pwd
import shutil
from dataclasses import dataclass
from pathlib import Path

_IDS = 65_536  # ids inside a sandbox
_ROOT_BASE = 1_900_000_000  # first id of the range used when the service runs as root: above what systemd and useradd hand out


@dataclass(frozen=True)
class IdMap:
    """One mapping for users and groups; rows are (inside, outside, count)."""

    method: str  # "direct" (we may write it), "newuidmap", or "single" (root only)
    uid: tuple[tuple[int, int, int], ...]
    gid: tuple[tuple[int, int, int], ...]

    @property
    def root_uid(self) -> int:
        """The host's id of root inside."""
        return self.uid[0][1]

    @property
    def root_gid(self) -> int:
        """The host's group id of root inside."""
        return self.gid[0][1]

    def plan(self) -> dict[str, object]:
        """As the monitor reads it."""
        return {"method": self.method, "uid": self.uid, "gid": self.gid}


def _subordinate(path: str, name: str, uid: int) -> tuple[int, int] | None:
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        owner, _, rest = line.partition(":")
        start, _, count = rest.partition(":")
        if owner in (name, str(uid)) and start.isdecimal() and count.isdecimal() and int(count) >= _IDS - 1:
            return int(start), int(count)
    return None


def current() -> IdMap:
    """The mapping for whoever runs this process."""
    uid, gid = os.getuid(), os.getgid()
    if uid == 0:
        rows = ((0, _ROOT_BASE, _IDS),)
        return IdMap("direct", rows, rows)
    try:
        name = pwd.getpwuid(uid).pw_name
    except KeyError:
        name = str(uid)
    users, groups = _subordinate("/etc/subuid", name, uid), _subordinate("/etc/subgid", name, uid)
    if users and groups and shutil.which("newuidmap") and shutil.which("newgidmap"):
        return IdMap("newuidmap", ((0, uid, 1), (1, users[0], _IDS - 1)), ((0, gid, 1), (1, groups[0], _IDS - 1)))
    return IdMap("single", ((0, uid, 1),), ((0, gid, 1),))

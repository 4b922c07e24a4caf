"""Accounts of a sandbox, read from its own /etc/passwd and /etc/group, and acting as one of them.

The files belong to the sandbox, so they are read with a limit, and a line that makes no sense is passed over.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from gatewayd.local.runtime.inside import kernel

FIRST_HUMAN = 1000  # uids from here on belong to people: login.defs UID_MIN
_MAX_FILE = 1 << 20  # bytes of passwd or group that are read


class Account(NamedTuple):
    """Whom a process runs as."""

    name: str
    uid: int
    gid: int
    groups: list[int]  # supplementary groups
    home: str
    shell: str


def _lines(path: str, fields: int) -> list[list[str]]:
    try:
        with Path(path).open("rb") as file:
            text = file.read(_MAX_FILE).decode("utf-8", "replace")
    except OSError:
        return []
    rows = [line.split(":") for line in text.splitlines()]
    return [row for row in rows if len(row) >= fields]


def everyone() -> list[Account]:
    """All accounts of /etc/passwd, without supplementary groups."""
    found = []
    for name, _, uid, gid, _, home, shell in (row[:7] for row in _lines("/etc/passwd", 7)):
        if uid.isdecimal() and gid.isdecimal():
            found.append(Account(name, int(uid), int(gid), [], home or "/", shell or "/bin/sh"))
    return found


def resolve(user: str | None) -> Account:
    """``name``, ``uid``, ``name:group`` or ``uid:gid``, as `docker run -u`; None is root.

    Raises:
        LookupError: no such user or group, with a message.
    """
    name, _, group = (user or "root").partition(":")
    everybody = everyone()
    account = next((a for a in everybody if a.name == name), None)
    if account is None and name.isdecimal():
        account = next((a for a in everybody if a.uid == int(name)), Account(name, int(name), int(name), [], "/", "/bin/sh"))
    if account is None and name == "root":  # an image without /etc/passwd still has root
        account = Account("root", 0, 0, [], "/root", "/bin/sh")
    if account is None:
        raise LookupError(f"no user {name!r} in this sandbox")
    groups = [row for row in _lines("/etc/group", 4) if row[2].isdecimal()]
    if group:
        gid = int(group) if group.isdecimal() else next((int(row[2]) for row in groups if row[0] == group), None)
        if gid is None:
            raise LookupError(f"no group {group!r} in this sandbox")
        return account._replace(gid=gid, groups=[gid])
    member_of = [int(row[2]) for row in groups if account.name in row[3].split(",")]
    return account._replace(groups=[account.gid, *member_of])


@contextlib.contextmanager
def as_user(account: Account) -> Iterator[None]:
    """Act on files with the rights of `account`, then be root again. Raises OSError where its ids are not mapped."""
    if account.uid == 0:
        yield
        return
    try:
        os.setgroups(account.groups)
        os.setegid(account.gid)
        os.seteuid(account.uid)
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)
        os.setgroups([])
        kernel.hide_from_tracers()  # the kernel recomputes it at each change of ids

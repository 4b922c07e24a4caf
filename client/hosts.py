"""What other commands do about ssh where ssh-setup was run: cheap where it was not, and never a reason to fail."""
# pathlib and the modules around ~/.ssh would be most of those commands' start-up time:
# ruff: noqa: PTH111, PTH110, PTH118

from __future__ import annotations

import os
from collections.abc import Sequence

from client import output, proxy
from client.control import Control
from client.proxy import Failure


def is_set_up() -> bool:
    """Whether `ssh-setup` has been run, as far as one look can tell."""
    return os.path.exists(os.path.join(os.environ.get("HOME") or os.path.expanduser("~"), ".ssh", "gatewayd", "config"))


def relist(control: Control, *, added: Sequence[str] = (), gone: Sequence[str] = ()) -> None:
    """Sandboxes have come or gone: have them listed by the programs that show ssh's hosts."""
    if not (added or gone) or not is_set_up():
        return
    from client.sshblocks import Gateway
    from client.sshhome import helper_words, profile_of, ssh_files

    try:
        files = ssh_files()
        before = files.gateway()
        if before is None or not (set(added) - set(before.listed) or set(gone) & set(before.listed)):
            return
        profile, helper = profile_of(control), helper_words()

        def edit(gateway: Gateway) -> Gateway:
            gateway = gateway.without_names(gone, profile)
            for name in filter(proxy.is_name, added):
                gateway = gateway.with_name(profile, name, helper)
            return gateway

        files.relist(edit)
    except Failure as exc:
        output.note(f"ssh's list of hosts stays as it was: {exc.message}")


def is_direct(name: str) -> bool:
    """Whether ssh reaches sandbox `name` through its own sshd. A configuration that cannot be read says nothing."""
    if not is_set_up():
        return False
    from client.sshhome import ssh_files

    try:
        return ssh_files().has(name)
    except Failure:
        return False

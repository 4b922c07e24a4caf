"""What commands need around ~/.ssh: whose it is, and which program ssh is to run."""

from __future__ import annotations

import os
import pwd
import sys
from pathlib import Path

from client import output, proxy
from client.control import Control
from client.proxy import Failure
from client.sshconfig import SshConfig
from gatewayd import api


def ssh_files() -> SshConfig:
    """~/.ssh. ssh itself takes the home directory from the user database, whatever $HOME says.

    Raises:
        Failure: ``config``; there is no such place.
    """
    try:
        own = pwd.getpwuid(os.getuid()).pw_dir
    except KeyError:  # a container's user without an entry
        own = ""
    home = Path(os.environ.get("HOME") or own)
    if not home.is_absolute():
        raise Failure(api.ErrorKind.CONFIG, f"cannot use the home directory {str(home)!r}: it is not an absolute path")
    try:
        same = bool(own) and home.samefile(own)
    except OSError:
        same = False
    return SshConfig(home, tilde=same)


def helper_words() -> list[str]:
    """The ProxyCommand helper: this interpreter, without the environment and without site-packages."""
    return [sys.executable, "-I", "-S", str(Path(proxy.__file__).resolve())]


def profile_of(control: Control) -> str:
    """The profile that this invocation is answered with: ssh shall use the same, from whatever environment it is started."""
    fields = api.caller_fields(control.profile)
    if api.FIELD_PROFILE in fields:
        return fields[api.FIELD_PROFILE]
    if api.FIELD_API_KEY in fields:
        return api.PROFILE_ENV
    return str(output.field(control.request("GET", "/status"), "profile") or "")

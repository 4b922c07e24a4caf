"""ssh-setup."""

from __future__ import annotations

import os
import pwd
import sys
from pathlib import Path
from typing import Any

import click

from client import output, proxy, sshkeys
from client.cli import Command, Settings, pass_settings
from client.control import Control
from client.params import Name
from client.proxy import Failure
from client.sshconfig import Entry, SshConfig
from gatewayd import api

HOST_KEYS_MAX = 16


@click.command(
    "ssh-setup",
    cls=Command,
    examples=("sandbox ssh-setup demo", "ssh sandbox-demo", "sandbox ssh-setup demo --remove"),
)
@click.argument("name", type=Name())
@click.option(
    "--identity",
    type=click.Path(path_type=Path),
    metavar="PUB",
    help="Public key to install; default: id_ed25519.pub, id_ecdsa.pub or id_rsa.pub of ~/.ssh, else those of the agent.",
)
@click.option("--remove", is_flag=True, help="Undo it: here and inside the sandbox.")
@click.option("--print", "print_only", is_flag=True, help="Set up the sandbox, but only show what would be written here.")
@pass_settings
def ssh_setup_command(settings: Settings, name: str, identity: Path | None, remove: bool, print_only: bool) -> None:
    """Make `ssh sandbox-NAME` work, and with it scp, sftp, rsync, git and every editor that speaks ssh.

    Your public key goes into the sandbox, its host key into ~/.ssh/gatewayd/known_hosts, a block into ~/.ssh/gatewayd/config,
    and one Include line to the top of ~/.ssh/config. Nothing secret is written.
    """
    if remove and (identity is not None or print_only):
        raise click.UsageError("--remove goes with no other option")
    files = _files()
    if remove:
        _remove(settings, files, name)
        return
    control = settings.control()
    found = sshkeys.find_identity(identity, files.ssh)
    with output.progress(f"setting up ssh in {name}"):
        answer = control.sandbox("POST", name, "/ssh-setup", body={"public_keys": list(found.keys)})
        profile = _profile(control)
    user, host_keys, added = _checked(answer)
    words = [sys.executable, "-I", "-S", str(Path(proxy.__file__).resolve())]
    words += [*(["--profile", profile] if profile else []), name]
    kept = [key for key in files.authorized(name) if key not in added]
    entry = Entry(name, user, host_keys, words, found.file, [*kept, *added], profile)
    if print_only:
        known = files.known_lines(entry).decode()
        output.write(f"# {files.config}\n{files.render(entry).decode()}\n# {files.known_hosts}\n{known}")
        return
    files.add(entry)
    result = {
        "host": entry.host,
        "command": f"ssh {entry.host}" if files.tilde else f"ssh -F {files.main} {entry.host}",
        "user": user,
        "identity": found.source,
        "keys_added": len(added),
        "config": str(files.config),
        "known_hosts": str(files.known_hosts),
    }
    settings.show(result, lambda: f"{result['command']} now works, as {user}, with the key of {found.source}", [entry.host])
    if not files.tilde:
        output.note(f"ssh reads the configuration of {pwd.getpwuid(os.getuid()).pw_dir}: use ssh -F {files.main}")


def _files() -> SshConfig:
    """~/.ssh. ssh itself takes the home directory from the user database, whatever $HOME says."""
    home = Path(os.environ.get("HOME") or pwd.getpwuid(os.getuid()).pw_dir)
    if not home.is_absolute():
        raise Failure(api.ErrorKind.CONFIG, f"cannot use the home directory {str(home)!r}: it is not an absolute path")
    try:
        same = home.samefile(pwd.getpwuid(os.getuid()).pw_dir)
    except (OSError, KeyError):
        same = False
    return SshConfig(home, tilde=same)


def _profile(control: Control) -> str:
    """The profile that this invocation was answered with: ssh shall use the same, from whatever environment it is started."""
    fields = api.caller_fields(control.profile)
    if api.FIELD_PROFILE in fields:
        return fields[api.FIELD_PROFILE]
    if api.FIELD_API_KEY in fields:
        return api.PROFILE_ENV
    return str(output.field(control.request("GET", "/status"), "profile") or "")


def _checked(answer: Any) -> tuple[str, list[str], list[str]]:
    """User, host keys and added keys of the daemon's answer.

    They come from the sandbox, and a newline in one would be a line of configuration.
    """
    try:
        user = sshkeys.parse_user(output.field(answer, "user"))
        host_keys = [" ".join(sshkeys.parse_key(str(key)).split()[:2]) for key in output.field(answer, "host_keys") or []]
        added = [sshkeys.parse_key(str(key)) for key in output.field(answer, "added") or []]
    except ValueError as exc:
        raise Failure(api.ErrorKind.FAILED, f"cannot use what the sandbox says about its sshd: {exc}") from None
    if not 1 <= len(host_keys) <= HOST_KEYS_MAX:
        raise Failure(
            api.ErrorKind.FAILED, f"cannot use what the sandbox says about its sshd: it names {len(host_keys)} host keys"
        )
    return user, host_keys, added


def _remove(settings: Settings, files: SshConfig, name: str) -> None:
    keys = files.authorized(name)
    inside = 0
    if keys:  # first: these lines are known from the block that is about to go
        try:
            control = Control(settings.profile or files.profile(name))
            control.sandbox("DELETE", name, "/ssh-setup", body={"public_keys": keys})
            inside = len(keys)
        except Failure as exc:
            if exc.kind != api.ErrorKind.NOT_FOUND:  # with the sandbox its keys are gone
                output.note(f"the key stays in the sandbox: {exc.message}")
    removed = files.remove(name)
    result = {"host": f"sandbox-{name}", "removed": removed, "keys_removed": inside}
    text = f"sandbox-{name} is no longer set up" if removed else f"sandbox-{name} was not set up"
    settings.show(result, lambda: text, [result["host"]])

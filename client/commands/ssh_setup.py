"""ssh-setup."""

from __future__ import annotations

import os
import pwd
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from client import output, sshkeys, sshtext
from client.cli import Command, Settings, pass_settings
from client.control import Control
from client.params import Name
from client.proxy import Failure, is_name
from client.sshblocks import ANY, LISTED_MAX, Entry, Gateway, gateway_options
from client.sshconfig import Change, SshConfig
from client.sshhome import helper_words, profile_of, ssh_files
from gatewayd import api

HOST_KEYS_MAX = 16


@click.command(
    "ssh-setup",
    cls=Command,
    examples=("sandbox ssh-setup", "ssh sandbox-demo", "sandbox ssh-setup --dry-run", "sandbox ssh-setup --remove"),
)
@click.argument("name", type=Name(), required=False)
@click.option("--direct", is_flag=True, help="Reach the sshd inside NAME instead of the gateway, with your key end to end.")
@click.option(
    "--identity",
    type=click.Path(path_type=Path),
    metavar="PUB",
    help="With --direct: public key to install; default: id_ed25519.pub, id_ecdsa.pub or id_rsa.pub of ~/.ssh, else the agent's.",
)
@click.option(
    "--inline/--no-inline",
    default=None,
    help="Write into ~/.ssh/config itself, for programs that know no Include; default: as it is there, else an Include line.",
)
@click.option("--remove", is_flag=True, help="Undo it, for NAME or altogether.")
@click.option("--print", "print_only", is_flag=True, help="Show what the files would hold, and write none of them.")
@click.option("--dry-run", is_flag=True, help="Show what would change in the files, as a diff, and change nothing.")
@pass_settings
def ssh_setup_command(
    settings: Settings,
    name: str | None,
    direct: bool,
    identity: Path | None,
    inline: bool | None,
    remove: bool,
    print_only: bool,
    dry_run: bool,
) -> None:
    """Make `ssh sandbox-NAME` work for every sandbox, and with it scp, sftp, rsync, git and every editor that speaks ssh.

    Once is enough. The gateway is the ssh server: no sandbox needs an sshd, and no key is needed. A block for all sandboxes goes
    into ~/.ssh/gatewayd/config, the gateway's host key into ~/.ssh/gatewayd/known_hosts, and one Include line to the top of
    ~/.ssh/config. Nothing secret is written.
    """
    if remove and (direct or identity is not None or print_only or inline is not None):
        raise click.UsageError("--remove goes with --dry-run and with no other option")
    if direct and name is None:
        raise click.UsageError("--direct needs a NAME")
    if direct and dry_run:
        raise click.UsageError("--direct puts a key into the sandbox, which --dry-run must not: use --print")
    if print_only and dry_run:
        raise click.UsageError("--print and --dry-run exclude each other")
    files = ssh_files()
    if remove:
        _remove(settings, files, name, dry_run)
        return
    if identity is not None and not direct:
        output.note("--identity is not needed: the gateway asks for no key (it does with --direct)")
    if direct and name is not None:
        changes, result, text = _direct(settings, files, name, identity, inline, print_only)
    else:
        changes, result, text = _gateway(settings, files, name, inline, print_only or dry_run)
    if dry_run:
        _show_diff(changes)
        return
    if print_only:
        _show_files(files, changes)
        return
    settings.show(result, lambda: text, [result["host"]])
    if not files.tilde:
        output.note(f"ssh reads the configuration of {pwd.getpwuid(os.getuid()).pw_dir}: use ssh -F {files.main}")


Outcome = tuple[list[Change], dict[str, Any], str]  # what changed, the answer, the answer for people


def _gateway(settings: Settings, files: SshConfig, name: str | None, inline: bool | None, dry: bool) -> Outcome:
    """All sandboxes, through the gateway."""
    control = settings.control()
    if name is not None:
        control.sandbox("GET", name, "/status")  # tells of a misspelt name
    host_key = _host_key(control)
    profile, helper, names = profile_of(control), helper_words(), _names(control)

    def edit(old: Gateway | None) -> Gateway:
        # A single name leaves the profile of the others as it is.
        general = profile if name is None or old is None else old.profile
        options = gateway_options(general, helper, files.known_hosts)
        new = Gateway(options, general, frozenset()) if old is None else replace(old.moved(general, helper), options=options)
        if names is not None:
            new = new.with_names(profile, names, helper)
        if name is None:
            return replace(new, asked=None)
        asked = None if new.asked is None else new.asked | {name}
        return replace(new, asked=asked).with_name(profile, name, helper)

    keys = 0
    if name is not None and not dry and files.has(name):
        files.set_gateway(edit, host_key, name=name, inline=inline, dry=True)  # fails before a key is withdrawn
        keys = _withdraw(settings, files, name)
    changes = files.set_gateway(edit, host_key, name=name, inline=inline, dry=dry)
    host = ANY if name is None else f"{api.SSH_PREFIX}{name}"
    command = f"{_ssh(files)} {api.SSH_PREFIX}{name or 'NAME'}"
    result = {
        "host": host,
        "command": command,
        "user": api.SSH_USER,
        "changed": bool(changes),
        "keys_removed": keys,
        "config": str(files.config),
        "known_hosts": str(files.known_hosts),
    }
    return changes, result, f"{command} now works" + (", for every sandbox" if name is None else "")


def _direct(
    settings: Settings, files: SshConfig, name: str, identity: Path | None, inline: bool | None, print_only: bool
) -> Outcome:
    """One sandbox, through its own sshd."""
    control = settings.control()
    found = sshkeys.find_identity(identity, files.ssh)
    with output.progress(f"setting up ssh in {name}"):
        answer = control.sandbox("POST", name, "/ssh-setup", body={"public_keys": list(found.keys)})
        profile = profile_of(control)
    user, host_keys, added = _checked(answer)
    words = [*helper_words(), "--direct", *(["--profile", profile] if profile else []), f"{api.SSH_PREFIX}{name}"]
    kept = [key for key in files.authorized(name) if key not in added]
    entry = Entry(name, user, host_keys, words, found.file, [*kept, *added], profile)
    changes = files.add(entry, inline=inline, dry=print_only)
    result = {
        "host": entry.host,
        "command": f"{_ssh(files)} {entry.host}",
        "user": user,
        "identity": found.source,
        "keys_added": len(added),
        "config": str(files.config),
        "known_hosts": str(files.known_hosts),
    }
    return changes, result, f"{result['command']} now works, as {user}, with the key of {found.source}"


def _ssh(files: SshConfig) -> str:
    return "ssh" if files.tilde else f"ssh -F {files.main}"


def _host_key(control: Control) -> str:
    try:
        return " ".join(sshkeys.parse_key(str(output.field(control.request("GET", "/ssh"), "host_key"))).split()[:2])
    except ValueError as exc:
        raise Failure(api.ErrorKind.INTERNAL, f"cannot use the host key that the daemon names: {exc}") from None


def _names(control: Control) -> list[str] | None:
    """The sandboxes there are; None when that cannot be said now: ssh works without a list."""
    try:
        boxes = output.field(control.request("GET", "/sandboxes", query={"limit": LISTED_MAX}), "sandboxes") or []
    except Failure as exc:
        output.note(f"the sandboxes are not listed for ssh: {exc.message}")
        return None
    return [name for box in boxes if isinstance(name := output.field(box, "name"), str) and is_name(name)]


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


def _remove(settings: Settings, files: SshConfig, name: str | None, dry: bool) -> None:
    def change(*, dry: bool) -> list[Change]:
        return files.remove_all(dry=dry) if name is None else files.remove(name, dry=dry)

    changes = change(dry=True)  # fails before a key is withdrawn
    if dry:
        _show_diff(changes)
        return
    # Before the blocks go: what to withdraw is known from them.
    inside = sum(_withdraw(settings, files, one) for one in files.direct() if name in (None, one))
    removed = bool(change(dry=False))
    host = ANY if name is None else f"{api.SSH_PREFIX}{name}"
    text = f"{host} is no longer set up" if removed else f"{host} was not set up"
    settings.show({"host": host, "removed": removed, "keys_removed": inside}, lambda: text, [host])
    if name is not None and (gateway := files.gateway()) is not None and gateway.asked is None:
        output.note(f"ssh still reaches {host} as one of all sandboxes; `sandbox ssh-setup --remove` ends that, too")


def _withdraw(settings: Settings, files: SshConfig, name: str) -> int:
    """Take the keys that were added inside out again; how many. They were, and shall be again, the sandbox's own affair."""
    keys = files.authorized(name)
    if not keys:
        return 0
    try:
        control = Control(settings.profile or files.profile(name))
        control.sandbox("DELETE", name, "/ssh-setup", body={"public_keys": keys})
    except Failure as exc:
        if exc.kind != api.ErrorKind.NOT_FOUND:  # with the sandbox its keys are gone
            output.note(f"the key stays in the sandbox: {exc.message}")
        return 0
    return len(keys)


def _show_diff(changes: Sequence[Change]) -> None:
    output.write("".join(sshtext.diff(change.path, change.before, change.after) for change in changes))


def _show_files(files: SshConfig, changes: Sequence[Change]) -> None:
    """Our two files as they would be, and what is added to ~/.ssh/config."""
    text = ""
    for path in (files.config, files.known_hosts):
        new = [change.after for change in changes if change.path == Path(os.path.realpath(path))]
        content = new[0] if new else path.read_bytes() if path.exists() else None
        text += f"# {path}\n{(content or b'').decode()}\n"
    for change in changes:
        if change.path == Path(os.path.realpath(files.main)):
            text += f"# {files.main}, at its top\n{(change.after or b'').removesuffix(change.before or b'').decode()}"
    output.write(text)

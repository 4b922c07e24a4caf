"""snapshot build, capture, list, get, wait, delete."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import click

from client import output, unixhttp
from client.cli import Command, Family, Settings, pass_settings, report
from client.control import Control
from client.output import field
from client.params import Name, Pair, Size, Timeout
from client.proxy import Failure
from gatewayd import api

PASSWORD_VARIABLE = "GATEWAYD_REGISTRY_PASSWORD"  # noqa: S105 - its name
PASSWORD_MAX = 65536  # bytes read from standard input
POLL_FIRST, POLL_MAX = 0.1, 1.0  # seconds between looks: short at first, then longer
MAX_CERTIFICATES = 1 << 20  # bytes of a file of certificates


@click.group(
    "snapshot",
    cls=Family,
    examples=("sandbox snapshot build tools debian:12", "sandbox snapshot capture demo tools:v2", "sandbox snapshot list"),
)
def snapshot_command() -> None:
    """Snapshots: what sandboxes are made from. NAME is a name, name:tag, or an id; a name alone means name:latest."""


@snapshot_command.command(
    "build",
    cls=Command,
    examples=(
        "sandbox snapshot build tools debian:12 --capacity 4gb",
        "sandbox snapshot build app:v2 registry.example.com/team/app:2.0 --registry-username robot --registry-password-stdin",
        "sandbox snapshot build app docker-archive:/home/me/app.tar",
    ),
)
@click.argument("name", metavar="NAME[:TAG]")
@click.argument("image")
@click.option("--capacity", type=Size(), default="8gb", show_default=True, help="Disk of its sandboxes, and most that it holds.")
@click.option("--label", type=Pair(), multiple=True, help="Label; repeatable.")
@click.option("--registry", metavar="NAME|ID", help="A registry that the service knows.")
@click.option("--registry-url", metavar="URL", help="A registry for this build alone; http:// means without TLS.")
@click.option("--registry-username", metavar="USER", help="Whom to log in as.")
@click.option("--registry-password", metavar="PASSWORD", help="Everybody on this machine can read it: prefer the next.")
@click.option("--registry-password-stdin", is_flag=True, help=f"Read it from standard input. Also: ${PASSWORD_VARIABLE}.")
@click.option("--registry-ca", type=click.Path(exists=True, dir_okay=False), help="Certificates (PEM) to trust it by.")
@click.option("--wait/--no-wait", default=True, show_default=True, help="Wait until it is ready.")
@click.option("--timeout", type=Timeout(), default="1h", show_default=True, help="How long to wait.")
@pass_settings
def build_command(
    settings: Settings,
    name: str,
    image: str,
    capacity: int,
    label: tuple[tuple[str, str], ...],
    registry: str | None,
    registry_url: str | None,
    registry_username: str | None,
    registry_password: str | None,
    registry_password_stdin: bool,
    registry_ca: str | None,
    wait: bool,
    timeout: float,
) -> None:
    """Build a snapshot from a container image.

    IMAGE is one in a registry, or on this machine docker-archive:PATH, oci-archive:PATH or docker-daemon:NAME.
    """
    control = settings.control()
    body = {**_named(name), "docker_image": image, "fs_capacity_bytes": capacity, "labels": dict(label) or None}
    password = _password(registry_password, registry_password_stdin, wanted=registry_username is not None)
    account = {"username": registry_username, "password": password, "ca_cert": _certificates(registry_ca)}
    if registry_url is None and any(account.values()):
        registry_url = _host_of(image)
    if registry is not None and registry_url is not None:
        raise Failure(api.ErrorKind.USAGE, "--registry and the options for one build exclude each other")
    with _registry(control, registry_url, account, keep=not wait) as made:
        body["registry_id"] = registry or made
        snapshot = control.request("POST", "/snapshots", {key: value for key, value in body.items() if value is not None})
        _settle(settings, control, snapshot, wait, timeout)


@snapshot_command.command("capture", cls=Command, examples=("sandbox snapshot capture demo tools:v2",))
@click.argument("sandbox", type=Name())
@click.argument("name", metavar="NAME[:TAG]")
@click.option("--label", type=Pair(), multiple=True, help="Label; repeatable.")
@click.option("--wait/--no-wait", default=True, show_default=True, help="Wait until it is ready.")
@click.option("--timeout", type=Timeout(), default="10m", show_default=True, help="How long to wait.")
@pass_settings
def capture_command(
    settings: Settings, sandbox: str, name: str, label: tuple[tuple[str, str], ...], wait: bool, timeout: float
) -> None:
    """Make a snapshot of a sandbox's files, as they are at one moment. Nothing below /tmp, and no processes."""
    control = settings.control()
    body = {**_named(name), **({"labels": dict(label)} if label else {})}
    snapshot = control.sandbox("POST", sandbox, "/snapshot", body=body)
    _settle(settings, control, snapshot, wait, timeout)


@snapshot_command.command("list", cls=Command, examples=("sandbox snapshot list --format pretty",))
@click.option("--name-contains", metavar="TEXT", help="Only those whose name contains this.")
@click.option("--status", type=click.Choice(["building", "ready", "failed", "deleting"]), help="Only those in this state.")
@click.option("--limit", type=click.IntRange(1, 500), default=100, show_default=True, help="At most so many.")
@pass_settings
def list_command(settings: Settings, name_contains: str | None, status: str | None, limit: int) -> None:
    """List snapshots, the newest first."""
    query = {"name_contains": name_contains, "status": status, "limit": limit}
    found = field(settings.control().request("GET", "/snapshots", query=query), "snapshots") or []
    settings.show(found, lambda: _table(found), [field(one, "id") for one in found])


@snapshot_command.command("get", cls=Command, examples=("sandbox snapshot get tools:v2 --format pretty",))
@click.argument("name")
@pass_settings
def get_command(settings: Settings, name: str) -> None:
    """Show everything about one snapshot."""
    snapshot = _get(settings.control(), name)
    settings.show(snapshot, lambda: _facts(snapshot), [field(snapshot, "id")])


@snapshot_command.command("wait", cls=Command, examples=("sandbox snapshot wait tools:v2",))
@click.argument("name")
@click.option("--timeout", type=Timeout(), default="1h", show_default=True, help="How long to wait.")
@pass_settings
def wait_command(settings: Settings, name: str, timeout: float) -> None:
    """Wait until a snapshot is ready. One that is being made is known by its id."""
    control = settings.control()
    _settle(settings, control, _get(control, name), True, timeout)


@snapshot_command.command("delete", cls=Command, examples=("sandbox snapshot delete tools:v1 --yes",))
@click.argument("names", nargs=-1, required=True, metavar="NAME…")
@click.option("--yes", "-y", is_flag=True, help="Do not ask.")
@pass_settings
def delete_command(settings: Settings, names: tuple[str, ...], yes: bool) -> int:
    """Delete snapshots that no sandbox is made from; one that is being made is given up. On a terminal it asks first."""
    names = tuple(dict.fromkeys(names))
    if not yes and output.is_terminal(sys.stdin) and output.is_terminal(sys.stderr):
        what = names[0] if len(names) == 1 else f"{len(names)} snapshots ({', '.join(names)})"
        if not output.confirm(f"Delete {what}?"):
            raise Failure(api.ErrorKind.FAILED, "nothing was deleted")
    control = settings.control()
    deleted, code = [], 0
    for name in names:
        try:
            control.request("DELETE", f"/snapshots/{unixhttp.quote(name)}")
            deleted.append(name)
        except Failure as exc:
            report(exc)
            code = code or api.EXIT_CODES.get(exc.kind, api.EXIT_CODES[api.ErrorKind.INTERNAL])
    if deleted or not code:
        settings.show({"deleted": deleted}, lambda: "".join(f"deleted {name}\n" for name in deleted), deleted)
    return code


def _named(text: str) -> dict[str, str]:
    name, colon, tag = text.partition(":")
    return {"name": name, "tag": tag} if colon else {"name": name}


def _get(control: Control, reference: str) -> Any:
    return control.request("GET", f"/snapshots/{unixhttp.quote(reference)}")


def _settle(settings: Settings, control: Control, snapshot: Any, wait: bool, timeout: float) -> None:
    """Show a snapshot, once it is ready if that is to be waited for. Raises Failure when it never will be."""
    identity = str(field(snapshot, "id") or "")
    end, pause = time.monotonic() + timeout, POLL_FIRST
    with output.progress(f"making snapshot {field(snapshot, 'name')}"):
        while wait and field(snapshot, "status") == "building":
            output.step(f"{field(snapshot, 'name')}: {_progress(snapshot)}")
            left = end - time.monotonic()
            if left <= 0:
                hint = f"it goes on: `sandbox snapshot wait {identity}`"
                raise Failure(api.ErrorKind.TIMEOUT, f"the snapshot is not ready after {timeout:g} s", hint)
            time.sleep(min(pause, left))
            pause = min(2 * pause, POLL_MAX)
            snapshot = _get(control, identity)
    if field(snapshot, "status") == "failed":
        why = field(snapshot, "status_message") or "the service does not say why"
        raise Failure(api.ErrorKind.FAILED, f"the snapshot could not be made: {why}")
    settings.show(snapshot, lambda: _facts(snapshot), [identity])


def _progress(snapshot: Any) -> str:
    """How far it is, in words."""
    found = field(snapshot, "progress")
    phase, have, whole = field(found, "phase"), field(found, "bytes"), field(found, "total_bytes")
    if phase == "pulling":
        return f"pulling {output.size(have)}" + (f" of {output.size(whole)}" if whole else "")
    if phase == "unpacking":
        return f"unpacking layer {field(found, 'layers')} of {field(found, 'total_layers')}"
    return str(phase or "building")


@contextmanager
def _registry(control: Control, url: str | None, account: dict[str, str | None], *, keep: bool) -> Iterator[str | None]:
    """A registry that the service knows for the length of a block: its id, or None when none is needed."""
    if url is None:
        yield None
        return
    name = f"sandbox-cli-{os.urandom(6).hex()}"
    given = {key: value for key, value in account.items() if value is not None}
    made = control.request("POST", "/registries", {"name": name, "url": url, **given})
    try:
        yield str(field(made, "id") or name)
    except BaseException:
        keep = False
        raise
    finally:
        if keep:
            output.note(f"registry {name} stays at the service: the build needs it")
        else:
            with suppress(Failure):
                control.request("DELETE", f"/registries/{name}")


def _password(given: str | None, from_stdin: bool, *, wanted: bool) -> str | None:
    """The registry's password, from wherever it was said to be."""
    if given is not None and from_stdin:
        raise Failure(api.ErrorKind.USAGE, "--registry-password and --registry-password-stdin exclude each other")
    if from_stdin:
        text = sys.stdin.read(PASSWORD_MAX).rstrip("\r\n") if sys.stdin is not None else ""
        if not text:
            raise Failure(api.ErrorKind.USAGE, "there is no password on standard input")
        return text
    return given or (os.environ.get(PASSWORD_VARIABLE) or None if wanted else None)


def _certificates(path: str | None) -> str | None:
    if path is None:
        return None
    try:
        with open(path, encoding="ascii") as file:  # noqa: PTH123 - pathlib is not worth its import here
            return file.read(MAX_CERTIFICATES)
    except (OSError, UnicodeDecodeError) as exc:
        raise Failure(api.ErrorKind.CONFIG, f"cannot read the certificates in {path}: {exc}") from exc


def _host_of(image: str) -> str:
    """The registry that an image's name names; Docker's when it names none."""
    first, slash, _ = image.removeprefix("docker://").partition("/")
    return first if slash and ("." in first or ":" in first or first == "localhost") else "docker.io"


def _table(snapshots: Any) -> str:
    if not snapshots:
        return "there are no snapshots\n"
    rows = [
        [
            field(one, "name"),
            ", ".join(str(tag) for tag in field(one, "tags") or []),
            field(one, "status"),
            output.size(field(one, "fs_used_bytes")),
            output.age(field(one, "created_at")),
            field(one, "docker_image") or ("a sandbox" if field(one, "source_sandbox_id") else ""),
            field(one, "id"),
        ]
        for one in snapshots
    ]
    return output.table(["NAME", "TAGS", "STATUS", "SIZE", "AGE", "FROM", "ID"], rows)


def _facts(snapshot: Any) -> str:
    config = field(snapshot, "run_config")
    return output.facts(
        [
            ("name", field(snapshot, "name")),
            ("tags", ", ".join(str(tag) for tag in field(snapshot, "tags") or [])),
            ("id", field(snapshot, "id")),
            ("status", field(snapshot, "status")),
            ("message", field(snapshot, "status_message")),
            ("image", field(snapshot, "docker_image")),
            ("digest", field(snapshot, "image_digest")),
            ("captured from", field(snapshot, "source_sandbox_id")),
            ("size", output.size(field(snapshot, "fs_used_bytes"))),
            ("disk", output.size(field(snapshot, "fs_capacity_bytes")) if field(snapshot, "fs_capacity_bytes") else ""),
            ("user", field(config, "user")),
            ("work dir", field(config, "work_dir")),
            ("environment", ", ".join(field(config, "env_vars") or [])),
            ("labels", output.labels(field(snapshot, "labels"))),
            ("created", field(snapshot, "created_at")),
        ]
    )

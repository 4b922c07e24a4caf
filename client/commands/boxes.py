"""create, list, get, update."""

from __future__ import annotations

import re
from typing import Any

import click

from client import output, render
from client.cli import Command, Settings, pass_settings
from client.control import WAIT_GRACE
from client.hosts import relist
from client.params import Duration, Json, Name, Pair, Size, Timeout

_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.IGNORECASE)


def _put(body: dict[str, Any], **values: Any) -> None:
    """Add the values that were given."""
    body.update({key: value for key, value in values.items() if value is not None})


@click.command(
    "create",
    cls=Command,
    examples=(
        "sandbox create demo",
        "sandbox create demo --vcpus 2 --memory 1.5gb --rootfs-capacity 8gb",
        "sandbox create build --env STAGE=ci --label team=infra --idle-ttl 1h",
    ),
)
@click.argument("name", type=Name(), required=False)
@click.option("--snapshot", metavar="NAME|ID", help="Boot from this snapshot: a name, name:tag, or an id.")
@click.option("--vcpus", type=click.IntRange(min=1), help="Number of virtual CPUs.")
@click.option("--memory", type=Size(), help="Memory, such as 512mb or 1.5gb.")
@click.option("--rootfs-capacity", type=Size(), help="Size of the root file system, such as 8gb.")
@click.option("--idle-ttl", type=Duration(60), help="Stop after this time without use; 0 = never.")
@click.option("--delete-after-stop", type=Duration(60), help="Delete this long after a stop; 0 = never.")
@click.option("--env", type=Pair(), multiple=True, help="Environment of every command; repeatable.")
@click.option("--label", type=Pair(), multiple=True, help="Label; repeatable.")
@click.option("--proxy-config", type=Json(), help="Rules for outgoing traffic.")
@click.option("--wait/--no-wait", default=True, show_default=True, help="Wait until it is ready.")
@click.option("--timeout", type=Timeout(), default="120", show_default=True, help="How long to wait.")
@pass_settings
def create_command(
    settings: Settings,
    name: str | None,
    snapshot: str | None,
    vcpus: int | None,
    memory: int | None,
    rootfs_capacity: int | None,
    idle_ttl: int | None,
    delete_after_stop: int | None,
    env: tuple[tuple[str, str], ...],
    label: tuple[tuple[str, str], ...],
    proxy_config: dict[str, Any] | None,
    wait: bool,
    timeout: float,
) -> None:
    """Create a sandbox; without NAME the service chooses one."""
    body: dict[str, Any] = {"wait": wait, "timeout": timeout}
    if snapshot is not None:
        body["snapshot_id" if _UUID.fullmatch(snapshot) else "snapshot"] = snapshot
    _put(
        body,
        name=name,
        vcpus=vcpus,
        mem_bytes=memory,
        fs_capacity_bytes=rootfs_capacity,
        idle_ttl_seconds=idle_ttl,
        delete_after_stop_seconds=delete_after_stop,
        env_vars=dict(env) or None,
        labels=dict(label) or None,
        proxy_config=proxy_config,
    )
    control = settings.control()
    with output.progress(f"creating {name or 'a sandbox'}"):
        box = control.request("POST", "/sandboxes", body, timeout=timeout + WAIT_GRACE)
    render.warn(box)
    relist(control, added=render.names([box]))
    settings.show(box, lambda: render.sandbox_facts(box), render.names([box]))


@click.command("list", cls=Command, examples=("sandbox list --format pretty", "sandbox list --status ready --label team=infra"))
@click.option("--name-contains", metavar="TEXT", help="Only names with this text in them.")
@click.option(
    "--status", type=click.Choice(["provisioning", "ready", "stopped", "failed", "deleting"]), help="Only those with this status."
)
@click.option("--label", type=Pair(), help="Only those with this label.")
@click.option("--sort-by", metavar="FIELD", help="Such as name, created_at or status.")
@click.option("--sort-direction", type=click.Choice(["asc", "desc"]), help="Ascending or descending.")
@click.option("--limit", type=click.IntRange(1, 100_000), help="At most this many (default 1000).")
@click.option("--offset", type=click.IntRange(min=0), help="Leave out this many first.")
@pass_settings
def list_command(
    settings: Settings,
    name_contains: str | None,
    status: str | None,
    label: tuple[str, str] | None,
    sort_by: str | None,
    sort_direction: str | None,
    limit: int | None,
    offset: int | None,
) -> None:
    """List sandboxes."""
    query = {
        "name_contains": name_contains,
        "status": status,
        "label": "=".join(label) if label else None,
        "sort_by": sort_by,
        "sort_direction": sort_direction,
        "limit": limit,
        "offset": offset,
    }
    answer = settings.control().request("GET", "/sandboxes", query=query)
    boxes = output.field(answer, "sandboxes") or []
    settings.show(answer, lambda: render.sandbox_table(boxes), render.names(boxes))


@click.command("get", cls=Command, examples=("sandbox get demo --format pretty",))
@click.argument("name", type=Name())
@pass_settings
def get_command(settings: Settings, name: str) -> None:
    """Show everything about one sandbox."""
    box = settings.control().sandbox("GET", name)
    settings.show(box, lambda: render.sandbox_facts(box), render.names([box]))


@click.command(
    "update", cls=Command, examples=("sandbox update demo --name demo-2", "sandbox update demo --memory 2gb --idle-ttl 30m")
)
@click.argument("name", type=Name())
@click.option("--name", "new_name", type=Name(), help="Rename it.")
@click.option("--vcpus", type=click.IntRange(min=1), help="Number of virtual CPUs, from the next start on.")
@click.option("--memory", type=Size(), help="Memory, from the next start on.")
@click.option("--rootfs-capacity", type=Size(), help="Size of the root file system, from the next start on.")
@click.option("--idle-ttl", type=Duration(60), help="Stop after this time without use; 0 = never.")
@click.option("--delete-after-stop", type=Duration(60), help="Delete this long after a stop; 0 = never.")
@click.option("--proxy-config", type=Json(), help="Rules for outgoing traffic; they apply at once.")
@pass_settings
@click.pass_context
def update_command(
    ctx: click.Context,
    settings: Settings,
    name: str,
    new_name: str | None,
    vcpus: int | None,
    memory: int | None,
    rootfs_capacity: int | None,
    idle_ttl: int | None,
    delete_after_stop: int | None,
    proxy_config: dict[str, Any] | None,
) -> None:
    """Change a sandbox."""
    body: dict[str, Any] = {}
    _put(
        body,
        name=new_name,
        vcpus=vcpus,
        mem_bytes=memory,
        fs_capacity_bytes=rootfs_capacity,
        idle_ttl_seconds=idle_ttl,
        delete_after_stop_seconds=delete_after_stop,
        proxy_config=proxy_config,
    )
    if not body:
        raise click.UsageError("nothing to change was given", ctx)
    control = settings.control()
    box = control.sandbox("PATCH", name, body=body)
    render.warn(box)
    if new_name is not None:
        relist(control, added=render.names([box]), gone=[name])
    settings.show(box, lambda: render.sandbox_facts(box), render.names([box]))

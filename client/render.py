"""Sandboxes and the daemon's status as text for people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from client import output
from client.output import field


def names(boxes: Sequence[Any]) -> list[str]:
    """What other commands take as NAME."""
    return [str(field(box, "name") or "") for box in boxes]


def warn(box: Any) -> None:
    """Say on standard error what the service wants to be known about a sandbox: a limit that it cannot enforce, say."""
    if text := field(box, "status_message"):
        output.note(f"{field(box, 'name')}: {text}")


def sandbox_table(boxes: Sequence[Any]) -> str:
    """One line per sandbox."""
    if not boxes:
        return "there are no sandboxes; `sandbox create` makes one\n"
    rows = [
        [
            field(box, "name"),
            field(box, "status"),
            field(box, "vcpus"),
            output.size(field(box, "mem_bytes")),
            output.size(field(box, "fs_capacity_bytes")),
            output.age(field(box, "created_at")),
            output.labels(field(box, "labels")),
        ]
        for box in boxes
    ]
    return output.table(["NAME", "STATUS", "VCPUS", "MEMORY", "DISK", "AGE", "LABELS"], rows)


def sandbox_facts(box: Any) -> str:
    """Everything about one sandbox."""
    return output.facts(
        [
            ("name", field(box, "name")),
            ("id", field(box, "id")),
            ("status", field(box, "status")),
            ("message", field(box, "status_message")),
            ("vcpus", field(box, "vcpus")),
            ("memory", output.size(field(box, "mem_bytes"))),
            ("disk", output.size(field(box, "fs_capacity_bytes"))),
            ("snapshot", field(box, "snapshot_id")),
            ("idle ttl", _ttl(field(box, "idle_ttl_seconds"))),
            ("delete after", _ttl(field(box, "delete_after_stop_seconds"))),
            ("labels", output.labels(field(box, "labels"))),
            ("created", field(box, "created_at")),
            ("updated", field(box, "updated_at")),
            ("stopped", field(box, "stopped_at")),
            ("url", field(box, "dataplane_url")),
        ]
    )


def sandbox_status(name: str, status: Any) -> str:
    """How a sandbox is, and how it is reached."""
    link = field(status, "link")
    return output.facts(
        [
            ("name", name),
            ("status", field(status, "status")),
            ("message", field(status, "status_message")),
            ("ssh", field(status, "ssh")),
            ("link", field(link, "state")),
            ("round trip", _milliseconds(field(link, "rtt_ms"))),
            ("link error", field(link, "last_error")),
        ]
    )


def _ttl(seconds: Any) -> str:
    return "never" if seconds == 0 else output.duration(seconds)


def daemon_status(status: Any) -> str:
    """The daemon, its links and its forwards."""
    local = field(status, "local")
    text = output.facts(
        [
            ("daemon", "up"),
            ("version", field(status, "version")),
            ("pid", field(status, "pid")),
            ("up for", output.duration(field(status, "uptime_seconds"))),
            ("profile", field(status, "profile")),
            ("endpoint", field(status, "endpoint")),
            ("local service", field(local, "state")),
            ("sockets", field(status, "runtime_dir")),
            ("log", field(status, "log_file")),
        ]
    )
    if links := field(status, "links"):
        rows = [
            [
                field(link, "sandbox"),
                field(link, "profile"),
                field(link, "state"),
                field(link, "streams"),
                _milliseconds(field(link, "rtt_ms")),
                output.size(field(link, "bytes_in")),
                output.size(field(link, "bytes_out")),
                field(link, "last_error"),
            ]
            for link in links
        ]
        text += "\n" + output.table(["LINK", "PROFILE", "STATE", "STREAMS", "RTT", "IN", "OUT", "LAST ERROR"], rows)
    if forwards := field(status, "forwards"):
        rows = [
            [
                f"{field(forward, 'address')}:{field(forward, 'port')}",
                f"{field(forward, 'sandbox')}:{field(forward, 'remote_port')}",
                field(forward, "connections"),
            ]
            for forward in forwards
        ]
        text += "\n" + output.table(["FORWARD", "TO", "CONNECTIONS"], rows)
    return text


def _milliseconds(value: Any) -> str:
    return f"{value:.1f} ms" if isinstance(value, int | float) else ""

"""From a request's fields to a process in a sandbox."""

from __future__ import annotations

import errno
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from gatewayd.local.agentforward import VARIABLE, AgentForward
from gatewayd.local.commands import CommandOptions
from gatewayd.local.egress.trust import environment
from gatewayd.local.models import CommandBody, SessionBody
from gatewayd.local.runtime.base import DEFAULT_SHELL, Box, Process, SpawnSpec
from gatewayd.local.store import Record

FALLBACK_SHELL = "/bin/sh"  # for images without bash
DEFAULT_TERM = "xterm-256color"


def spawn_spec(record: Record, body: CommandBody, shell: str, *, pty: bool) -> SpawnSpec:
    """The process for a command, or for a login shell when there is none.

    Layers, each over the one before: the variables of the sandbox's proxy rules, its run_config, its env_vars, the command's
    run_config or env and cwd.
    """
    base = record.run_config or {}
    own: Mapping[str, Any] = body.run_config.model_dump(exclude_none=True) if body.run_config else {}
    env = {**environment(record.proxy_config), **base.get("env_vars", {}), **record.env_vars}
    env |= {**own.get("env_vars", {}), **(body.env or {})}
    if pty:
        env.setdefault("TERM", DEFAULT_TERM)
    return SpawnSpec(
        argv=[shell, "-c", body.command] if body.command else [shell, "-l"],
        env=env,
        cwd=body.cwd or own.get("work_dir") or base.get("work_dir"),
        user=own.get("user") or base.get("user"),
        pty=pty,
    )


async def spawn(box: Box, record: Record, body: CommandBody, *, pty: bool = False, agent: AgentForward | None = None) -> Process:
    """Start a command, after opening `agent` for it. Raises OSError or RuntimeFailure, as `Box.spawn`."""
    spec = spawn_spec(record, body, body.shell or DEFAULT_SHELL, pty=pty)
    if agent is None:
        return await _spawn(box, spec, fixed=_fixed(body.shell))
    path = await agent.open(box, spec.user)
    try:
        return await _spawn(box, replace(spec, env={**spec.env, VARIABLE: path}), fixed=_fixed(body.shell))
    except BaseException:
        agent.close()
        raise


def _fixed(shell: str | None) -> bool:
    """Whether no other shell will do. LangSmith's clients always name bash, in images without it, too."""
    return shell not in (None, "", DEFAULT_SHELL)


async def _spawn(box: Box, spec: SpawnSpec, *, fixed: bool) -> Process:
    """Start it, with another shell where there is none unless that is `fixed`."""
    try:
        return await box.spawn(spec)
    except OSError as exc:
        if fixed or exc.errno != errno.ENOENT:
            raise
    return await box.spawn(replace(spec, argv=[FALLBACK_SHELL, *spec.argv[1:]]))


def spawn_failure(exc: Exception) -> str:
    """Why a command could not be started, for its user."""
    if isinstance(exc, OSError):
        place = f": {exc.filename}" if isinstance(exc.filename, str) else ""
        return f"cannot run the command: {exc.strerror or exc}{place}"
    return f"cannot run the command: {exc}"


def options_of(body: SessionBody, *, kill_on_disconnect: bool = False) -> CommandOptions:
    """How long the command and its session live, out of the request's fields."""
    return CommandOptions(
        timeout=body.timeout_seconds or None,
        idle_timeout=body.idle_timeout_seconds if body.idle_timeout_seconds >= 0 else None,
        ttl=body.ttl_seconds if body.ttl_seconds >= 0 else None,
        kill_on_disconnect=kill_on_disconnect,
    )

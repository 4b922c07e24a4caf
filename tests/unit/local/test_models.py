"""What a body may hold, and where a refusal points."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from gatewayd.local.models import CreateBody, ExecuteBody, ExecuteMessage, PatchBody, ReconnectMessage


def refused_at(model: type[BaseModel], **body: Any) -> list[str]:
    with pytest.raises(ValidationError) as caught:
        model.model_validate(body)
    return [str(error["loc"][0]) if error["loc"] else "" for error in caught.value.errors()]


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"name": "a-b", "vcpus": 2, "mem_bytes": 1 << 30, "fs_capacity_bytes": 1 << 30},
        {"idle_ttl_seconds": 0, "delete_after_stop_seconds": 120},
        {"labels": {"a": "b"}, "env_vars": {"A": "b=c"}},
        {"run_config": {"user": "1000:1000", "work_dir": "/srv", "env_vars": {"X": ""}}},
        {"snapshot": "default:latest"},
        {"snapshot_name": "default"},
        {"proxy_config": {"rules": [], "no_proxy": []}, "mount_config": None, "restore_memory": False},
        {"wait_for_ready": True, "timeout": 1.5},
        {"some_future_field": 1},
    ],
)
def test_good_creates(body: dict[str, Any]) -> None:
    CreateBody.model_validate(body)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("name", "Not A Label"),
        ("name", 5),
        ("vcpus", 0),
        ("vcpus", "2"),
        ("vcpus", True),
        ("cpu_millicores", 1),
        ("mem_bytes", 1),
        ("mem_bytes", 1 << 60),
        ("idle_ttl_seconds", 61),
        ("idle_ttl_seconds", -60),
        ("delete_after_stop_seconds", 1),
        ("env_vars", {"A=B": "c"}),
        ("env_vars", {"": "c"}),
        ("env_vars", {"A": "b\0"}),
        ("env_vars", {"A": 1}),
        ("env_vars", {"A": "x" * 200000}),
        ("labels", {"a": "b" * 300}),
        ("labels", {str(i): "" for i in range(65)}),
        ("run_config", {"work_dir": "relative"}),
        ("run_config", {"uesr": "root"}),
        ("snapshot", "n" * 513),
        ("snapshot_id", "a\0b"),
        ("proxy_config", {"rules": [{"name": ""}]}),
        ("proxy_config", {"access_control": {"allow_list": ["a b"]}}),
        ("mount_config", {"mounts": [1]}),
        ("access_delegation", {"mode": "EXPLICIT"}),
        ("preserve_memory_on_stop", True),
        ("restore_memory", True),
        ("persistent", False),
        ("volumes", [{"volume": "v"}]),
        ("timeout", 0),
    ],
)
def test_bad_creates_name_the_field(field: str, value: Any) -> None:
    assert set(refused_at(CreateBody, **{field: value})) == {field}


def test_one_snapshot_reference_only() -> None:
    assert refused_at(CreateBody, snapshot="default", snapshot_id="6f1c1f6e-8a5d-5a5e-9a3e-0d9c1b7d2f10") == [""]


def test_patches() -> None:
    assert PatchBody.model_validate({"name": "b", "labels": {}}).labels == {}
    assert refused_at(PatchBody, name="B") == ["name"]
    assert refused_at(PatchBody, proxy_config={"rules": [1]}) == ["proxy_config"]


def test_commands() -> None:
    assert ExecuteBody.model_validate({"command": "true"}).timeout == 60
    assert refused_at(ExecuteBody, command="a\0b") == ["command"]
    assert refused_at(ExecuteBody, command="a", run_config={"user": "x"}, cwd="/") == [""]
    assert refused_at(ExecuteMessage, type="execute") == [""]
    assert ExecuteMessage.model_validate({"type": "execute", "pty": True}).command == ""
    assert ExecuteMessage.model_validate({"command": "a", "ssh_agent_forward": True}).ssh_agent_forward
    assert refused_at(ExecuteMessage, command="a", ssh_agent_forward=1) == ["ssh_agent_forward"]
    assert refused_at(ReconnectMessage, command_id="x", stdout_offset=-1) == ["stdout_offset"]

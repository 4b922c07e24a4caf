"""Create, get, list, change, stop, start, delete: with the SDK; and what the raw answers look like."""

from __future__ import annotations

import re
import uuid
from typing import TYPE_CHECKING, Any

import httpx2
import pytest
from langsmith.sandbox import (
    ResourceNameConflictError,
    ResourceNotFoundError,
    SandboxAuthenticationError,
    SandboxClientError,
    ValidationError,
)

if TYPE_CHECKING:
    from tests.sdk.conftest import Service

TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z")
FIELDS = """
    id name status status_message dataplane_url created_at updated_at created_by idle_ttl_seconds delete_after_stop_seconds
    stopped_at snapshot_id vcpus cpu_millicores mem_bytes fs_capacity_bytes size_class labels proxy_config mount_config
"""


def test_a_sandbox_from_create_to_delete(client: Any, name: str) -> None:
    made = client.create_sandbox(name=name, idle_ttl_seconds=0, labels={"a": "b"})
    assert (made.name, made.status, made.labels, made.idle_ttl_seconds) == (name, "ready", {"a": "b"}, 0)
    uuid.UUID(made.id)
    assert client.get_sandbox(name).id == made.id
    assert client.get_sandbox_status(name).status == "ready"
    assert name in [sandbox.name for sandbox in client.list_sandboxes()]
    made.stop()
    stopped = client.get_sandbox(name)
    assert (stopped.status, stopped.dataplane_url) == ("stopped", made.dataplane_url)
    assert TIME.fullmatch(stopped.stopped_at)
    made.stop()  # twice is as good as once
    made.start()
    assert client.get_sandbox(name).stopped_at is None
    made.delete()
    assert name not in [sandbox.name for sandbox in client.list_sandboxes()]
    with pytest.raises(ResourceNotFoundError):
        client.get_sandbox(name)
    with pytest.raises(ResourceNotFoundError):
        made.delete()
    with client.sandbox(name=name) as again:  # the name is free, the sandbox is another
        assert again.id != made.id


def test_files_stay_when_it_stops(client: Any, name: str) -> None:
    with client.sandbox(name=name) as made:
        made.write("kept.txt", "kept")
        made.run("mkdir -p /srv/deep && echo too > /srv/deep/file && echo gone > /tmp/file")
        made.stop()
        made.start()
        assert made.read("kept.txt") == b"kept"
        assert made.run("cat /srv/deep/file").stdout == "too\n"
        assert made.run("cat /tmp/file").exit_code == 1


def test_a_data_plane_request_wakes_it(client: Any, name: str) -> None:
    with client.sandbox(name=name) as made:
        made.write("file", "x")
        made.stop()
        assert made.run("echo awake").stdout == "awake\n"
        assert client.get_sandbox_status(name).status == "ready"
        made.stop()
        assert made.read("file") == b"x"
        made.stop()
        made.write("file", "y")
        assert client.get_sandbox(name).status == "ready"


def test_without_waiting(client: Any, name: str) -> None:
    made = client.create_sandbox(name=name, wait_for_ready=False)
    assert made.status == "provisioning"
    assert client.wait_for_sandbox(name, poll_interval=0.01).status == "ready"
    made.delete()


def test_renaming_changes_only_the_name(client: Any, name: str) -> None:
    with client.sandbox(name=name) as made:
        handle = made.run("read line; echo got $line", wait=False, close_input=False)
        renamed = client.update_sandbox(name, new_name=f"{name}-new", idle_ttl_seconds=120)
        assert (renamed.id, renamed.dataplane_url, renamed.status) == (made.id, made.dataplane_url, "ready")
        assert (renamed.name, renamed.idle_ttl_seconds) == (f"{name}-new", 120)
        handle.send_input("it\n")
        assert handle.result.stdout == "got it\n"
        assert made.run("echo still").stdout == "still\n"
        with pytest.raises(ResourceNotFoundError):
            client.get_sandbox(name)
        with client.sandbox(name=name), pytest.raises(ResourceNameConflictError):  # the old name is free, and then it is not
            client.update_sandbox(renamed.name, new_name=name)
        client.delete_sandbox(renamed.name)


def test_names_are_made_up(client: Any) -> None:
    with client.sandbox() as one, client.sandbox() as two:
        assert one.name != two.name
        assert one.run("hostname").stdout.strip() == one.name


def test_errors_as_the_sdk_sees_them(client: Any, service: Service, name: str) -> None:
    with pytest.raises(ResourceNotFoundError):
        client.get_sandbox("nobody")
    with pytest.raises(ValidationError) as caught:
        client.create_sandbox(name="Not A Name")
    assert caught.value.field == "name"
    with pytest.raises(ValidationError) as caught:
        client.create_sandbox(name=name, vcpus=0)
    assert caught.value.field == "vcpus"
    with pytest.raises(ValidationError) as caught:
        client.create_sandbox(name=name, snapshot="python:3.12")
    assert caught.value.field == "snapshot"
    with pytest.raises(ValidationError) as caught:
        client.create_sandbox(name=name, proxy_config={"access_control": {"allow_list": ["a"], "deny_list": ["b"]}})
    assert caught.value.field == "access_control"
    with client.sandbox(name=name), pytest.raises(SandboxClientError, match="already in use"):
        client.create_sandbox(name=name)
    with service.client(api_key="wrong") as other, pytest.raises(SandboxAuthenticationError, match="API key is wrong"):
        other.list_sandboxes()


def test_snapshots(client: Any) -> None:
    [snapshot] = client.list_snapshots()
    assert (snapshot.name, snapshot.status, snapshot.tags) == ("default", "ready", ["latest"])
    assert client.get_snapshot("default").id == client.get_snapshot(snapshot.id).id == snapshot.id
    assert client.list_snapshot_tags("default")[0].snapshot_id == snapshot.id
    with client.sandbox(snapshot_id=snapshot.id) as made:
        assert made.snapshot_id == snapshot.id
    with pytest.raises(ValidationError, match="must be an image"):
        client.create_snapshot("x", "Not An Image", 1 << 30)
    with pytest.raises(ResourceNotFoundError):
        client.get_snapshot("other")


def test_limits_are_enforced_or_said_not_to_be(client: Any, name: str) -> None:
    with client.sandbox(name=name, vcpus=1, mem_bytes=64 << 20, fs_capacity_bytes=1 << 30) as made:
        assert (made.vcpus, made.mem_bytes, made.fs_capacity_bytes) == (1, 64 << 20, 1 << 30)
        size = int(made.run("df -B1 --output=size / | tail -1").stdout)
        assert size <= 1 << 30 or "fs_capacity_bytes" in made.status_message
        eaten = made.run("python3 -c \"x = b'x' * (200 << 20)\"")
        assert eaten.exit_code != 0 or "mem" in made.status_message
        [other] = client.list_sandboxes()[:1]
        assert other.name == name  # newest first
        made.stop()
        with httpx2.Client(headers={"X-Api-Key": client._api_key}) as http:
            changed = http.patch(f"{client._base_url}/boxes/{name}", json={"mem_bytes": 512 << 20, "cpu_millicores": 500}).json()
        assert (changed["mem_bytes"], changed["cpu_millicores"], changed["vcpus"]) == (512 << 20, 500, 0.5)
        assert made.run("python3 -c \"x = b'x' * (200 << 20)\"").exit_code == 0


def test_run_config_layers(client: Any, name: str) -> None:
    config = {"work_dir": "/srv", "env_vars": {"A": "config", "B": "config"}}
    with client.sandbox(name=name, run_config=config) as made:
        assert made.run_config.work_dir == "/srv"
        assert made.run("echo $PWD $A $B").stdout == "/srv config config\n"
        assert made.run("echo $PWD $A", run_config={"work_dir": "/", "env_vars": {"A": "own"}}).stdout == "/ own\n"
        client.update_sandbox(name, run_config={"env_vars": {"B": "changed"}})
        assert made.run("echo $A $B").stdout == "config changed\n"
        assert made.run("id -un", run_config={"user": "nobody"}).stdout == "nobody\n"


@pytest.mark.parametrize("prefix", ["/v2/sandboxes", "/api/v2/sandboxes"])
def test_the_raw_answer(service: Service, name: str, prefix: str) -> None:
    with service.http() as http:
        made = http.post(f"{prefix}/boxes", json={"name": name, "wait_for_ready": True, "env_vars": {"SECRET": "hidden"}})
        assert made.status_code == 200
        body = made.json()
        assert set(FIELDS.split()) <= set(body)
        assert "hidden" not in made.text
        assert TIME.fullmatch(body["created_at"])
        assert body["dataplane_url"].startswith(service.endpoint)
        assert body["idle_ttl_seconds"] == 600
        assert http.get(f"{prefix}/boxes/{body['id']}").json()["name"] == name  # by id too
        ran = http.post(f"{body['dataplane_url']}/execute", json={"command": "echo $SECRET"}).json()
        assert ran == {"stdout": "hidden\n", "stderr": "", "exit_code": 0}
        assert http.get(f"{prefix}/boxes/{name}/status").json() == {"status": "ready", "status_message": body["status_message"]}
        stopped = http.post(f"{prefix}/boxes/{name}/stop", json={})
        assert (stopped.status_code, stopped.json()["status"]) == (200, "stopped")
        started = http.post(f"{prefix}/boxes/{name}/start", json={})
        assert (started.status_code, started.json()["status"]) == (200, "ready")
        assert http.delete(f"{prefix}/boxes/{name}").status_code == 204


def test_lists_are_filtered_sorted_and_paged(service: Service, name: str) -> None:
    with service.http() as http:
        names = [f"{name}-{letter}" for letter in "abc"]
        for index, one in enumerate(names):
            body = {"name": one, "labels": {"group": name, "index": str(index)}, "wait_for_ready": True}
            assert http.post("/v2/sandboxes/boxes", json=body).status_code == 200

        def listed(**query: Any) -> list[str]:
            answer = http.get("/v2/sandboxes/boxes", params={"label": f"group={name}", **query}).json()
            assert answer["items"] == answer["sandboxes"]
            return [entry["name"] for entry in answer["sandboxes"]]

        assert listed() == names[::-1]
        assert listed(sort_by="name") == names
        assert listed(sort_by="name", sort_direction="desc") == names[::-1]
        assert listed(sort_by="name", limit=2) == names[:2]
        assert listed(sort_by="name", limit=2, offset=2) == names[2:]
        assert listed(name_contains="-B") == [names[1]]
        assert listed(label="index=2") == [names[2]]
        assert listed(label=["index", f"group={name}"]) == names[::-1]
        assert http.post(f"/v2/sandboxes/boxes/{names[0]}/stop", json={}).status_code == 200
        assert listed(status="stopped") == [names[0]]
        page = http.get("/v2/sandboxes/boxes", params={"label": f"group={name}", "page_size": 2, "sort_by": "name"}).json()
        rest = http.get(
            "/v2/sandboxes/boxes",
            params={"label": f"group={name}", "page_size": 2, "sort_by": "name", "cursor": page["next_cursor"]},
        ).json()
        assert [entry["name"] for entry in page["items"] + rest["items"]] == names
        assert rest["next_cursor"] is None
        assert http.get("/v2/sandboxes/boxes", params={"limit": 0}).status_code == 422
        for one in names:
            assert http.delete(f"/v2/sandboxes/boxes/{one}").status_code == 204


def test_refusals_have_one_shape_and_an_id_that_the_log_has(service: Service, sandbox: Any) -> None:
    with service.http() as http:
        cases = [
            (http.get("/v2/sandboxes/boxes/nobody"), 404, "NotFound"),
            (http.get("/nowhere"), 404, "NotFound"),
            (http.put("/v2/sandboxes/boxes"), 405, "MethodNotAllowed"),
            (http.post("/v2/sandboxes/boxes", json={"name": sandbox.name}), 409, "Conflict"),
            (http.delete("/v2/sandboxes/snapshots/default"), 422, "Unsupported"),
            (http.post(f"/v2/sandboxes/boxes/{sandbox.name}/service-url", json={"port": 1}), 422, "Unsupported"),
            (http.get("/v2/sandboxes/boxes", headers={"X-Api-Key": "wrong"}), 401, "Unauthorized"),
            (http.get("/v2/sandboxes/boxes", headers={"Host": "evil.example"}), 403, "Forbidden"),
            (http.post("/v2/sandboxes/boxes", content=b" " * (17 << 20)), 413, "PayloadTooLarge"),
            (http.get("/dataplane/00000000-0000-0000-0000-000000000000/download?path=x"), 404, "NotFound"),
        ]
    for answer, status, error in cases:
        detail = answer.json()["detail"]
        assert (answer.status_code, detail["error"]) == (status, error)
        assert detail["message"]
        assert detail["error_id"] in service.text()


@pytest.mark.parametrize("prefix", ["/v2/sandboxes", "/api/v2/sandboxes"])
def test_what_this_service_has_not_is_answered_in_the_same_shape(service: Service, sandbox: Any, prefix: str) -> None:
    box, secrets = f"{prefix}/boxes/{sandbox.name}", "/api/v1/workspaces/current/secrets"
    cases: list[tuple[str, str, Any, int, str]] = [
        ("GET", f"{prefix}/registries/x", None, 404, "NotFound"),
        ("PATCH", f"{prefix}/registries/x", {"password": "s3cret"}, 404, "NotFound"),
        ("DELETE", f"{prefix}/registries/x", None, 404, "NotFound"),
        ("DELETE", f"{prefix}/snapshots/default", None, 422, "Unsupported"),
        ("GET", f"{prefix}/snapshots-by-name/x", None, 404, "NotFound"),
        ("POST", f"{box}/service-url", {"port": 80}, 422, "Unsupported"),
        ("DELETE", f"{box}/service-urls?port=80", None, 404, "NotFound"),
        ("DELETE", f"{box}/service-urls", None, 404, "NotFound"),
        ("POST", f"{box}/download-url", {"path": "/x"}, 422, "Unsupported"),
        ("GET", f"{secrets}/K", None, 404, "NotFound"),
        ("DELETE", f"{secrets}/K", None, 404, "NotFound"),
        ("GET", f"{prefix}/nowhere", None, 404, "NotFound"),
        ("GET", f"{box}/nowhere", None, 404, "NotFound"),
        ("PUT", f"{prefix}/boxes", {}, 405, "MethodNotAllowed"),
        ("GET", f"{sandbox.dataplane_url}/tunnel", None, 426, "UpgradeRequired"),
        ("GET", f"{sandbox.dataplane_url}/execute/ws", None, 426, "UpgradeRequired"),
    ]
    cases += [
        (method, f"{prefix}/boxes/nobody/{path}", {"name": "x"} if method == "POST" else None, 404, "NotFound")
        for method, path in (
            ("POST", "snapshot"),
            ("POST", "service-url"),
            ("GET", "service-urls"),
            ("DELETE", "service-urls"),
            ("POST", "download-url"),
        )
    ]
    with service.http() as http:
        for method, path, body, status, error in cases:
            answer = http.request(method, path, json=body)
            assert (answer.status_code, answer.json()["detail"]["error"]) == (status, error), (method, path, answer.text)
            assert set(answer.json()["detail"]) == {"error", "message", "error_id"}
            assert answer.json()["detail"]["error_id"] in service.text()
        assert http.put(f"{prefix}/boxes").headers["allow"] == "GET, POST"
        assert http.post(box).headers["allow"] == "GET, PATCH, DELETE"
        page: dict[str, Any] = {"registries": [], "items": [], "next_cursor": None, "offset": 0}
        assert http.get(f"{prefix}/registries").json() == page
        assert http.get(f"{box}/service-urls").json() == {"items": [], "next_cursor": None}
        assert http.get(secrets).json() == []
        for path in (f"{prefix}/registries", f"{box}/service-urls"):
            for field, value in (("cursor", "1"), ("page_size", "0")):
                answer = http.get(path, params={field: value})
                assert (answer.status_code, answer.json()["detail"][0]["loc"]) == (422, ["query", field])
    assert "s3cret" not in service.text()


def test_workspace_secrets_go_in_and_never_come_out(service: Service) -> None:
    secrets = "/api/v1/workspaces/current/secrets"
    with service.http() as http:
        body = [{"key": "FIRST", "value": "s3cret-1"}, {"key": "SECOND", "value": "s3cret-2"}]
        assert http.post(secrets, json=body).json() == [{"key": "FIRST"}, {"key": "SECOND"}]
        assert http.post(secrets, json={"key": "SECOND", "value": None}).json() == [{"key": "FIRST"}]
        assert http.put(f"{secrets}/THIRD", json={"value": "s3cret-3"}).json() == {"key": "THIRD"}
        assert http.get(secrets).json() == [{"key": "FIRST"}, {"key": "THIRD"}]
        assert http.get(f"{secrets}/FIRST").json() == {"key": "FIRST"}
        for bad in ({"key": "no key", "value": "s3cret"}, {"key": "K", "value": "s3cret\r\n"}, {"value": "s3cret"}):
            answer = http.post(secrets, json=bad)
            assert answer.status_code == 422
            assert "s3cret" not in answer.text
        for key in ("FIRST", "THIRD"):
            assert http.delete(f"{secrets}/{key}").status_code == 204
        assert http.delete(f"{secrets}/FIRST").status_code == 404
        assert http.get(secrets).json() == []
    assert "s3cret" not in service.text()


def test_a_proxy_config_is_checked_kept_and_told_without_secrets(service: Service, name: str) -> None:
    rule = {"name": "r", "match_hosts": ["api.example.com"], "headers": [{"name": "X", "type": "opaque", "value": "s3cret-4"}]}
    with service.http() as http:
        path = f"/v2/sandboxes/boxes/{name}"
        made = http.post("/v2/sandboxes/boxes", json={"name": name, "wait_for_ready": True, "proxy_config": {"rules": [rule]}})
        told = {"enabled": True, "match_paths": [], "headers": [{"name": "X", "type": "opaque", "is_set": True}]}
        assert made.json()["proxy_config"] == {"rules": [{**rule, **told}]}
        answer = http.patch(path, json={"proxy_config": {"rules": [{**rule, "match_hosts": ["~("]}]}})
        place = ["body", "proxy_config", "rules", 0, "match_hosts", 0]
        assert (answer.status_code, answer.json()["detail"][0]["loc"]) == (422, place)
        assert http.patch(path, json={"proxy_config": {}}).json()["proxy_config"] is None
        kept = http.patch(path, json={"proxy_config": {"rules": [{**rule, **told}]}})
        assert (kept.status_code, kept.json()["detail"][0]["loc"]) == (422, ["body", "proxy_config"])  # nothing to keep any more
        assert http.get(f"{path}/egress").json() == {"decisions": []}
        assert http.post(f"{path}/stop").status_code == 200
        stopped = http.patch(path, json={"proxy_config": {"rules": [rule]}})
        assert (stopped.status_code, stopped.json()["detail"]["error"]) == (400, "InvalidRequest")
        assert http.delete(path).status_code == 204
    assert "s3cret" not in service.text()


def test_validation_points_at_the_value_and_does_not_repeat_it(service: Service) -> None:
    with service.http() as http:
        answer = http.post("/v2/sandboxes/boxes", json={"vcpus": "seventeen", "env_vars": {"A": 5, "TOKEN=": "s3cret"}})
        assert answer.status_code == 422
        places = {tuple(entry["loc"]) for entry in answer.json()["detail"]}
        assert ("body", "vcpus") in places
        assert all(entry["type"] == "value_error" and entry["msg"] for entry in answer.json()["detail"])
        assert "seventeen" not in answer.text
        assert http.post("/v2/sandboxes/boxes", content=b"{not json").status_code == 422
    assert "s3cret" not in service.text()


def test_lists_refuse_what_they_do_not_know(service: Service) -> None:
    with service.http() as http:
        for path in ("boxes", "snapshots"):
            assert http.get(f"/v2/sandboxes/{path}", params={"created_by": "me", "page_size": 1}).status_code == 200
            for query in (
                {"cursor": "1"},
                {"sort_by": "colour"},
                {"sort_order": "up"},
                {"status": "fine"},
                {"created_by": "somebody"},
                {"page_size": 0},
                {"offset": -1},
            ):
                answer = http.get(f"/v2/sandboxes/{path}", params=query)
                assert answer.status_code == 422, (path, query)
                assert answer.json()["detail"][0]["loc"] == ["query", next(iter(query))]
        assert http.get("/v2/sandboxes/boxes", params={"tag_value_id": "x"}).json()["detail"][0]["loc"] == [
            "query",
            "tag_value_id",
        ]
        assert http.get("/v2/sandboxes/snapshots", params={"status": "building"}).json()["items"] == []


def test_what_one_machine_cannot_do_is_refused_by_name(service: Service, sandbox: Any) -> None:
    refused = {
        "mount_config": {"mounts": [{"path": "/x"}]},
        "volumes": [{"mount_path": "/x", "volume": "v"}],
        "access_delegation": {"mode": "EXPLICIT", "permissions": ["x"]},
        "preserve_memory_on_stop": True,
        "restore_memory": True,
        "tag_value_ids": ["x"],
        "persistent": False,
        "proxy_config": {"callbacks": ["https://example.com"]},
        "snapshot": "python:3.12",
        "snapshot_id": "x",
        "snapshot_name": "x",
    }
    with service.http() as http:
        before = http.get("/v2/sandboxes/boxes").json()["items"]
        for field, value in refused.items():
            detail = http.post("/v2/sandboxes/boxes", json={field: value}).json()["detail"]
            assert [entry["loc"] for entry in detail] == [["body", field]]
        for field in ("proxy_config", "tag_value_ids"):
            answer = http.patch(f"/v2/sandboxes/boxes/{sandbox.name}", json={field: refused[field]})
            assert (answer.status_code, answer.json()["detail"][0]["loc"]) == (422, ["body", field])
        assert http.get("/v2/sandboxes/boxes").json()["items"] == before


def test_it_describes_itself(service: Service) -> None:
    with service.http() as http:
        described = http.get("/openapi.json").json()
    paths = described["paths"]
    dataplane = {
        f"/dataplane/{{box_id}}/{path}" for path in ("execute", "execute/stream/start", "glob", "grep", "upload", "download")
    }
    assert {"/v2/sandboxes/boxes", "/api/v2/sandboxes/boxes/{name}", *dataplane} <= set(paths)
    for path, operations in paths.items():
        if path.startswith("/v2/"):
            assert set(paths[f"/api{path}"]) == set(operations)
        for operation in operations.values():
            assert operation["tags"]
            assert operation["summary"]
            assert "401" in operation["responses"]
    create = paths["/v2/sandboxes/boxes"]["post"]["responses"]
    assert create["200"]["content"]["application/json"]["schema"] == {"$ref": "#/components/schemas/SandboxView"}
    assert {"408", "409", "422", "507"} <= set(create)
    assert described["security"] == [{"key": []}]


def test_answers_are_as_described(service: Service, sandbox: Any) -> None:
    with service.http() as http:
        schemas = http.get("/openapi.json").json()["components"]["schemas"]
        for name, path in (
            ("SandboxView", f"boxes/{sandbox.name}"),
            ("SandboxStatus", f"boxes/{sandbox.name}/status"),
            ("SandboxList", "boxes"),
            ("SnapshotList", "snapshots"),
            ("SnapshotView", "snapshots/default"),
            ("SnapshotTags", "snapshots-by-name/default"),
        ):
            assert set(http.get(f"/v2/sandboxes/{path}").json()) == set(schemas[name]["properties"]), name


def test_no_key_no_answer(service: Service, sandbox: Any) -> None:
    paths = ["/v2/sandboxes/boxes", "/openapi.json", "/nowhere", f"/dataplane/{sandbox.id}/download?path=x"]
    with httpx2.Client(base_url=service.endpoint) as http:
        for path in paths:
            assert http.get(path).status_code == 401
            assert http.get(path, headers={"X-Api-Key": service.key + "x"}).status_code == 401
        assert http.post(f"/dataplane/{sandbox.id}/execute", json={"command": "true"}).status_code == 401

"""Snapshots of images: from registries with and without accounts, from archives; booted, captured, booted again."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from langsmith.sandbox import ResourceCreationError, SandboxClientError

from tests.images.maker import Image, Layer
from tests.images.registry import PASSWORD, USER

if TYPE_CHECKING:
    from tests.images.conftest import Archive, Snaps
    from tests.images.registry import Authority, Registry
    from tests.sdk.conftest import Service

CAPACITY = 256 << 20


def test_a_private_registry_with_tls(
    http: Any, client: Any, snaps: Snaps, private: Registry, authority: Authority, app: Image, service: Service, name: str
) -> None:
    image = private.push(app, "team/app:1.0")
    account = {"name": name, "url": private.url, "username": USER, "password": PASSWORD, "ca_cert": authority.ca.read_text()}
    registry = http.post("/v2/sandboxes/registries", json=account).json()
    assert registry["username"] == USER
    assert PASSWORD not in json.dumps(registry)
    made = client.create_snapshot(name, image, CAPACITY, registry_id=registry["id"])
    assert made.status == "ready"
    assert made.tags == ["latest"]
    assert made.registry_id == registry["id"]
    assert (made.run_config.user, made.run_config.work_dir) == ("app", "/work/here")
    assert made.run_config.env_vars == {"PATH": "/bin:/opt/bin", "STAGE": "image", "EMPTY": ""}
    assert made.fs_used_bytes > 500_000
    told = http.get(f"/v2/sandboxes/snapshots/{made.id}").json()
    assert told["image_digest"].startswith("sha256:")
    assert told["image_config"] == {"entrypoint": ["/bin/never"], "cmd": ["started"]}
    assert told["labels"] == {"team": "image", "origin": "here"}
    for url_of, wrong in (("password", "wrong"), ("password", ""), ("ca_cert", None)):
        changed = {**account, "name": f"{name}-{url_of}-{len(wrong or '')}", url_of: wrong}
        other = http.post("/v2/sandboxes/registries", json=changed).json()
        failed = snaps.build(name, image, registry_id=other["name"])
        wanted = "certificate is not trusted" if url_of == "ca_cert" else "refuses the credentials"
        assert failed["status"] == "failed"
        assert failed["status_message"].startswith(f"ImagePull: {image}: ")
        assert wanted in failed["status_message"]
        snaps.delete(failed)
    with client.sandbox(snapshot_name=name) as box:
        assert box.snapshot_id == made.id
        said = box.run("id -un; pwd; echo $STAGE; find /srv; cat /etc/hosts | head -1; env | grep -c PATH=/bin:/opt/bin")
        assert said.stderr == ""
        assert said.stdout.split("\n")[:3] == ["app", "/work/here", "image"]
        assert "/srv/kept" in said.stdout
        assert "/srv/old/b" in said.stdout
        assert "gone" not in said.stdout
        assert "/srv/old/a" not in said.stdout
        assert "127.0.0.1\tlocalhost" in said.stdout
        box.run("echo more > /srv/more; echo no > /tmp/no", run_config={"user": "root"})
        again = box.capture_snapshot(f"{name}-again")
        assert again.source_sandbox_id == box.id
        assert again.run_config.user == "app"
        with client.sandbox(snapshot_id=again.id) as second:
            assert second.run("cat /srv/more; ls /tmp; id -un").stdout == "more\napp\n"
            with pytest.raises(SandboxClientError, match=f"is used by {second.name}"):
                client.delete_snapshot(again.id)
        with pytest.raises(SandboxClientError, match="is used by"):
            client.delete_snapshot(made.id)
    for one in (again, made):
        client.delete_snapshot(one.id)
    assert snaps.on_disk() == []
    assert PASSWORD not in service.text()
    assert PASSWORD.encode() not in b"".join(path.read_bytes() for path in service.state_dir.glob("state.db*"))
    assert (service.state_dir / "secrets.key").stat().st_mode & 0o777 == 0o600


def test_plain_http_only_when_asked(http: Any, snaps: Snaps, plain: Registry, app: Image, name: str) -> None:
    image = plain.push(app, "open/app:2")
    failed = snaps.build(name, image)
    assert failed["status"] == "failed"
    assert "plain HTTP" in failed["status_message"]
    http.post("/v2/sandboxes/registries", json={"name": name, "url": plain.url})
    made = snaps.build(name, image, registry_id=name)
    assert made["status"] == "ready", made
    by_digest = snaps.build(name, f"{plain.host}/open/app@{made['image_digest']}", registry_id=name)
    assert by_digest["status"] == "ready", by_digest
    assert by_digest["fs_used_bytes"] == made["fs_used_bytes"]
    missing = snaps.build(name, f"{plain.host}/open/nothing:1", registry_id=name)
    assert "there is no such image" in missing["status_message"]
    elsewhere = http.post(
        "/v2/sandboxes/snapshots",
        json={"name": name, "docker_image": "registry.example.com/app", "registry_id": name, "fs_capacity_bytes": CAPACITY},
    )
    assert elsewhere.status_code == 422
    assert "credentials go nowhere else" in elsewhere.text
    snaps.delete(failed, made, by_digest, missing)
    assert snaps.on_disk() == []


def test_layers_are_shared_and_tags_move(client: Any, snaps: Snaps, archive: Archive, base: bytes, name: str) -> None:
    one = snaps.build(name, archive(Image([base, Layer().add("one", b"1").content()])), tag="v1")
    before = set(snaps.on_disk())
    two = snaps.build(name, archive(Image([base, Layer().add("two", b"2").content()], compression="zstd")), tag="v1")
    assert (one["status"], two["status"]) == ("ready", "ready"), two
    assert len(set(snaps.on_disk()) - before) == 2  # its second layer, and what completes it
    assert client.get_snapshot(one["id"]).tags == []
    assert client.get_snapshot(f"{name}:v1").id == two["id"]
    assert client.get_snapshot(name).id == one["id"]  # no `latest`: the newest without a tag
    three = snaps.build(name, archive(Image([base], compression="none")))
    assert client.get_snapshot(name).id == three["id"]
    assert {tag.tag: tag.snapshot_id for tag in client.list_snapshot_tags(name)} == {"v1": two["id"], "latest": three["id"]}
    listed = client.list_snapshots(name_contains=name)
    assert [snapshot.id for snapshot in listed] == [three["id"], two["id"], one["id"]]
    with client.sandbox(snapshot=f"{name}:v1") as box:
        assert box.run("cat /two; ls /one").stdout == "2"
    snaps.delete(one)
    with client.sandbox(snapshot_id=two["id"]) as box:
        assert box.run("cat /two").stdout == "2"
    snaps.delete(two, three)
    assert snaps.on_disk() == []


def test_an_image_without_a_shell(client: Any, snaps: Snaps, archive: Archive, name: str) -> None:
    made = snaps.build(name, archive(Image([Layer().add("tool", b"\x7fELF", mode=0o755).content()])))
    assert made["status"] == "ready", made
    with client.sandbox(snapshot_id=made["id"]) as box:
        assert box.status == "ready"
        assert box.read("/tool") == b"\x7fELF"
        box.write("/data/file", b"kept")
        with pytest.raises(SandboxClientError, match="No such file or directory: /bin/sh"):
            box.run("true")
        box.stop()
        box.start()
        assert box.read("/data/file") == b"kept"
    snaps.delete(made)


def test_what_the_image_says_can_be_overridden(client: Any, http: Any, archive: Archive, app: Image, name: str) -> None:
    config = {"user": "0", "env_vars": {"STAGE": "mine"}}
    made = client.create_snapshot(name, archive(app), CAPACITY, run_config=config, tag="x")
    body = {"name": name, "snapshot": f"{name}:x", "env_vars": {"EMPTY": "no"}, "labels": {"team": "mine"}}
    told = http.post("/v2/sandboxes/boxes", json={**body, "wait_for_ready": True}).json()
    assert (told["fs_capacity_bytes"], told["labels"]) == (CAPACITY, {"team": "mine", "origin": "here"})
    box = client.get_sandbox(name)
    assert box.run("id -u; echo $STAGE $EMPTY $PATH; pwd").stdout == "0\nmine no /bin:/opt/bin\n/work/here\n"
    box.delete()
    client.delete_snapshot(made.id)


def test_another_machines_image_is_refused(client: Any, archive: Archive, base: bytes, name: str) -> None:
    with pytest.raises(ResourceCreationError, match="it is for s390x"):
        client.create_snapshot(name, archive(Image([base], machine="s390x")), CAPACITY)
    [failed] = client.list_snapshots(name_contains=name)
    client.delete_snapshot(failed.id)

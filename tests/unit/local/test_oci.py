"""Manifests and configurations from strangers."""

from __future__ import annotations

import json
from typing import Any

import pytest

from gatewayd.local import oci
from gatewayd.local.oci import ImageError

D = [f"sha256:{number:064x}" for number in range(8)]
OCI_LAYER = "application/vnd.oci.image.layer.v1."
DOCKER_LAYER = "application/vnd.docker.image.rootfs."


def text(value: Any) -> bytes:
    return json.dumps(value).encode()


def manifest(*kinds: str, **more: Any) -> bytes:
    layers = [{"digest": D[number + 1], "size": 10, "mediaType": kind} for number, kind in enumerate(kinds)]
    return text({"config": {"digest": D[0], "size": 1}, "layers": layers, **more})


def config(**own: Any) -> bytes:
    return text({"architecture": oci.architecture(), "os": "linux", "rootfs": {"diff_ids": D[:2]}, "config": own})


def test_every_kind_of_layer() -> None:
    kinds = [f"{OCI_LAYER}tar", f"{OCI_LAYER}tar+gzip", f"{OCI_LAYER}tar+zstd", f"{DOCKER_LAYER}diff.tar.gzip"]
    kinds += [f"{DOCKER_LAYER}foreign.diff.tar.gzip", "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip"]
    found = oci.manifest(manifest(*kinds))
    assert [layer.compression for layer in found.layers] == ["none", "gzip", "zstd", "gzip", "gzip", "gzip"]
    assert (found.size, found.layers[0].file) == (60, D[1].replace(":", "/"))


WRONG_DIGEST = {"digest": "sha256:../../etc/passwd", "size": 1, "mediaType": f"{OCI_LAYER}tar"}


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"[]", b"nonsense", b"{}", b"[" * 100_000, b" " * (oci.MAX_JSON + 1)),
        manifest("application/x-other"),
        text({"config": {"digest": D[0], "size": 1}, "layers": [WRONG_DIGEST]}),
        text({"config": {"digest": D[0], "size": -1}, "layers": []}),
        text({"config": {"digest": D[0], "size": True}, "layers": []}),
        text({"config": {"digest": D[0], "size": 1}, "layers": [5]}),
        manifest(*[f"{OCI_LAYER}tar"] * 7, layers=[{}] * (oci.MAX_LAYERS + 1)),
        text({"schemaVersion": 1, "fsLayers": []}),
    ],
)
def test_manifests_that_make_no_sense(content: bytes) -> None:
    with pytest.raises(ImageError):
        oci.manifest(content)


def test_this_machines_image_is_chosen() -> None:
    entries = [
        {"digest": D[1], "platform": {"os": "linux", "architecture": "s390x"}},
        {"digest": D[2], "platform": {"os": "linux", "architecture": oci.architecture()}},
        "nonsense",
    ]
    assert oci.platform_digest(text({"manifests": entries})) == D[2]
    assert oci.platform_digest(manifest(f"{OCI_LAYER}tar")) is None
    with pytest.raises(ImageError, match="there are: linux/s390x"):
        oci.platform_digest(text({"manifests": entries[:1]}))


def test_how_it_wants_to_be_run() -> None:
    own = {"User": "app", "WorkingDir": "srv", "Env": ["A=b=c", "B=", "nonsense", 5], "Entrypoint": ["/x"], "Cmd": None}
    found = oci.config(config(**own, Labels={"a": "b", "c": 5, "": "x", "long": "x" * 300}))
    assert found.run_config == {"user": "app", "work_dir": "/srv", "env_vars": {"A": "b=c", "B": ""}}
    assert (found.image_config, found.labels) == ({"entrypoint": ["/x"]}, {"a": "b"})
    assert oci.config(config()).run_config == {}


@pytest.mark.parametrize(
    "content",
    [
        config(User="a\nb"),
        config(WorkingDir="/a/../b"),
        config(Env=["A=" + "x" * oci.MAX_ENV]),
        text({"architecture": "s390x", "rootfs": {"diff_ids": []}}),
        text({"os": "windows", "rootfs": {"diff_ids": []}}),
        text({"rootfs": {"diff_ids": ["x"]}}),
        text({"rootfs": 5}),
    ],
)
def test_configurations_that_are_of_no_use(content: bytes) -> None:
    with pytest.raises(ImageError):
        oci.config(content)


def test_chains() -> None:
    """OCI image specification, config.md, *Layer ChainID*."""
    one, two = oci.chain_ids((D[0], D[1]))
    assert (one, two) == (D[0], oci.digest_of(f"{D[0]} {D[1]}".encode()))


def test_a_layout_names_one_image() -> None:
    entry = {"digest": D[0], "size": 1}
    assert oci.layout_manifest(text({"manifests": [entry]})).digest == D[0]
    for entries in ([], [entry, entry], None):
        with pytest.raises(ImageError):
            oci.layout_manifest(text({"manifests": entries}))

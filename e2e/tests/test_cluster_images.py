from __future__ import annotations

import hashlib
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest

from e2e.clusters.netns.imagestore import thin_archive
from e2e.clusters.shell import ClusterError

NAME = "localhost/dstrain/trainer:1"


def blob(layout: Path, data: bytes) -> str:
    digest = hashlib.sha256(data).hexdigest()
    (layout / "blobs" / "sha256" / digest).write_bytes(data)
    return f"sha256:{digest}"


@pytest.fixture
def layout(tmp_path: Path) -> Path:
    """An image of two layers, as buildah's tools write it."""
    (tmp_path / "blobs" / "sha256").mkdir(parents=True)
    layers = [{"digest": blob(tmp_path, data)} for data in (b"torch", b"code")]
    content = {"config": {"digest": blob(tmp_path, b"config")}, "layers": layers}
    manifest = {
        "digest": blob(tmp_path, json.dumps(content).encode()),
        "annotations": {"org.opencontainers.image.ref.name": NAME},
    }
    (tmp_path / "index.json").write_text(json.dumps({"manifests": [manifest]}))
    return tmp_path


def unpack(layout: Path, present: set[str]) -> tuple[dict[str, Any], list[bytes]]:
    out = io.BytesIO()
    thin_archive(layout, NAME, present, out)
    out.seek(0)
    with tarfile.open(fileobj=out) as tar:
        files = {m.name: tar.extractfile(m).read() for m in tar}  # type: ignore[union-attr]
    assert json.loads(files.pop("oci-layout")) == {"imageLayoutVersion": "1.0.0"}
    return json.loads(files.pop("index.json")), list(files.values())


def test_a_receiver_without_anything_gets_every_blob_of_the_image_once(layout: Path) -> None:
    index, blobs = unpack(layout, set())
    assert len(blobs) == 4
    assert {b"torch", b"code", b"config"} < set(blobs)
    assert index["manifests"][0]["annotations"] == {"io.containerd.image.name": NAME}


def test_a_receiver_with_the_heavy_layer_gets_the_rest(layout: Path) -> None:
    torch = "sha256:" + hashlib.sha256(b"torch").hexdigest()
    _, blobs = unpack(layout, {torch, "sha256:of-another-image"})
    assert len(blobs) == 3
    assert b"torch" not in blobs


def test_an_image_that_was_never_taken_is_named(layout: Path) -> None:
    with pytest.raises(ClusterError, match="no image localhost/none:1"):
        thin_archive(layout, "localhost/none:1", set(), io.BytesIO())

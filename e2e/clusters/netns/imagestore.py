"""How images reach the nodes: once in full, then only what changed.

An image with torch is 5 GB; importing it takes a minute and more per node. So it is imported once,
into the *seed*: the root folder of a containerd that runs on no node. A new node begins with a
hard-linked copy of it (a fraction of a second, no disk). After that an image moves as an OCI
archive of only those blobs that the receiver lacks: when code changes, its last layer.

    buildah's store -> layout (OCI, all blobs once) -> seed -> hard links -> nodes of the next `up`
                                       \\-> thin archive -> nodes that run
"""

from __future__ import annotations

import fcntl
import io
import json
import shutil
import subprocess
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from e2e.clusters.home import home
from e2e.clusters.netns import remains
from e2e.clusters.netns.processes import is_daemon, kill_all, start, wait_ready
from e2e.clusters.shell import ClusterError, run

PAUSE_IMAGE = "localhost/dstrain/pause:1"
IMPORT_TIMEOUT_S = 900


def copy_seed(containerd_root: Path) -> None:
    """Give a new node all images that the seed holds."""
    with _locked() as store:
        if not store.seed.exists():
            _build_pause_image()
            store.update(PAUSE_IMAGE)
        _link_copy(store.seed, containerd_root)


def load(image: str | Path, sockets: list[Path]) -> None:
    """Bring an image into the seed and into the containerds that listen on `sockets`."""
    name = _unpack_archive(image) if isinstance(image, Path) else _full_name(image)
    with _locked() as store:
        if not store.seed.exists():
            _build_pause_image()
            store.update(PAUSE_IMAGE)
        store.update(name)
        with ThreadPoolExecutor() as pool:
            list(pool.map(lambda socket: _import_thin(store.layout, name, socket), sockets))


@dataclass(frozen=True)
class _Store:
    folder: Path

    @property
    def layout(self) -> Path:
        return self.folder / "layout"

    @property
    def seed(self) -> Path:
        return self.folder / "seed"

    def update(self, name: str) -> None:
        """Put buildah's image `name` into the layout and into the seed."""
        # Uncompressed: nothing travels further than this disk. A blob that the layout has is not
        # written again.
        target = f"oci:{self.layout}:{name}"
        run("buildah", "push", "--quiet", "-D", name, target, timeout_s=IMPORT_TIMEOUT_S)
        work = self.folder / "seed.new"
        _remove_containerd(work)
        work.mkdir()
        if self.seed.exists():
            _link_copy(self.seed, work / "containerd")
        socket = _start_containerd(work)
        _import_thin(self.layout, name, socket)
        kill_all(lambda pid: is_daemon(pid, work))
        if self.seed.exists():
            shutil.rmtree(self.seed)
        (work / "containerd").rename(self.seed)
        _remove_containerd(work)


@contextmanager
def _locked() -> Iterator[_Store]:
    """The store, for this process alone: clusters and checkouts share it."""
    folder = home() / "images"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield _Store(folder)


def thin_archive(layout: Path, name: str, present: set[str], out: IO[bytes]) -> None:
    """Write an OCI archive of image `name` to `out`, without the blobs (digests) `present`.

    Raises ClusterError if the layout does not have the image.
    """
    manifest = _manifest(layout, name)
    with tarfile.open(fileobj=out, mode="w|") as tar:
        _add_text(tar, "oci-layout", {"imageLayoutVersion": "1.0.0"})
        # containerd takes this name as it is; it would prefix the standard annotation's.
        named = {**manifest, "annotations": {"io.containerd.image.name": name}}
        _add_text(tar, "index.json", {"schemaVersion": 2, "manifests": [named]})
        for digest in _blobs(layout, manifest):
            if digest not in present:
                path = _blob(digest)
                tar.add(layout / path, arcname=path)


def _manifest(layout: Path, name: str) -> dict[str, Any]:
    index = json.loads((layout / "index.json").read_text())
    for manifest in index["manifests"]:
        if manifest.get("annotations", {}).get("org.opencontainers.image.ref.name") == name:
            return dict(manifest)
    raise ClusterError(f"no image {name} in {layout}")


def _blobs(layout: Path, manifest: dict[str, Any]) -> list[str]:
    content = json.loads((layout / _blob(manifest["digest"])).read_text())
    layers = [layer["digest"] for layer in content["layers"]]
    return list(dict.fromkeys([manifest["digest"], content["config"]["digest"], *layers]))


def _blob(digest: str) -> str:
    return f"blobs/{digest.replace(':', '/')}"


def _add_text(tar: tarfile.TarFile, name: str, content: dict[str, Any]) -> None:
    data = json.dumps(content).encode()
    entry = tarfile.TarInfo(name)
    entry.size = len(data)
    tar.addfile(entry, io.BytesIO(data))


def _import_thin(layout: Path, name: str, socket: Path) -> None:
    ctr = ["ctr", "--address", str(socket), "--namespace", "k8s.io"]
    present = set(run(*ctr, "content", "ls", "--quiet").split())
    with subprocess.Popen(
        [*ctr, "images", "import", "-"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    ) as importer:
        assert importer.stdin is not None
        assert importer.stdout is not None
        try:
            thin_archive(layout, name, present, importer.stdin)
            importer.stdin.close()
        except BrokenPipeError:
            pass  # It has failed, and says why below.
        words = importer.stdout.read().decode()
    if importer.returncode != 0:
        raise ClusterError(f"import of {name} into {socket} failed: {words.strip()}")


def _link_copy(source: Path, target: Path) -> None:
    """Copy a stopped containerd's root: immutable files as hard links, databases for real."""
    run("cp", "--archive", "--link", source, target, timeout_s=120)
    for database in target.glob("*/*.db"):
        original = source / database.relative_to(target)
        run("cp", "--archive", "--remove-destination", original, database)


def _start_containerd(work: Path) -> Path:
    socket, log = work / "containerd.sock", work / "containerd.log"
    config = work / "containerd.toml"
    config.write_text(f"""\
version = 2
root = "{work}/containerd"
state = "{work}/state"
disabled_plugins = ["io.containerd.grpc.v1.cri"]
[grpc]
address = "{socket}"
[plugins."io.containerd.internal.v1.opt"]
path = "{work}/opt"
""")
    start("containerd", "--config", config, log=log)
    wait_ready("containerd", work, log, lambda: containerd_answers(socket))
    return socket


def containerd_answers(socket: Path) -> bool:
    """Whether a containerd listens on the socket."""
    try:
        run("ctr", "--address", socket, "version", timeout_s=5)
    except ClusterError:
        return False
    return True


def _remove_containerd(work: Path) -> None:
    kill_all(lambda pid: is_daemon(pid, work))
    remains.unmount_below(work)
    remains.remove_below(work)


def _full_name(image: str) -> str:
    """The name under which buildah knows an image, e.g. localhost/x:latest for x."""
    found = json.loads(run("buildah", "inspect", "--type", "image", image))
    name = found["FromImage"]
    if not name:
        raise ClusterError(f"{image} has no name: give it one with `buildah tag`")
    return str(name)


def _unpack_archive(archive: Path) -> str:
    """Put a docker-archive into buildah's store; the name it has there."""
    image = run("buildah", "pull", "--quiet", f"docker-archive:{archive}", timeout_s=600)
    return _full_name(image.strip())


def _build_pause_image() -> None:
    """catatonit in pause mode, built from scratch: 700 kB."""
    catatonit = shutil.which("catatonit")
    if catatonit is None:
        raise ClusterError("catatonit is missing: apt-get install catatonit")
    container = run("buildah", "from", "scratch").strip()
    try:
        run("buildah", "copy", "--quiet", container, catatonit, "/catatonit")
        run("buildah", "config", "--entrypoint", '["/catatonit","-P"]', container)
        run("buildah", "commit", "--quiet", container, PAUSE_IMAGE)
    finally:
        run("buildah", "rm", container)

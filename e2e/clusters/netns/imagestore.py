"""How images reach the nodes: once in full, then only what changed.

An image with torch is 5 GB; importing it takes a minute and more per node. So it is imported once,
into the *seed*: the root folder of a containerd that runs on no node. A new node begins with a
hard-linked copy of it (a fraction of a second, no disk). After that an image moves as an OCI
archive of only those blobs that the receiver lacks: when code changes, its last layer.

    buildah's store -> layout (OCI, all blobs once) -> seed -> hard links -> nodes still empty
                          |-> archive of the missing blobs -> nodes in use
"""

from __future__ import annotations

import fcntl
import io
import json
import shutil
import subprocess
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from e2e.clusters.home import home
from e2e.clusters.netns import remains
from e2e.clusters.netns.processes import is_daemon, kill_all, start, wait_ready
from e2e.clusters.shell import ClusterError, run

PAUSE_IMAGE = "localhost/dstrain/pause:1"
IMPORT_TIMEOUT_S = 900
MUCH_BYTES = 200_000_000
# A file of ours in the seed's folder, so that both change in one rename.
SEEDED = "dstrain-images.json"


def copy_seed(containerd_root: Path) -> None:
    """Give a new node all images that the seed holds."""
    if not _Store().seed.exists():
        take(PAUSE_IMAGE)
    with _locked(fcntl.LOCK_SH) as store:
        _link_copy(store.seed, containerd_root)


def take(image: str | Path) -> str:
    """Take an image, or the one in a docker-archive, into the layout and the seed; its name."""
    with _locked(fcntl.LOCK_EX) as store:
        if not store.seed.exists():
            _build_pause_image()
            store.update(PAUSE_IMAGE)
        name = _unpack_archive(image) if isinstance(image, Path) else _full_name(image)
        store.update(name)
    return name


def lacks_much(name: str, socket: Path) -> bool:
    """Whether sending the image to this containerd would take minutes rather than seconds."""
    present = _present(socket)
    with _locked(fcntl.LOCK_SH) as store:
        absent = [store.layout / _path(d) for d in _blobs(store.layout, name) if d not in present]
        return sum(blob.stat().st_size for blob in absent) > MUCH_BYTES


def send(name: str, socket: Path) -> None:
    """Send an image that was taken to a containerd: only those of its blobs that it lacks."""
    with _locked(fcntl.LOCK_SH) as store:
        _import(store.layout, name, socket)


@dataclass(frozen=True)
class _Store:
    folder: Path = field(default_factory=lambda: home() / "images")

    @property
    def layout(self) -> Path:
        return self.folder / "layout"

    @property
    def seed(self) -> Path:
        return self.folder / "seed"

    def seeded(self) -> dict[str, str]:
        """Identity of the image behind each name that the seed holds."""
        record = self.seed / SEEDED
        return dict(json.loads(record.read_text())) if record.exists() else {}

    def update(self, name: str) -> None:
        """Put buildah's image `name` into layout and seed, in place of its repository's others."""
        identity = _listed()[name]
        seeded = self.seeded()
        if seeded.get(name) == identity:
            return
        # Uncompressed: nothing travels further than this disk, and gzip would take minutes for
        # torch. A blob that the layout has is not written again. (`buildah push` always
        # compresses for a layout, whatever its --disable-compression says.)
        run(
            *("skopeo", "copy", "--quiet", "--dest-oci-accept-uncompressed-layers"),
            *(f"containers-storage:{name}", f"oci:{self.layout}:{name}"),
            timeout_s=IMPORT_TIMEOUT_S,
        )
        work = self.folder / "seed.new"
        _remove_containerd(work)
        work.mkdir()
        if self.seed.exists():
            _link_copy(self.seed, work / "containerd")
        socket = _start_containerd(work)
        _import(self.layout, name, socket)
        kept = _remove_older(name, socket)
        kill_all(lambda pid: is_daemon(pid, work))
        _forget_all_but(kept, self.layout)
        _share_blobs(self.layout, work / "containerd")
        seeded = {n: i for n, i in {**seeded, name: identity}.items() if n in kept}
        (work / "containerd" / SEEDED).write_text(json.dumps(seeded))
        if self.seed.exists():
            shutil.rmtree(self.seed)
        (work / "containerd").rename(self.seed)
        _remove_containerd(work)


@contextmanager
def _locked(mode: int) -> Iterator[_Store]:
    """The store, shared for reading or exclusive: all clusters and checkouts use the same."""
    store = _Store()
    store.folder.mkdir(parents=True, exist_ok=True)
    with (store.folder / "lock").open("w") as lock:
        fcntl.flock(lock, mode)
        yield store


def _remove_older(name: str, socket: Path) -> set[str]:
    """Remove the other tags of the image's repository; the names that remain."""
    ctr = _ctr(socket)
    names = set(run(*ctr, "images", "ls", "--quiet").split())
    older = {n for n in names if n != name and n.rpartition(":")[0] == name.rpartition(":")[0]}
    if older:
        run(*ctr, "images", "rm", "--sync", *older, timeout_s=120)
    return names - older


def _forget_all_but(names: set[str], layout: Path) -> None:
    """Remove all other images from the layout, and the blobs that only they had."""
    index = json.loads((layout / "index.json").read_text())
    index["manifests"] = [m for m in index["manifests"] if _name(m) in names]
    (layout / "index.json").write_text(json.dumps(index))
    needed = {_path(digest) for name in names for digest in _blobs(layout, name)}
    for blob in (layout / "blobs" / "sha256").iterdir():
        if str(blob.relative_to(layout)) not in needed:
            blob.unlink()


def _share_blobs(layout: Path, containerd_root: Path) -> None:
    """Keep each blob once on the disk: both sides only ever add and remove whole files."""
    for blob in (containerd_root / "io.containerd.content.v1.content/blobs/sha256").iterdir():
        twin = layout / "blobs" / "sha256" / blob.name
        if twin.exists() and not twin.samefile(blob):
            spare = blob.with_suffix(".link")
            spare.hardlink_to(twin)
            spare.rename(blob)


def thin_archive(layout: Path, name: str, present: set[str], out: IO[bytes]) -> None:
    """Write an OCI archive of image `name` to `out`, without the blobs (digests) `present`.

    Raises ClusterError if the layout does not have the image.
    """
    with tarfile.open(fileobj=out, mode="w|") as tar:
        _add_text(tar, "oci-layout", {"imageLayoutVersion": "1.0.0"})
        # containerd takes this name as it is; it would prefix the standard annotation's.
        annotations = {"io.containerd.image.name": name}
        manifest = {**_manifest(layout, name), "annotations": annotations}
        _add_text(tar, "index.json", {"schemaVersion": 2, "manifests": [manifest]})
        for digest in _blobs(layout, name):
            if digest not in present:
                tar.add(layout / _path(digest), arcname=_path(digest))


def _manifest(layout: Path, name: str) -> dict[str, Any]:
    index = json.loads((layout / "index.json").read_text())
    for manifest in index["manifests"]:
        if _name(manifest) == name:
            return dict(manifest)
    raise ClusterError(f"no image {name} in {layout}")


def _name(manifest: dict[str, Any]) -> str | None:
    name: str | None = manifest.get("annotations", {}).get("org.opencontainers.image.ref.name")
    return name


def _blobs(layout: Path, name: str) -> list[str]:
    """Digests of the image's manifest, configuration and layers."""
    manifest = _manifest(layout, name)["digest"]
    content = json.loads((layout / _path(manifest)).read_text())
    layers = [layer["digest"] for layer in content["layers"]]
    return list(dict.fromkeys([manifest, content["config"]["digest"], *layers]))


def _path(digest: str) -> str:
    return f"blobs/{digest.replace(':', '/')}"


def _add_text(tar: tarfile.TarFile, name: str, content: dict[str, Any]) -> None:
    data = json.dumps(content).encode()
    entry = tarfile.TarInfo(name)
    entry.size = len(data)
    tar.addfile(entry, io.BytesIO(data))


def _ctr(socket: Path) -> list[str]:
    return ["ctr", "--address", str(socket), "--namespace", "k8s.io"]


def _present(socket: Path) -> set[str]:
    return set(run(*_ctr(socket), "content", "ls", "--quiet").split())


def _import(layout: Path, name: str, socket: Path) -> None:
    present = _present(socket)
    with subprocess.Popen(
        [*_ctr(socket), "images", "import", "-"],
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
    """The name under which buildah keeps an image, e.g. localhost/x:latest for x."""
    names = _listed()
    for name in (image, f"{image}:latest", f"localhost/{image}", f"localhost/{image}:latest"):
        if name in names:
            return name
    raise ClusterError(f"no image {image} here (see `buildah images`), nor an archive of that path")


def _unpack_archive(archive: Path) -> str:
    """Put a docker-archive into buildah's store; the name it has there."""
    image = run("buildah", "pull", "--quiet", f"docker-archive:{archive}", timeout_s=600).strip()
    for name, identity in _listed().items():
        if identity == image:
            return name
    raise ClusterError(f"the image in {archive} has no name: save it with one")


def _listed() -> dict[str, str]:
    """Identity of the image behind each name that buildah keeps."""
    images = json.loads(run("buildah", "images", "--json", "--no-trunc"))
    identities = {i["id"].removeprefix("sha256:"): i.get("names") or [] for i in images}
    return {name: identity for identity, names in identities.items() for name in names}


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

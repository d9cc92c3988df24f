"""The images of the repository's Dockerfile, by Docker where it answers and by buildah otherwise.

Both keep their layers, so a change of code costs its own layer only. Nothing is pulled with
buildah: its base image is bootstrapped from the Debian mirror that this machine's apt uses.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from e2e.clusters import packages
from e2e.clusters.shell import ClusterError, run

log = logging.getLogger(__name__)

REPOSITORY = Path(__file__).resolve().parents[2]
SUITE = "trixie"  # python3 is 3.13
PACKAGES = ("ca-certificates", "python3", "python3-venv")
# What nobody reads in a container; Debian's slim images leave it out, too.
UNREAD = (
    "usr/share/doc",
    "usr/share/info",
    "usr/share/locale",
    "usr/share/man",
    "var/cache/apt",
    "var/lib/apt/lists",
    "var/log",
)
BUILD_TIMEOUT_S = 3600


def docker_answers() -> bool:
    """Whether there is a Docker engine to build with."""
    if shutil.which("docker") is None:
        return False
    try:
        run("docker", "info", timeout_s=20)
    except ClusterError:
        return False
    return True


def build(target: str, repository: Path = REPOSITORY) -> str:
    """Build one target of the Dockerfile; the image's name, whose tag is taken from its content."""
    untagged = f"localhost/dstrain/{target}:latest"
    arguments = ["--target", target, "--tag", untagged]
    if index := os.environ.get("TORCH_INDEX_URL"):
        arguments += ["--build-arg", f"TORCH_INDEX_URL={index}"]
    log.info("building the image of target %s", target)
    if docker_answers():
        run("docker", "build", *arguments, repository, timeout_s=BUILD_TIMEOUT_S)
        image = run("docker", "image", "inspect", "--format={{.Id}}", untagged)
        builder = "docker"
    else:
        packages.ensure()
        image = _buildah_build(arguments, repository)
        builder = "buildah"
    # The tag says what is inside: a chart installed with another image rolls its pods.
    name = f"localhost/dstrain/{target}:{image.strip().removeprefix('sha256:')[:12]}"
    run(builder, "tag", untagged, name)
    return name


def _buildah_build(arguments: list[str], repository: Path) -> str:
    base = base_image()
    with _host_settings() as settings:
        return run(
            *("buildah", "bud", "--quiet", "--layers", "--isolation", "chroot"),
            *("--network", "host", "--build-arg", f"BASE_IMAGE={base}"),
            *settings,
            *arguments,
            repository,
            timeout_s=BUILD_TIMEOUT_S,
        )


@contextmanager
def _host_settings() -> Iterator[list[str]]:
    """Mounts that let pip in a build reach its index as pip on this machine does.

    As mounts, because `--env` would stay in the image.
    """
    settings = {
        key: os.environ[variable]
        for key, variable in {"cert": "PIP_CERT", "index-url": "PIP_INDEX_URL"}.items()
        if os.environ.get(variable)
    }
    if not settings:
        yield []
        return
    with tempfile.NamedTemporaryFile("w", suffix=".conf") as file:
        file.write("\n".join(["[global]", *(f"{k} = {v}" for k, v in settings.items())]) + "\n")
        file.flush()
        mounts = [f"{file.name}:/etc/pip.conf:ro"]
        if certificate := settings.get("cert"):
            mounts.append(f"{certificate}:{certificate}:ro")
        yield [part for mount in mounts for part in ("--volume", mount)]


def base_image() -> str:
    """A Debian with Python in buildah's store, bootstrapped once."""
    key = hashlib.sha256(repr((SUITE, PACKAGES, UNREAD)).encode()).hexdigest()[:8]
    name = f"localhost/dstrain/base:{SUITE}-{key}"
    if name not in _buildah_names():
        _bootstrap(name)
    return name


def _bootstrap(name: str) -> None:
    mirror = debian_mirror()
    log.info("bootstrapping %s from %s", name, mirror)
    with tempfile.TemporaryDirectory() as work:
        root = Path(work) / "root"
        run(
            *("debootstrap", "--variant=minbase", f"--include={','.join(PACKAGES)}"),
            *(SUITE, root, mirror),
            timeout_s=1800,
        )
        for folder in UNREAD:
            shutil.rmtree(root / folder)
            (root / folder).mkdir()
        container = run("buildah", "from", "scratch").strip()
        try:
            run("buildah", "add", "--quiet", container, root, "/", timeout_s=300)
            run("buildah", "commit", "--quiet", container, name, timeout_s=300)
        finally:
            run("buildah", "rm", container)


def debian_mirror() -> str:
    """The mirror of Debian that this machine's apt uses."""
    listed = run(
        *("apt-get", "indextargets", "--format=$(SITE) $(REPO_URI) $(RELEASE) $(COMPONENT)"),
        *("Created-By: Packages", "Origin: Debian"),
    )
    for line in listed.splitlines():
        _, address, release, component = line.split()
        # Not bookworm-security or bookworm-updates, which are incomplete.
        if component == "main" and "-" not in release:
            return address
    raise ClusterError(
        "apt on this machine knows no Debian mirror (`apt-get update` may be needed); "
        "elsewhere than on Debian, build with Docker"
    )


def _buildah_names() -> set[str]:
    listed = json.loads(run("buildah", "images", "--json"))
    return {name for image in listed for name in image.get("names") or []}

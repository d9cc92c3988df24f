"""The Debian packages that the netns provider stands on."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path

from e2e.clusters.shell import ClusterError, run

log = logging.getLogger(__name__)

# Package -> a file it is there for: a program, or a path.
NEEDED = {
    "buildah": "buildah",
    "ca-certificates": "/etc/ssl/certs/ca-certificates.crt",
    "catatonit": "catatonit",
    "conntrack": "conntrack",
    "containerd": "containerd",
    "containernetworking-plugins": "/usr/lib/cni/ptp",
    "debootstrap": "debootstrap",
    "iproute2": "ip",
    "iptables": "iptables",
    "nftables": "nft",
    "openssl": "openssl",
    "procps": "sysctl",
    "runc": "runc",
    "skopeo": "skopeo",
}


def missing() -> list[str]:
    """Packages whose file is not on this machine."""
    return [package for package, file in NEEDED.items() if not _exists(file)]


def ensure() -> None:
    """Install what is missing; ClusterError where that needs another user or another system."""
    packages = missing()
    if not packages:
        return
    command = f"apt-get install {' '.join(packages)}"
    if shutil.which("apt-get") is None:
        raise ClusterError(f"needs the programs of these Debian packages: {' '.join(packages)}")
    if os.geteuid() != 0:
        raise ClusterError(f"packages are missing; as root: {command}")
    log.info("%s", command)
    quiet = {"DEBIAN_FRONTEND": "noninteractive"}
    run("apt-get", "update", timeout_s=600, environment=quiet)
    run(
        *("apt-get", "install", "--yes", "--no-install-recommends", *packages),
        timeout_s=1800,
        environment=quiet,
    )


def download(package: str, folder: Path) -> None:
    """Fetch a package into a folder without installing it; ClusterError where that can't be."""
    if shutil.which("apt-get") is None:
        raise ClusterError(f"needs the Debian package {package}, and here is no apt-get")
    try:
        run("apt-get", "download", package, folder=folder, timeout_s=600)
    except ClusterError:
        if os.geteuid() != 0:
            raise
        # A fresh machine has no package lists.
        run("apt-get", "update", timeout_s=600)
        run("apt-get", "download", package, folder=folder, timeout_s=600)


def _exists(file: str) -> bool:
    return Path(file).exists() if file.startswith("/") else shutil.which(file) is not None

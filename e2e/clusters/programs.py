"""The programs of a Kubernetes cluster, and an S3 server, built from their sources through the Go
module proxy.

Once per set of versions: about ten minutes on two cores with cold caches. A build that is cut
short goes on where it was.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import re
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from e2e.clusters import packages
from e2e.clusters.home import home
from e2e.clusters.shell import ClusterError, run

log = logging.getLogger(__name__)

KUBERNETES = "1.36.3"
HELM = "3.22.0"
# Debian's etcd 3.4 serves Kubernetes 1.36, but many watches keep breaking on it
# ("RequestWatchProgress is disabled").
ETCD = "3.7.3"
COREDNS = "1.15.0"
GO = "1.26.0"

BUILD_TIMEOUT_S = 3600


@dataclass(frozen=True)
class Source:
    """A Go module and the programs built from it."""

    module: str
    version: str
    # Name of the program -> its package.
    packages: dict[str, str]
    # Variables set at link time.
    variables: dict[str, str] = field(default_factory=dict)


def _minor(version: str) -> str:
    return version.split(".")[1]


_COMPONENT = "k8s.io/component-base/version"
SOURCES = (
    Source(
        module="k8s.io/kubernetes",
        version=KUBERNETES,
        packages={
            name: f"k8s.io/kubernetes/cmd/{name}"
            for name in (
                "kube-apiserver",
                "kube-controller-manager",
                "kube-scheduler",
                "kube-proxy",
                "kubelet",
                "kubectl",
            )
        },
        # Without these the API server reports v0.0.0, and clients misbehave.
        variables={
            f"{_COMPONENT}.gitVersion": f"v{KUBERNETES}",
            f"{_COMPONENT}.gitMajor": "1",
            f"{_COMPONENT}.gitMinor": _minor(KUBERNETES),
        },
    ),
    Source(
        module="go.etcd.io/etcd/server/v3",
        version=ETCD,
        packages={"etcd": "go.etcd.io/etcd/server/v3"},
    ),
    Source(
        module="github.com/coredns/coredns",
        version=COREDNS,
        packages={"coredns": "github.com/coredns/coredns"},
    ),
    Source(
        module="helm.sh/helm/v3",
        version=HELM,
        packages={"helm": "helm.sh/helm/v3/cmd/helm"},
        # The Kubernetes that `helm template` and `helm lint` assume.
        variables={
            "helm.sh/helm/v3/internal/version.version": f"v{HELM}",
            "helm.sh/helm/v3/pkg/chartutil.k8sVersionMajor": "1",
            "helm.sh/helm/v3/pkg/chartutil.k8sVersionMinor": _minor(KUBERNETES),
            "helm.sh/helm/v3/pkg/lint/rules.k8sVersionMajor": "1",
            "helm.sh/helm/v3/pkg/lint/rules.k8sVersionMinor": _minor(KUBERNETES),
        },
    ),
)
S3_SERVER = Source(
    module="github.com/versity/versitygw",
    version="1.8.0",
    packages={"versitygw": "github.com/versity/versitygw/cmd/versitygw"},
)
# Taken from Debian's package without installing it, which would start a service.
DEBIAN = {"prometheus": ("prometheus", "promtool")}


def folder() -> Path:
    """Where the programs of these versions are, once `ensure` has returned."""
    sources = repr([(s.module, s.version, s.packages, s.variables) for s in SOURCES])
    key = hashlib.sha256(f"{sources}{DEBIAN}".encode()).hexdigest()[:8]
    return home() / "programs" / f"kubernetes-{KUBERNETES}-{key}"


def ensure() -> Path:
    """Build what is missing; the folder of all programs of a cluster."""

    def fill(target: Path) -> None:
        for package, names in DEBIAN.items():
            if not all((target / name).exists() for name in names):
                _extract(package, names, target)
        for source in SOURCES:
            _build(source, target)

    return _once(folder(), fill)


def ensure_s3_server() -> Path:
    """Build the S3 server unless it is there; the program. It needs no cluster."""
    target = home() / "programs" / f"versitygw-{S3_SERVER.version}"
    return _once(target, lambda partial: _build(S3_SERVER, partial)) / "versitygw"


def _once(complete: Path, fill: Callable[[Path], None]) -> Path:
    """A folder that appears when it is whole, filled by one process at a time."""
    if complete.exists():
        return complete
    complete.parent.mkdir(parents=True, exist_ok=True)
    with Path(f"{complete}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not complete.exists():
            partial = Path(f"{complete}.partial")
            partial.mkdir(exist_ok=True)
            fill(partial)
            partial.rename(complete)
    return complete


def _build(source: Source, target: Path) -> None:
    missing = {name: p for name, p in source.packages.items() if not (target / name).exists()}
    if not missing:
        return
    require_go()
    log.info("building %s of %s %s", ", ".join(missing), source.module, source.version)
    with tempfile.TemporaryDirectory() as work:
        module = Path(work)
        _make_module(source, module)
        flags = " ".join(["-s", "-w", *(f"-X {k}={v}" for k, v in source.variables.items())])
        for name, package in missing.items():
            built = target / f".{name}"
            _go(module, "build", "-trimpath", "-ldflags", flags, "-o", built, package)
            built.rename(target / name)


def _make_module(source: Source, module: Path) -> None:
    """A module that needs the programs: `go install` refuses those whose module has replaces."""
    at = f"{source.module}@v{source.version}"
    _go(module, "mod", "init", "dstrain.test/programs")
    # `get -tool` is of Go 1.24: an older Go fetches this one first.
    _go(module, "mod", "edit", f"-go={GO}", f"-require={at}")
    if source.module == "k8s.io/kubernetes":
        # It names its parts by local path, so each needs a replace to its release v0.x.y.
        download = json.loads(_go(module, "mod", "download", "-json", at))
        parts = re.findall(r"(k8s\.io/\S+) => \./staging/", Path(download["GoMod"]).read_text())
        released = f"v0.{source.version.removeprefix('1.')}"
        _go(module, "mod", "edit", *(f"-replace={p}={p}@{released}" for p in sorted(set(parts))))
    wanted = [f"{p}@v{source.version}" for p in source.packages.values()]
    _go(module, "get", "-tool", *wanted)


def _go(module: Path, *arguments: str | Path) -> str:
    # A program that needs a newer Go than this one names it; Go then fetches that toolchain
    # through the same module proxy.
    environment = {"CGO_ENABLED": "0", "GOTOOLCHAIN": "auto", "GOFLAGS": "-buildvcs=false"}
    return run("go", *arguments, folder=module, timeout_s=BUILD_TIMEOUT_S, environment=environment)


def require_go() -> None:
    """Raise ClusterError unless there is a Go that can fetch newer toolchains (1.21)."""
    if shutil.which("go") is None:
        raise ClusterError("Go is missing: install Go 1.21 or newer (golang.org/dl)")
    version = run("go", "env", "GOVERSION").strip()
    found = re.match(r"go1\.(\d+)", version)
    if found is None or int(found[1]) < 21:
        raise ClusterError(f"{version} is too old to fetch newer toolchains: install Go >= 1.21")


def _extract(package: str, names: tuple[str, ...], target: Path) -> None:
    with tempfile.TemporaryDirectory() as work:
        # apt drops to a user of its own for the download, who must be able to write here.
        Path(work).chmod(0o777)
        packages.download(package, Path(work))
        (archive,) = Path(work).glob("*.deb")
        run("dpkg", "-x", archive, f"{work}/unpacked", timeout_s=120)
        for name in names:
            shutil.copy(f"{work}/unpacked/usr/bin/{name}", target / f".{name}")
            (target / f".{name}").rename(target / name)

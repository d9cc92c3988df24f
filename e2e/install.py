"""Build the images of this checkout, give them to a cluster, and install the chart with helm.

`python -m e2e.install NAME` does it for a local cluster that is up.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from e2e.clusters import images
from e2e.clusters.interface import Cluster
from e2e.clusters.providers import choose
from e2e.clusters.shell import run, wait_until

CHART = Path(__file__).resolve().parent.parent / "charts" / "deepseek-operator"
NAMESPACE = "dstrain-system"
RELEASE = "dstrain"


@dataclass(frozen=True)
class Release:
    """An installed chart."""

    cluster: Cluster
    namespace: str
    name: str

    def pod(self) -> dict[str, Any]:
        """The pod of the operator that leads; there may be none for a moment."""
        found: list[dict[str, Any]] = []

        def leads() -> bool:
            found[:] = self._leaders()
            return bool(found)

        wait_until(leads, "an operator that leads", timeout_s=30)
        return found[0]

    def node(self) -> str:
        """Where the operator that leads is."""
        return str(self.pod()["spec"]["nodeName"])

    def _leaders(self) -> list[dict[str, Any]]:
        """The pod whose name is in the Lease, unless it is being deleted."""
        where = ("-n", self.namespace, "get", "--ignore-not-found", "-o", "json")
        lease = self.cluster.kubectl(*where, "lease", f"{self.name}-deepseek-operator")
        holder = json.loads(lease)["spec"].get("holderIdentity") if lease else ""
        pod = json.loads(self.cluster.kubectl(*where, "pod", holder) or "{}") if holder else {}
        return [pod] if pod and "deletionTimestamp" not in pod["metadata"] else []


def build_and_load(cluster: Cluster) -> dict[str, str]:
    """Image name by Dockerfile target, as the cluster's nodes know it."""
    names = {}
    for target in ("operator", "trainer"):
        names[target] = images.build(target)
        cluster.load_image(names[target])
    return names


def helm(cluster: Cluster, *arguments: str) -> str:
    """Standard output of helm as the cluster's administrator."""
    return run("helm", *arguments, timeout_s=300, environment={**os.environ, **cluster.exports()})


def chart_values(images_by_target: dict[str, str]) -> list[str]:
    """The values that every install of these tests sets: the images."""
    settings: dict[str, str] = {}
    for key, target in (("image", "operator"), ("trainer.image", "trainer")):
        repository, tag = images_by_target[target].rsplit(":", 1)
        settings |= {f"{key}.repository": repository, f"{key}.tag": tag}
    return [part for name, value in settings.items() for part in ("--set", f"{name}={value}")]


def helm_install(cluster: Cluster, images_by_target: dict[str, str], *values: str) -> Release:
    """`helm upgrade --install --wait`, as the README tells a user to; `values` as for helm."""
    arguments = ["upgrade", "--install", RELEASE, str(CHART), "--namespace", NAMESPACE]
    arguments += ["--create-namespace", "--wait", "--timeout", "120s"]
    helm(cluster, *arguments, *chart_values(images_by_target), *values)
    return Release(cluster, NAMESPACE, RELEASE)


def main(name: str) -> None:
    """Install into the local cluster of that name."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    cluster = choose(name)
    if not cluster.is_up():
        sys.exit(f"error: there is no cluster {name}; start it with `make cluster`")
    release = helm_install(cluster, build_and_load(cluster))
    print(f"installed in {release.namespace}; next: kubectl apply -f examples/mini.yaml")


if __name__ == "__main__":
    main(sys.argv[1])

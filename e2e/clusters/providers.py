"""Which provider of clusters this machine has."""

from __future__ import annotations

import shutil

from e2e.clusters.images import docker_answers
from e2e.clusters.interface import Cluster
from e2e.clusters.kind import KindCluster
from e2e.clusters.netns import NetnsCluster

PROVIDERS = ("auto", "kind", "netns")


def choose(name: str, provider: str = "auto") -> Cluster:
    """The cluster of that name; `auto` is kind where Docker answers, network namespaces else."""
    if provider == "auto":
        provider = "kind" if shutil.which("kind") and docker_answers() else "netns"
    if provider == "kind":
        return KindCluster(name)
    if provider == "netns":
        return NetnsCluster(name)
    raise ValueError(f"provider {provider!r}: use one of {', '.join(PROVIDERS)}")

"""A real Kubernetes of several nodes on one Linux machine, without Docker.

Each node is a network namespace with its own containerd, kubelet and kube-proxy; the control plane
runs on the machine's side of a bridge. Needs root.
"""

from e2e.clusters.netns.provider import NetnsCluster

__all__ = ["NetnsCluster"]

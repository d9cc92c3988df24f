"""The same cluster by kind: every node is a Docker container.

Written from kind's and Docker's documentation; not run where it was written, which has no Docker
engine. The continuous integration workflow runs it.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from e2e.clusters.home import home
from e2e.clusters.interface import Cluster
from e2e.clusters.netns import storage
from e2e.clusters.shell import ClusterError, run, wait_until

NETWORK = "kind"
VOLUMES_IN_NODE = Path("/var/dstrain/volumes")


class KindCluster(Cluster):
    """One control plane container, which takes no pods, and one container per node."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self._folder = home() / "kind" / name

    @property
    def kubeconfig(self) -> Path:
        return self._folder / "kubeconfig"

    @property
    def programs(self) -> None:
        return None

    @property
    def _complete(self) -> Path:
        return self._folder / "complete"

    @property
    def host(self) -> str:
        format_ = "{{range .IPAM.Config}}{{println .Gateway}}{{end}}"
        gateways = run("docker", "network", "inspect", NETWORK, "--format", format_).split()
        return next(gateway for gateway in gateways if ":" not in gateway)

    def is_up(self) -> bool:
        return self._complete.exists()

    def up(self, nodes: int) -> None:
        if nodes < 1:
            raise ValueError(f"{nodes} nodes: a cluster has at least 1")
        if self.is_up():
            raise ClusterError(f"cluster {self.name} is up already; take it down first")
        self.down()
        volumes = self._folder / "volumes"
        storage.make_folders(volumes)
        config = self._folder / "kind.json"
        config.write_text(json.dumps(_config(nodes, volumes)))
        run(
            *("kind", "create", "cluster", "--name", self.name, "--config", config),
            *("--kubeconfig", self.kubeconfig, "--wait", "180s"),
            timeout_s=900,
        )
        # kind brings a default class of its own, which cannot give ReadWriteMany.
        self.kubectl("delete", "storageclass", "standard", "--ignore-not-found")
        self.kubectl("create", "-f", "-", stdin=storage.manifests(VOLUMES_IN_NODE))
        self.kubectl(
            "wait", "nodes", "--all", "--for=condition=Ready", "--timeout=180s", timeout_s=190
        )
        self.kubectl(
            *("--namespace", "kube-system", "rollout", "status", "deployment/coredns"),
            "--timeout=180s",
            timeout_s=190,
        )
        self._complete.touch()

    def down(self) -> None:
        self._complete.unlink(missing_ok=True)
        control_plane = f"{self.name}-control-plane"
        if control_plane in run("kind", "get", "nodes", "--name", self.name).split():
            # What pods wrote belongs to their users: the container's root may delete it.
            empty = ("find", VOLUMES_IN_NODE, "-mindepth", "1", "-delete")
            run("docker", "exec", control_plane, *empty)
        run("kind", "delete", "cluster", "--name", self.name, timeout_s=180)
        if self._folder.exists():
            shutil.rmtree(self._folder)

    def load_image(self, image: str | Path) -> None:
        kind_of = "image-archive" if isinstance(image, Path) else "docker-image"
        run("kind", "load", kind_of, image, "--name", self.name, timeout_s=1800)

    def nodes(self) -> list[str]:
        listed = run("kind", "get", "nodes", "--name", self.name).split()
        return sorted(n for n in listed if not n.endswith("-control-plane"))

    def power_off(self, node: str) -> None:
        # The network first: no FIN, RST or last status of a dying process may reach its peers.
        self._unplug(node)
        run("docker", "kill", "--signal=KILL", node)
        wait_until(lambda: not _is_running(node), f"{node} to end", timeout_s=30)

    def power_on(self, node: str) -> None:
        # Plugged in while stopped: the node's own start-up reads its address.
        self._plug_in(node)
        run("docker", "start", node)

    def partition(self, node: str) -> None:
        self._unplug(node)

    def heal(self, node: str) -> None:
        self._plug_in(node)

    def pause_api_server(self) -> None:
        self._signal_api_server("STOP")

    def resume_api_server(self) -> None:
        self._signal_api_server("CONT")
        wait_until(self._answers, "the API server to answer", timeout_s=60)

    def _signal_api_server(self, name: str) -> None:
        command = ("docker", "exec", f"{self.name}-control-plane", "pkill", f"-{name}")
        run(*command, "kube-apiserver")

    def _answers(self) -> bool:
        try:
            return "ok" in self.kubectl("get", "--raw", "/readyz", timeout_s=5)
        except ClusterError:
            return False

    @property
    def _addresses(self) -> Path:
        return self._folder / "addresses"

    def _unplug(self, node: str) -> None:
        """Take the node off the network and remember its address: kubelet keeps to it."""
        self._require(node)
        address = run(
            *("docker", "inspect", node, "--format"),
            f'{{{{(index .NetworkSettings.Networks "{NETWORK}").IPAddress}}}}',
        ).strip()
        self._addresses.mkdir(exist_ok=True)
        (self._addresses / node).write_text(address)
        run("docker", "network", "disconnect", NETWORK, node)

    def _plug_in(self, node: str) -> None:
        self._require(node)
        address = (self._addresses / node).read_text()
        run("docker", "network", "connect", "--ip", address, NETWORK, node)

    def _require(self, node: str) -> None:
        if node not in self.nodes():
            raise ValueError(f"no node {node!r} in {self.name}: {', '.join(self.nodes())}")


def _is_running(container: str) -> bool:
    return run("docker", "inspect", container, "--format={{.State.Running}}").strip() == "true"


def _config(nodes: int, volumes: Path) -> dict[str, object]:
    mount = {"hostPath": str(volumes), "containerPath": str(VOLUMES_IN_NODE)}
    # The controllers' defaults are 50 s and 5 s; with these a silent node is NotReady in 13 s.
    monitor = {"node-monitor-grace-period": "12s", "node-monitor-period": "2s"}
    # kind applies the patch of the version that its Kubernetes uses: v1beta4 from 1.36 on, where
    # the arguments became a list.
    patches = [
        _controller_arguments("v1beta3", monitor),
        _controller_arguments("v1beta4", [{"name": k, "value": v} for k, v in monitor.items()]),
    ]
    control_plane = {
        "role": "control-plane",
        "kubeadmConfigPatches": patches,
        "extraMounts": [mount],
    }
    worker = {"role": "worker", "extraMounts": [mount]}
    return {
        "kind": "Cluster",
        "apiVersion": "kind.x-k8s.io/v1alpha4",
        "nodes": [control_plane, *([worker] * nodes)],
    }


def _controller_arguments(version: str, arguments: object) -> str:
    return json.dumps(
        {
            "apiVersion": f"kubeadm.k8s.io/{version}",
            "kind": "ClusterConfiguration",
            "controllerManager": {"extraArgs": arguments},
        }
    )

"""What a test cluster is, whoever provides it.

The suites speak to a cluster only through this class and through `kubectl` and `helm`, as a user
does. A provider adds what no user has: a power switch and a network cable for every node.
"""

from __future__ import annotations

import os
import shlex
from abc import ABC, abstractmethod
from pathlib import Path

from e2e.clusters.shell import run


class Cluster(ABC):
    """A Kubernetes cluster of several nodes on this machine, found again by its name.

    An object holds no state of its own: two objects with one name, also in two processes, are
    the same cluster.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    @property
    @abstractmethod
    def kubeconfig(self) -> Path:
        """Credentials of a cluster administrator; the file exists while the cluster is up."""

    @property
    @abstractmethod
    def programs(self) -> Path | None:
        """Folder of `kubectl` and `helm` that fit this cluster; None: those on the PATH."""

    @property
    @abstractmethod
    def host(self) -> str:
        """Address at which pods reach what listens there on this machine; while the cluster is
        up."""

    @abstractmethod
    def is_up(self) -> bool:
        """Whether `up` has completed, `down` has not begun, and it still runs."""

    @abstractmethod
    def up(self, nodes: int) -> None:
        """Start the cluster; return when all nodes are Ready, DNS answers and pods may be made.

        Its default storage class `shared` gives ReadWriteMany claims. Remains of an `up` that was
        cut short are removed first. Raises ClusterError if the cluster is up already.
        """

    @abstractmethod
    def down(self) -> None:
        """Stop the cluster and remove everything it made; also after a crash, also twice."""

    @abstractmethod
    def load_image(self, image: str | Path) -> None:
        """Give an image to every node that is powered on, under its own name.

        `image` is the name of an image in the local store of the builder (see `images`), or the
        path of a docker-archive.
        """

    @abstractmethod
    def nodes(self) -> list[str]:
        """Names of all nodes, also of those that are powered off."""

    @abstractmethod
    def power_off(self, node: str) -> None:
        """Cut the power: every process of the node is gone, and its peers see only silence."""

    @abstractmethod
    def power_on(self, node: str) -> None:
        """Boot the node again, with its disk and without its old processes; do not wait for
        Ready."""

    @abstractmethod
    def partition(self, node: str) -> None:
        """Unplug the network cable: the processes of the node go on, unreachable."""

    @abstractmethod
    def heal(self, node: str) -> None:
        """Plug the network cable in again."""

    @abstractmethod
    def pause_api_server(self) -> None:
        """Hold the API server still: connections stay open and nothing is answered."""

    @abstractmethod
    def resume_api_server(self) -> None:
        """Let it go on; return when it answers."""

    def drain(self, node: str, *, timeout_s: float = 120) -> None:
        """Cordon the node and evict its pods, as before maintenance; return when they are gone."""
        self.kubectl(
            "drain",
            node,
            "--ignore-daemonsets",
            "--delete-emptydir-data",
            "--force",
            f"--timeout={timeout_s:.0f}s",
            timeout_s=timeout_s + 10,
        )

    def uncordon(self, node: str) -> None:
        """Let new pods onto a drained node."""
        self.kubectl("uncordon", node)

    def exports(self) -> dict[str, str]:
        """The variables that point a shell at this cluster: KUBECONFIG and PATH."""
        path = os.environ["PATH"]
        if self.programs is not None and str(self.programs) not in path.split(os.pathsep):
            path = f"{self.programs}{os.pathsep}{path}"
        return {"KUBECONFIG": str(self.kubeconfig), "PATH": path}

    def shell_exports(self) -> str:
        """`exports` as lines for a shell's `eval`."""
        return "\n".join(f"export {k}={shlex.quote(v)}" for k, v in self.exports().items())

    def wait_ready(self, node: str) -> None:
        """Wait until Kubernetes calls a node Ready, as after it was switched on."""
        self.kubectl(
            "wait", f"node/{node}", "--for=condition=Ready", "--timeout=90s", timeout_s=100
        )

    def kubectl(self, *arguments: str, stdin: str | None = None, timeout_s: float = 60) -> str:
        """Standard output of `kubectl` as administrator; ClusterError with its words on failure."""
        return run(
            "kubectl", *arguments, stdin=stdin, timeout_s=timeout_s, environment=self.exports()
        )

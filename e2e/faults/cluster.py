"""Faults on a real cluster whose nodes are on this machine (both providers')."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from e2e import install
from e2e.clusters.interface import Cluster
from e2e.faults.drive import Injection, RealTime, Version
from e2e.faults.plan import Fault, Moment
from e2e.faults.processes import ranks
from e2e.faults.recoveries import recovery_s
from e2e.training import Training


@dataclass(frozen=True)
class ClusterStage(RealTime):
    """One training on a cluster, disturbed from outside of everything that it consists of."""

    cluster: Cluster
    training: Training
    operator: install.Release

    def versions(self) -> list[Version]:
        """What `kubectl get --watch` has shown."""
        return [Version(seen.at_s, seen.status) for seen in list(self.training.seen)]

    def node_of(self, slot: int) -> str:
        """Where the slot's running pod is; empty if there is none or its node is off."""
        pod = self._pod(slot)
        return str(pod["spec"]["nodeName"]) if pod else ""

    def pod(self, slot: int) -> str:
        """Name of the slot's running pod; empty if there is none."""
        pod = self._pod(slot)
        return str(pod["metadata"]["name"]) if pod else ""

    def inject(self, fault: Fault) -> float:
        """Raises KubectlError or OSError where it cannot be done."""
        pod = self._pod(fault.slot)
        assert pod is not None, f"no running pod in slot {fault.slot}"
        match fault.kind:
            case "kill-process" | "freeze-process":
                number = signal.SIGKILL if fault.kind == "kill-process" else signal.SIGSTOP
                process = training_process(pod["metadata"]["uid"])
                at_s = time.monotonic()
                os.kill(process, number)
            case "kill-pod":
                process = first_process(pod["metadata"]["uid"])
                at_s = time.monotonic()
                os.kill(process, signal.SIGKILL)
            case "delete-pod":
                at_s = time.monotonic()
                self.training.kubectl("delete", "pod", pod["metadata"]["name"], "--wait=false")
            case "power-off":
                at_s = time.monotonic()
                self.cluster.power_off(pod["spec"]["nodeName"])
            case "partition":
                at_s = time.monotonic()
                self.cluster.partition(pod["spec"]["nodeName"])
            case "kill-operator":
                at_s = time.monotonic()
                self._kill_operator()
        return at_s

    def repair(self, fault: Fault, node: str) -> None:
        """Switch the node on, or plug its network in again."""
        if fault.kind == "power-off":
            self.cluster.power_on(node)
        else:
            self.cluster.heal(node)

    def begun(self) -> Injection:
        """Something that a plan has no kind for goes wrong from now on."""
        fault = Fault(at=Moment(seconds=0), kind="delete-pod")
        return Injection(fault, time.monotonic(), self.versions()[-1].status["generation"])

    def recovered(self, injection: Injection, name: str, timeout_s: float) -> float:
        """Wait for the first new step after a fault; the seconds between."""

        def known() -> float | None:
            return recovery_s(injection, self.versions())

        self.training.wait(f"a new step after {name}", lambda _: known() is not None, timeout_s)
        seconds = known()
        assert seconds is not None
        return seconds

    def slot_away_from_the_operator(self) -> int:
        """A slot whose node may be lost without the operator that leads."""
        leader = self.operator.node()
        slots = range(self.training.manifest["spec"]["workers"]["replicas"])
        return next(slot for slot in slots if self.node_of(slot) not in ("", leader))

    def _pod(self, slot: int) -> dict[str, Any] | None:
        for pod in self.training.live_pods():
            here = pod["metadata"]["labels"]["dstrain.dev/slot"] == str(slot)
            # A pod of a node that is off is shown as it was; its processes are gone.
            if here and pod["status"]["phase"] == "Running" and _processes(pod["metadata"]["uid"]):
                return pod
        return None

    def _kill_operator(self) -> None:
        self.cluster.kubectl(
            "-n", self.operator.namespace, "delete", "pod", "--grace-period=0", "--force",
            self.operator.pod()["metadata"]["name"],
        )  # fmt: skip


def first_process(pod_uid: str) -> int:
    """Process id, on this machine, of torchrun in a pod's container."""
    return _processes(pod_uid)[0]


def training_process(pod_uid: str) -> int:
    """Process id, on this machine, of a pod's first training process."""
    return ranks(_processes(pod_uid))[0]


def _processes(pod_uid: str) -> list[int]:
    """Process ids of a pod's containers, oldest first, without the pause container's."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            cgroup = (folder / "cgroup").read_text()
            command = (folder / "cmdline").read_bytes()
        except OSError:
            continue  # it has just ended
        if pod_uid in cgroup.replace("_", "-") and b"python" in command:
            found.append(int(folder.name))
    return sorted(found)

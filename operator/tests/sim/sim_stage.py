"""Fault plans in the simulated world: the same as on processes and on a cluster, in no time."""

from __future__ import annotations

from typing import Any

from deepseek_operator.kube.port import PODS, TRAININGS, Resource, WatchEvent
from deepseek_operator.local.memory import TERMINAL_PHASES
from dstrain_api.protocol import HANG, ErrorReport
from sim_cluster import exit_status, now
from sim_world import NAMESPACE, World

from e2e.faults.drive import Version
from e2e.faults.plan import Fault

DOWN_TICKS = 4  # until there is an operator again
KILLED = ErrorReport(local_rank=0, exit_code=-9, fingerprint="signal-9")
HANGS = ErrorReport(local_rank=0, exit_code=-9, fingerprint=HANG)


class WorldStage:
    """The one training of a world. Time passes only where somebody waits."""

    def __init__(self, world: World) -> None:
        self.world = world
        self._versions: list[Version] = []
        world.cluster.observe(self._observed)

    def now_s(self) -> float:
        return self.world.now_s

    def wait(self) -> None:
        self.world.tick()

    def versions(self) -> list[Version]:
        """Every write of the status."""
        return self._versions

    def node_of(self, slot: int) -> str:
        """Where the slot's pod trains; empty if it does not."""
        pod = self._pod(slot)
        return str(pod["spec"]["nodeName"]) if pod else ""

    def inject(self, fault: Fault) -> float:
        """Do it."""
        pod = self._pod(fault.slot)
        assert pod is not None, f"no pod trains in slot {fault.slot}"
        uid, agents = pod["metadata"]["uid"], self.world.agents
        match fault.kind:
            case "kill-process":
                agents.fail_worker(uid, KILLED)
            case "freeze-process":  # as its agent tells it when it has found it
                agents.fail_worker(uid, HANGS)
            case "kill-pod":
                agents.end(uid, exit_status(137))
            case "delete-pod":
                now(self.world.cluster.delete(PODS, NAMESPACE, pod["metadata"]["name"], uid=uid))
            case "power-off":
                self.world.kubelets.set_reachable(pod["spec"]["nodeName"], powered=False)
            case "partition":
                self.world.kubelets.set_reachable(pod["spec"]["nodeName"], connected=False)
            case "kill-operator":
                self.world.crash(ticks=DOWN_TICKS)
        return self.world.now_s

    def repair(self, fault: Fault, node: str) -> None:
        """Switch the node on, or plug its network in again."""
        if fault.kind == "power-off":
            self.world.kubelets.set_reachable(node, powered=True)
        else:
            self.world.kubelets.set_reachable(node, connected=True)

    def _pod(self, slot: int) -> dict[str, Any] | None:
        for pod in self.world.cluster.objects(PODS):
            agent = self.world.agents.by_uid.get(pod["metadata"]["uid"])
            trains = agent and agent.state == "running" and not agent.ended and not agent.broken
            here = pod["metadata"]["labels"]["dstrain.dev/slot"] == str(slot)
            leaving = "deletionTimestamp" in pod["metadata"]
            if here and trains and not leaving and pod["status"]["phase"] not in TERMINAL_PHASES:
                return pod
        return None

    def _observed(self, resource: Resource, event: WatchEvent) -> None:
        if resource == TRAININGS and event.object.get("status"):
            self._versions.append(Version(self.world.now_s, event.object["status"]))

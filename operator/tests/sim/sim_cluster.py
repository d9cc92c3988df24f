"""The simulated cluster: nodes, a scheduler, kubelets. The API server is the in-memory one."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, TypeVar

from deepseek_operator.core.clock import rfc3339
from deepseek_operator.kube.port import NODES, PODS, TRAININGS, ClusterError, Refused
from deepseek_operator.local.memory import TERMINAL_PHASES, MemoryCluster

T = TypeVar("T")

NOT_READY_AFTER_S = 20.0  # node-monitor-grace-period is 40 s or more; shorter histories will do
PODS_PER_NODE = 3


def now(coroutine: Coroutine[Any, Any, T]) -> T:
    """The result of a coroutine that never waits."""
    try:
        coroutine.send(None)
    except StopIteration as done:
        return done.value
    raise AssertionError("the in-memory cluster waited")


class Crash(BaseException):
    """The operator's process dies here. Nobody may catch it by accident."""


class Faults:
    """A cluster and a coordinator seen through a process that may die or fail at any write."""

    def __init__(self, cluster: MemoryCluster, members: Callable[[], Any]) -> None:
        self._cluster = cluster
        self._members = members
        self.crash_in: int | None = None  # writes until the process dies
        self.fail_in: int | None = None  # writes until one fails
        self.quota_full = False
        self.on_publish: Callable[[Any, Any], None] = lambda *_: None

    def _step(self, *, to_cluster: bool) -> None:
        if self.crash_in is not None:
            self.crash_in -= 1
            if self.crash_in < 0:
                self.crash_in = None
                raise Crash
        if self.fail_in is not None and to_cluster:
            self.fail_in -= 1
            if self.fail_in < 0:
                self.fail_in = None
                raise ClusterError("the server is away")

    async def create(self, manifest: Any) -> Any:
        self._step(to_cluster=True)
        if self.quota_full and manifest["kind"] == "Pod":
            raise Refused("exceeded quota")
        made = await self._cluster.create(manifest)
        self._after()
        return made

    async def delete(self, *args: Any, **kwargs: Any) -> None:
        self._step(to_cluster=True)
        await self._cluster.delete(*args, **kwargs)
        self._after()

    async def replace_status(self, *args: Any, **kwargs: Any) -> str:
        self._step(to_cluster=True)
        version = await self._cluster.replace_status(*args, **kwargs)
        self._after()
        return version

    def _after(self) -> None:
        """The write is done, and its answer never arrives."""
        if self.crash_in == 0:
            self.crash_in = None
            raise Crash

    def __getattr__(self, name: str) -> Any:
        """What is said to the coordinator counts as a write too."""
        if name not in ("publish", "end", "fence"):
            return getattr(self._members(), name)

        def said(*args: Any) -> None:
            self._step(to_cluster=False)
            if name == "publish":
                self.on_publish(*args)
            getattr(self._members(), name)(*args)

        return said


@dataclass
class Node:
    """A machine. Without power or network nobody hears of it, nor it of anybody."""

    name: str
    powered: bool = True
    connected: bool = True
    away_since_s: float | None = None
    ready: bool = True  # as the API server shows it
    changed_s: float = 0.0  # when that became so
    fault: bool = False
    leaving: bool = False

    @property
    def reachable(self) -> bool:
        return self.powered and self.connected


@dataclass
class Kubelets:
    """Scheduler, node controller and kubelets of all nodes.

    `start` and `stop` tell the simulated agents that their pod's container begins or is told to
    end; `alive` says whether a pod's container still runs.
    """

    cluster: MemoryCluster
    clock: Callable[[], float]
    start: Callable[[dict[str, Any]], None]
    terminate: Callable[[str], None]
    kill: Callable[[str], None]
    exit_of: Callable[[str], dict[str, Any] | None]
    running: Callable[[str], list[str]]
    nodes: dict[str, Node] = field(default_factory=dict)

    def add(self, name: str) -> None:
        self.nodes[name] = Node(name)
        self.cluster.put_node(name)

    def tick(self) -> None:
        for node in self.nodes.values():
            self._judge(node)
        for pod in self.cluster.objects(PODS):
            if "nodeName" not in pod["spec"]:
                self._schedule(pod)
        for node in self.nodes.values():
            if node.reachable:
                self._sync(node)

    def set_reachable(
        self, name: str, *, powered: bool | None = None, connected: bool | None = None
    ) -> None:
        node = self.nodes[name]
        was = node.reachable
        if powered is not None:
            lost = node.powered and not powered
            node.powered = powered  # first: no connection is reset any more
            for uid in self.running(name) if lost else ():
                self.kill(uid)
        if connected is not None:
            node.connected = connected
        if was and not node.reachable:
            node.away_since_s = self.clock()

    def say(self, name: str, *, fault: bool, leaving: bool) -> None:
        """Let a node say that it is broken, or that it is about to go; or that all is well."""
        self.nodes[name].fault, self.nodes[name].leaving = fault, leaving
        self._show(self.nodes[name])

    def _show(self, node: Node) -> None:
        ready = {
            "type": "Ready",
            "status": "True" if node.ready else "Unknown",
            "lastTransitionTime": rfc3339(node.changed_s),
        }
        said = [{"type": "GpuUnhealthy", "status": "True"}] if node.fault else []
        taints = [{"key": "karpenter.sh/disrupted"}] if node.leaving else []

        def change(stored: dict[str, Any]) -> None:
            stored["status"]["conditions"] = [ready, *said]
            stored["spec"]["taints"] = taints

        self.cluster.edit(NODES, "", node.name, change)

    def _judge(self, node: Node) -> None:
        if node.reachable:
            ready = True
        else:
            ready = self.clock() - (node.away_since_s or 0.0) < NOT_READY_AFTER_S and node.ready
        if ready != node.ready:
            node.ready, node.changed_s = ready, self.clock()
            self._show(node)

    def _schedule(self, pod: dict[str, Any]) -> None:
        meta = pod["metadata"]
        required = pod["spec"]["affinity"].get("nodeAffinity", {})
        terms = required.get("requiredDuringSchedulingIgnoredDuringExecution", {})
        away = {
            value
            for term in terms.get("nodeSelectorTerms", ())
            for field_ in term["matchFields"]
            for value in field_["values"]
        }
        load = {name: 0 for name, n in self.nodes.items() if n.ready and name not in away}
        for other in self.cluster.objects(PODS):
            name = other["spec"].get("nodeName")
            if name in load and other["status"]["phase"] not in TERMINAL_PHASES:
                load[name] += 1
        free = [name for name, count in load.items() if count < PODS_PER_NODE]
        if free:
            best = min(free, key=lambda name: (load[name], name))
            self.cluster.bind_pod(meta["namespace"], meta["name"], best)
        elif not pod["status"].get("conditions"):
            said = {
                "type": "PodScheduled",
                "status": "False",
                "reason": "Unschedulable",
                "message": f"0/{len(self.nodes)} nodes are available: node affinity, cpu.",
            }
            self.cluster.set_pod_status(meta["namespace"], meta["name"], {"conditions": [said]})

    def _sync(self, node: Node) -> None:
        mine = [p for p in self.cluster.objects(PODS) if p["spec"].get("nodeName") == node.name]
        known = {p["metadata"]["uid"] for p in mine}
        for uid in self.running(node.name):
            if uid not in known:  # deleted by force while nobody could tell
                self.kill(uid)
        for pod in mine:
            self._sync_pod(pod)

    def _sync_pod(self, pod: dict[str, Any]) -> None:
        meta, phase = pod["metadata"], pod["status"]["phase"]
        where = (meta["namespace"], meta["name"])
        uid = meta["uid"]
        ended = self.exit_of(uid)
        if "deletionTimestamp" in meta:
            if phase == "Pending" or phase in TERMINAL_PHASES or ended is not None:
                self.kill(uid)
                self.cluster.finish_deletion(*where)
            else:
                self.terminate(uid)
        elif phase == "Pending":
            self.cluster.set_pod_status(*where, {"phase": "Running", **_container(running={})})
            self.start(self.cluster.get(PODS, *where))
        elif phase == "Running" and ended is not None:
            self.cluster.set_pod_status(*where, ended)


def exit_status(code: int, *, reason: str = "", why: str = "") -> dict[str, Any]:
    """Pod status of a container that has ended."""
    ended = {"exitCode": code, "reason": why or ("Completed" if code == 0 else "Error")}
    status = {"phase": "Succeeded" if code == 0 else "Failed", **_container(terminated=ended)}
    return {**status, "reason": reason} if reason else status


def evicted_status() -> dict[str, Any]:
    """Pod status after the kubelet has evicted it."""
    return {"phase": "Failed", "reason": "Evicted"}


def _container(**state: Any) -> dict[str, Any]:
    return {"containerStatuses": [{"name": "trainer", "state": state}]}


__all__ = [
    "NODES",
    "TRAININGS",
    "Crash",
    "Faults",
    "Kubelets",
    "evicted_status",
    "exit_status",
    "now",
]

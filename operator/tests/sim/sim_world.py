"""One simulated world: a cluster with its nodes and pods, a user, and an operator that may die.

The plan, the acting, the coordinator, the views and the API server's rules are the real ones.
"""

from __future__ import annotations

from collections import deque
from dataclasses import replace
from itertools import count
from typing import Any

from deepseek_operator.core.model import NodeView, Observed, Plan, PodView, Settings, Training
from deepseek_operator.core.plan import plan
from deepseek_operator.kube.port import (
    NODES,
    PODS,
    TRAININGS,
    ClusterError,
    NotFound,
    Resource,
    WatchEvent,
)
from deepseek_operator.local.memory import MemoryCluster
from deepseek_operator.runtime.act import act
from deepseek_operator.runtime.coordinator import Coordinator
from deepseek_operator.runtime.views import node_view, pod_view, training_view
from sim_agents import Agents
from sim_cluster import Crash, Faults, Kubelets, now

NAMESPACE, NAME = "team", "mini"
TICK_S = 0.5
TURNS_PER_TICK = 2
RESYNC_S = 300.0
HEARTBEAT_TIMEOUT_S = 3.0
SETTINGS = Settings(trainer_image="trainer:1", coordinator_url="http://op:8080")


class Operator:
    """One life of the operator's process: caches filled by a list, then by what is delivered."""

    def __init__(self, world: World) -> None:
        self.coordinator = Coordinator(clock=world.clock)
        self.pending: dict[str, deque[WatchEvent]] = {
            r.plural: deque() for r in (PODS, NODES, TRAININGS)
        }
        self.pods: dict[str, PodView] = {}
        self.nodes: dict[str, NodeView] = {}
        self.training: Training | None = None
        self.refused = ""
        self.written_at_s = 0.0
        self.due_at_s = world.now_s  # when to look next; news makes it now
        self.coordinator.on_transition = lambda _: self.look_at(world.now_s)
        for resource in (PODS, NODES, TRAININGS):
            for stored in world.cluster.objects(resource):
                self._take(resource.plural, WatchEvent("ADDED", stored))

    def look_at(self, at_s: float) -> None:
        """Look at that time, or earlier if that is wanted already."""
        self.due_at_s = min(self.due_at_s, at_s)

    def deliver(self, plural: str, changes: int = 1_000_000) -> None:
        """Let one cache catch up, by so many changes."""
        pending = self.pending[plural]
        for _ in range(min(changes, len(pending))):
            self._take(plural, pending.popleft())
            self.due_at_s = 0.0

    def _take(self, plural: str, event: WatchEvent) -> None:
        gone = event.type == "DELETED"
        uid = event.object["metadata"]["uid"]
        if plural == PODS.plural:
            view = pod_view(event.object)
            if gone:
                self.pods.pop(uid, None)
            elif view:
                self.pods[uid] = view
        elif plural == NODES.plural:
            self.nodes = {**self.nodes, event.object["metadata"]["name"]: node_view(event.object)}
        elif gone:
            if self.training and self.training.uid == uid:
                self.coordinator.retire(uid)
                self.training = None
        else:
            self._take_training(event.object)

    def _take_training(self, stored: dict[str, Any]) -> None:
        known = self.training
        if known and int(known.resource_version) >= int(stored["metadata"]["resourceVersion"]):
            return  # older than what this process has written
        if known and known.uid != stored["metadata"]["uid"]:
            self.coordinator.retire(known.uid)
        self.training = training_view(stored)

    def observe(self) -> Observed:
        assert self.training
        return Observed(
            pods=tuple(self.pods.values()),
            nodes=self.nodes,
            gathering=self.coordinator.snapshot(self.training.uid),
            refused=self.refused,
            token="token",
            status_written_at_s=self.written_at_s,
        )

    def register(self) -> None:
        assert self.training
        self.coordinator.register(
            self.training.uid,
            generation=self.training.status.generation,
            token="token",
            silence_s=HEARTBEAT_TIMEOUT_S,
        )


class World:
    """Everything. `tick` lets some time pass for all of it."""

    def __init__(self, spec: dict[str, Any], *, nodes: int) -> None:
        self.now_s = 1_800_000_000.0
        self._uids = count(1)
        self.cluster = MemoryCluster(clock=self.clock, new_uid=lambda: f"u{next(self._uids)}")
        self.agents = Agents(
            coordinator=lambda: self.operator.coordinator if self.operator else None,
            reachable=lambda node: self.kubelets.nodes[node].reachable,
        )
        self.kubelets = Kubelets(
            self.cluster,
            self.clock,
            self.agents.start,
            self.agents.terminate,
            self.agents.kill,
            self.agents.exit_of,
            self.agents.running,
        )
        for index in range(nodes):
            self.kubelets.add(f"n{index}")
        self.faults = Faults(self.cluster, lambda: self.operator and self.operator.coordinator)
        self.lagging: set[str] = set()
        self.operator: Operator | None = None
        self.down_ticks = 0
        self.cluster.observe(self._changed)
        self.submit(spec)
        self.operator = Operator(self)

    def clock(self) -> float:
        return self.now_s

    def submit(self, spec: dict[str, Any]) -> None:
        manifest = {
            "apiVersion": "dstrain.dev/v1alpha1",
            "kind": "DeepSeekTraining",
            "metadata": {"name": NAME, "namespace": NAMESPACE},
            "spec": spec,
        }
        now(self.cluster.create(manifest))

    @property
    def stored(self) -> dict[str, Any] | None:
        """The training as the API server has it."""
        try:
            return self.cluster.get(TRAININGS, NAMESPACE, NAME)
        except NotFound:
            return None

    def tick(self, passed_s: float = TICK_S) -> None:
        self.now_s += passed_s
        self.kubelets.tick()
        self.agents.tick()
        if self.operator is None:
            self.down_ticks -= 1
            if self.down_ticks <= 0:
                self.operator = Operator(self)
        if self.operator:
            self.operator.coordinator.tick()
        for _ in range(TURNS_PER_TICK):
            if self.operator:
                self._turn(self.operator)

    def _turn(self, operator: Operator) -> None:
        """The operator looks at its caches, if there is news or a time has come."""
        for plural in operator.pending:
            if plural not in self.lagging:
                operator.deliver(plural)
        training = operator.training
        if training is None or self.now_s < operator.due_at_s:
            return
        operator.due_at_s = self.now_s + RESYNC_S
        operator.register()
        decided = plan(training, operator.observe(), SETTINGS, self.now_s)
        try:
            outcome = now(act(decided, training, self.faults, self.faults, at_once=1))  # type: ignore[arg-type]
        except Crash:
            self.crash(ticks=0)
            return
        except ClusterError:
            operator.look_at(self.now_s + TICK_S)
            return
        if decided.requeue_after_s is not None:
            operator.look_at(self.now_s + decided.requeue_after_s)
        if outcome.conflict:
            operator.look_at(self.now_s + TICK_S)
        operator.refused = outcome.refused
        if decided.status and not outcome.conflict:
            operator.written_at_s = self.now_s
            seen = operator.training
            if seen and int(seen.resource_version) < int(outcome.resource_version):
                operator.training = _written(training, decided, outcome.resource_version)

    def crash(self, *, ticks: int) -> None:
        """The operator's process dies: its caches and its coordinator's table are lost."""
        self.operator = None
        self.down_ticks = ticks

    def _changed(self, resource: Resource, event: WatchEvent) -> None:
        if self.operator and resource.plural in self.operator.pending:
            self.operator.pending[resource.plural].append(event)


def _written(training: Training, decided: Plan, version: str) -> Training:
    assert decided.status
    return replace(training, status=decided.status, resource_version=version)

"""What the operator promises, checked at every change of the world and at its end."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

from deepseek_operator.core.model import Membership
from deepseek_operator.core.plan import plan
from deepseek_operator.core.situation import desired_replicas
from deepseek_operator.kube.port import PODS, TRAININGS, Resource, WatchEvent
from deepseek_operator.local.memory import TERMINAL_PHASES
from dstrain_api.constants import LABEL_SLOT
from dstrain_api.status import FREE_CLASSES, DeepSeekTrainingStatus
from sim_world import SETTINGS, World

REST_TICK_S = 2.0
CALM_TICKS = 40  # without a change: longer than any deadline of the plan
REST_TICKS = 400
STILL_TICKS = 8  # longer than the shortest time between two writes of progress


class Promises:
    """Watches a world. `check` and `check_rest` fail with the promise that was broken."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.faults: Counter[str] = Counter()  # that happened, by class
        self.blurred = False  # a cache of pods has lagged: silence came before its reason
        self._broken: list[str] = []
        self._last: dict[str, Any] = {}  # status
        self._published: dict[str, int] = {}  # newest generation by training uid
        world.cluster.observe(self._changed)
        world.agents.accepted = self._accepted
        world.faults.on_publish = self._publishing

    def check(self) -> None:
        """Fail if a promise was broken since the last check."""
        assert not self._broken, "\n".join(self._broken)

    def check_rest(self) -> None:
        """The world runs on without faults, and then stands still."""
        world = self.world
        self._settle()
        self.check()
        world.agents.frozen = True
        for _ in range(STILL_TICKS):
            world.tick(REST_TICK_S)
        versions = world.stored and world.stored["metadata"]["resourceVersion"]
        for _ in range(STILL_TICKS):
            world.tick(REST_TICK_S)
        self.check()
        stored = world.stored
        if stored is None:
            left = [p for p in world.cluster.objects(PODS) if not self._is_away(p)]
            assert not left, "pods of a deleted training are left"
            return
        assert versions == stored["metadata"]["resourceVersion"], "the status is still written"
        self._check_place(stored)
        self._check_silence()

    def _settle(self) -> None:
        calm, shape = 0, None
        for _ in range(REST_TICKS):
            before, shape = shape, self._shape()
            calm = calm + 1 if shape == before else 0
            if calm == CALM_TICKS:
                return
            self.world.tick(REST_TICK_S)
        raise AssertionError(f"it never comes to rest: {shape}")

    def _shape(self) -> Any:
        """All but progress."""
        status = (self.world.stored or {}).get("status") or {}
        lasting = [status.get(k) for k in ("phase", "attempt", "generation", "restarts", "workers")]
        pods = [
            (p["metadata"]["uid"], p["status"]["phase"], "deletionTimestamp" in p["metadata"])
            for p in self.world.cluster.objects(PODS)
        ]
        return lasting, pods

    def _check_silence(self) -> None:
        operator = self.world.operator
        assert operator
        assert operator.training
        decided = plan(operator.training, operator.observe(), SETTINGS, self.world.now_s)
        idle = replace(decided, requeue_after_s=None, stop=False)
        assert not any(vars(idle).values()), f"there is still something to do: {idle}"

    def _check_place(self, stored: dict[str, Any]) -> None:
        operator = self.world.operator
        assert operator
        training = operator.training
        assert training
        assert training.spec
        status, gathering = training.status, operator.coordinator.snapshot(training.uid)
        uid = stored["metadata"]["uid"]
        living = [
            p
            for p in self.world.cluster.objects(PODS)
            if p["status"]["phase"] not in TERMINAL_PHASES
            and not ("deletionTimestamp" in p["metadata"] and self._is_away(p))
        ]
        said = f"{status.phase}: {status.summary.message}"
        if status.phase in ("Complete", "Failed"):
            assert not living, f"{said}, and pods still run"
            self._check_reason(status, training.spec.recovery.budgets.model_dump(by_alias=True))
        elif training.spec.suspend:
            assert status.phase == "Suspended", said
            assert not living, f"{said}, and pods still run"
        else:
            assert status.phase == "Running", said
            desired = desired_replicas(training.spec)
            assert status.workers.ready == status.workers.desired == desired, said
            members = gathering.membership
            assert members
            assert members.generation == status.generation == self._published[uid]
            agents = self.world.agents.by_uid
            for rank, pod_uid in enumerate(members.pod_uids):
                agent = agents[pod_uid]
                assert (agent.state, agent.generation, agent.rank, agent.world) == (
                    "running",
                    status.generation,
                    rank,
                    desired,
                )

    def _is_away(self, pod: dict[str, Any]) -> bool:
        node = self.world.kubelets.nodes.get(pod["spec"].get("nodeName", ""))
        return node is not None and not node.reachable

    def _check_reason(self, status: DeepSeekTrainingStatus, budgets: Any) -> None:
        if status.phase != "Failed":
            return
        reason = next(c.reason for c in status.conditions if c.type == "Failed")
        if reason == "RepeatedError":
            errors = Counter((h.fingerprint, h.from_step) for h in status.history if h.fingerprint)
            assert max(errors.values()) > 1, "failed for an error that came only once"
        elif reason == "NoProgress":
            own = status.restarts.counted - status.restarts.infrastructure
            assert own >= 3, f"no progress in {own} generations of its own fault"
        else:
            spent = [k for k, times in status.failures.items() if len(times) > budgets[k]["max"]]
            assert spent, "failed although no budget is spent"

    def _changed(self, resource: Resource, event: WatchEvent) -> None:
        if resource == PODS and event.type == "ADDED":
            self._check_slot(event.object)
        if resource == TRAININGS and event.type == "MODIFIED":
            self._check_monotonic(event.object)
        if resource == TRAININGS and event.type == "ADDED":
            self._last = {}

    def _check_slot(self, added: dict[str, Any]) -> None:
        owner = added["metadata"]["ownerReferences"][0]["uid"]
        slot = added["metadata"]["labels"][LABEL_SLOT]
        there = [
            p["metadata"]["name"]
            for p in self.world.cluster.objects(PODS)
            if p["metadata"]["ownerReferences"][0]["uid"] == owner
            and p["metadata"]["labels"][LABEL_SLOT] == slot
            and p["status"]["phase"] not in TERMINAL_PHASES
        ]
        if len(there) > 1:
            self._broken.append(f"two living pods in slot {slot}: {there}")

    def _check_monotonic(self, stored: dict[str, Any]) -> None:
        before, after = self._last, stored.get("status") or {}
        self._last = after
        if not before:
            return
        for field in ("attempt", "generation"):
            if after[field] < before[field]:
                self._broken.append(f"{field} went down: {before[field]} to {after[field]}")
        for kind, count in before["restarts"].items():
            if after["restarts"][kind] < count:
                self._broken.append(f"restarts.{kind} went down from {count}")
        for kind, times in before["failures"].items():  # a history is shorter than any window
            if len(after["failures"][kind]) < len(times):
                self._broken.append(f"the budget of {kind} has grown again")
        if before["phase"] in ("Complete", "Failed") and after["phase"] != before["phase"]:
            self._broken.append(f"{before['phase']} became {after['phase']}")
        if not self.blurred:
            self._check_classes(after)

    def _check_classes(self, after: dict[str, Any]) -> None:
        restarts = after["restarts"]
        for kind, count in restarts.items():
            if count and kind != "voluntary" and not self.faults[kind]:
                last = after["history"][-1]
                self._broken.append(f"a failure of class {kind} that never was: {last}")
            if kind in ("application", "numeric", "configuration") and count > self.faults[kind]:
                self._broken.append(f"{self.faults[kind]} faults, counted {restarts}")
        if after["phase"] == "Failed" and not sum(
            count for kind, count in restarts.items() if kind not in FREE_CLASSES
        ):
            self._broken.append("failed by what is free")

    def _publishing(self, uid: str, membership: Membership) -> None:
        operator, stored = self.world.operator, self.world.stored
        assert operator
        if stored and stored["metadata"]["uid"] == uid:
            status = stored["status"]
            if status["generation"] < membership.generation:
                self._broken.append("a generation was published before it was durable")
        if membership.generation <= self._published.get(uid, 0):
            self._broken.append(f"generation {membership.generation} was published again")
        self._published[uid] = membership.generation
        gathering = operator.coordinator.snapshot(uid)
        members = {m.pod_uid: m for m in gathering.members}
        held = []
        for pod_uid in membership.pod_uids:
            member, pod = members.get(pod_uid), operator.pods.get(pod_uid)
            if member is None or member.state != "joining":
                self._broken.append(f"{pod_uid} is published and has not joined")
            if pod is None or pod.deleting or pod.finished or pod.training_uid != uid:
                self._broken.append(f"{pod_uid} is published and does not live")
            elif pod.slot in held:
                self._broken.append(f"slot {pod.slot} is published twice")
            else:
                held.append(pod.slot)
        if held != sorted(held):
            self._broken.append(f"ranks are not in the order of slots: {held}")
        training = operator.training
        assert training
        assert training.spec
        desired = desired_replicas(training.spec)
        elastic = training.spec.elastic
        fewest = min(elastic.min_replicas, desired) if elastic else desired
        if not fewest <= len(held) <= desired:
            self._broken.append(f"a generation of {len(held)}, wanted are {desired}")

    def _accepted(self, uid: str, generation: int, pod_uid: str) -> None:
        if generation < self._published.get(uid, 0):
            self._broken.append(f"generation {generation} could still commit")

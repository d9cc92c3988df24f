"""Random histories of one training: whatever users, nodes, pods and the operator's own process do,
the promises of the operator hold, and once the faults stop it comes to rest where the spec says.

`DSTRAIN_HISTORIES=50000 pytest operator/tests/sim` runs more of them, each run other ones; a
failure prints the steps that lead to it, shortened.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
from deepseek_operator.kube.port import NODES, PODS, TRAININGS
from deepseek_operator.local.memory import TERMINAL_PHASES
from dstrain_api.protocol import HANG, ErrorReport
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from sim_cluster import evicted_status, exit_status, now
from sim_promises import Promises
from sim_world import HEARTBEAT_TIMEOUT_S, NAME, NAMESPACE, World

HISTORIES = int(os.environ.get("DSTRAIN_HISTORIES", "2000"))
NODE_NAMES = ("n0", "n1", "n2")

slots = st.integers(0, 2)
nodes = st.sampled_from(NODE_NAMES)
ticks = st.sampled_from([0, 1, 2, 9, 16])  # that pass after something has happened
errors = st.one_of(
    st.just(ErrorReport(local_rank=0, exit_code=-9, fingerprint="signal-9")),
    st.builds(
        lambda **facts: ErrorReport(local_rank=0, **facts),
        exit_code=st.sampled_from([1, -11]),
        fingerprint=st.sampled_from(["a", "b", "c", HANG]),
        failure_class=st.sampled_from(
            [*["application"] * 4, "outOfMemory", "numeric", "configuration"]
        ),
    ),
)
# How a pod ends by itself: its class, and what its status says then.
ENDS = {
    "error": ("application", exit_status(1)),
    "oom": ("outOfMemory", exit_status(137, why="OOMKilled")),
    "evicted": ("infrastructure", evicted_status()),
    "node shutdown": ("preemption", exit_status(143, reason="Terminated")),
}


class Histories(RuleBasedStateMachine):
    """A training, and everything that may happen to it."""

    world: World
    promises: Promises

    @initialize(
        replicas=st.integers(1, 3),
        elastic=st.sampled_from(["", "5s", "auto", "auto"]),
        own=st.integers(0, 5),
        infrastructure=st.integers(1, 4),
        total_steps=st.sampled_from([10**9, 10**9, 10**9, 10**9, 60]),
        ticks=st.sampled_from([12, 0, 4]),
    )
    def submit(
        self,
        replicas: int,
        elastic: str,
        own: int,
        infrastructure: int,
        total_steps: int,
        ticks: int,
    ) -> None:
        self.spec = _spec(replicas, elastic, own, infrastructure)
        self.world = World(self.spec, nodes=len(NODE_NAMES))
        self.world.agents.total_steps = total_steps
        self.promises = Promises(self.world)
        self._pass(ticks)

    @rule(ticks=st.integers(1, 6))
    def time_passes(self, ticks: int) -> None:
        self._pass(ticks)

    @rule(ticks=st.integers(10, 60))
    def much_time_passes(self, ticks: int) -> None:
        self._pass(ticks)

    # The user.

    @rule(suspend=st.booleans(), after=ticks)
    def suspend_or_resume(self, suspend: bool, after: int) -> None:
        self._edit(lambda t: t["spec"].update(suspend=suspend))
        self._pass(after)

    @rule(replicas=st.integers(1, 3), after=ticks)
    def scale(self, replicas: int, after: int) -> None:
        self._edit(lambda t: t["spec"]["workers"].update(replicas=replicas))
        self._pass(after)

    @rule(value=st.integers(0, 1000))
    def edit_something_else(self, value: int) -> None:
        self._edit(lambda t: t["spec"].update(ttlSecondsAfterFinished=100_000 + value))

    @rule()
    def break_the_spec(self) -> None:
        self._edit(lambda t: t["spec"]["workers"].update(replicas="many"))

    @rule(sure=st.integers(0, 3), again=st.booleans())
    def delete_the_training(self, sure: int, again: bool) -> None:
        stored = self.world.stored
        if stored is None or sure:
            return
        uid = stored["metadata"]["uid"]
        now(self.world.cluster.delete(TRAININGS, NAMESPACE, NAME, uid=uid))
        if again:
            self.world.submit(self.spec)

    @rule(slot=slots, force=st.booleans(), after=ticks)
    def delete_a_pod(self, slot: int, force: bool, after: int) -> None:
        for pod in self._pods(slot):
            grace_s = 0 if force else None
            meta = pod["metadata"]
            now(
                self.world.cluster.delete(
                    PODS, NAMESPACE, meta["name"], uid=meta["uid"], grace_s=grace_s
                )
            )
        self._pass(after)

    # What runs.

    @rule(slot=slots, error=errors, after=ticks)
    def a_worker_process_dies(self, slot: int, error: ErrorReport, after: int) -> None:
        for pod in self._alive(slot):
            if self.world.agents.fail_worker(pod["metadata"]["uid"], error):
                self.promises.faults[error.failure_class] += 1
                self.promises.faults["infrastructure"] += 1  # if only its peers can tell of it
        self._pass(after)

    @rule(slot=slots, how=st.sampled_from(sorted(ENDS)), after=ticks)
    def a_pod_fails(self, slot: int, how: str, after: int) -> None:
        for pod in self._alive(slot):
            kind, status = ENDS[how]
            self.promises.faults[kind] += 1
            self.world.agents.end(pod["metadata"]["uid"], status)
        self._pass(after)

    @rule(slot=slots, after=ticks)
    def a_pod_is_drained(self, slot: int, after: int) -> None:
        for pod in self._pods(slot):
            meta = pod["metadata"]
            said = {
                "type": "DisruptionTarget",
                "status": "True",
                "reason": "EvictionByEvictionAPI",
            }
            kept = [c for c in pod["status"].get("conditions", ()) if c["type"] != said["type"]]
            self.world.cluster.set_pod_status(
                NAMESPACE, meta["name"], {"conditions": [*kept, said]}
            )
            now(self.world.cluster.delete(PODS, NAMESPACE, meta["name"], uid=meta["uid"]))
        self._pass(after)

    # What it runs on.

    @rule(node=nodes, powered=st.booleans(), after=ticks)
    def power(self, node: str, powered: bool, after: int) -> None:
        self.promises.faults["infrastructure"] += 1
        self.world.kubelets.set_reachable(node, powered=powered)
        self._pass(after)

    @rule(node=nodes, connected=st.booleans(), after=ticks)
    def network(self, node: str, connected: bool, after: int) -> None:
        self.promises.faults["infrastructure"] += 1
        self.world.kubelets.set_reachable(node, connected=connected)
        self._pass(after)

    @rule(node=nodes, fault=st.booleans(), leaving=st.booleans(), after=ticks)
    def a_node_says_how_it_is(self, node: str, fault: bool, leaving: bool, after: int) -> None:
        self.promises.faults["infrastructure"] += fault
        self.promises.faults["preemption"] += leaving
        self.world.kubelets.say(node, fault=fault, leaving=leaving)
        self._pass(after)

    # The operator's own troubles.

    @rule(ticks=st.integers(0, 8))
    def the_operator_dies(self, ticks: int) -> None:
        self.world.crash(ticks=ticks)

    @rule(writes=st.integers(0, 8), after=ticks)
    def the_operator_will_die_at_a_write(self, writes: int, after: int) -> None:
        self.world.faults.crash_in = writes
        self._pass(after)

    @rule(writes=st.integers(0, 5))
    def a_write_will_fail(self, writes: int) -> None:
        self.world.faults.fail_in = writes

    @rule(cache=st.sampled_from([PODS.plural, NODES.plural, TRAININGS.plural]))
    def a_cache_lags(self, cache: str) -> None:
        self.world.lagging.add(cache)
        self.promises.blurred |= cache == PODS.plural

    @precondition(lambda self: self.world.lagging and self.world.operator)
    @rule(changes=st.integers(1, 4), after=ticks)
    def a_cache_that_lags_catches_up_a_little(self, changes: int, after: int) -> None:
        assert self.world.operator
        for cache in sorted(self.world.lagging):
            self.world.operator.deliver(cache, changes)
        self._pass(after)

    @precondition(lambda self: self.world.lagging)
    @rule()
    def the_caches_catch_up(self) -> None:
        self.world.lagging.clear()

    @rule(full=st.booleans())
    def quota(self, full: bool) -> None:
        self.world.faults.quota_full = full

    # What always holds.

    @invariant()
    def the_promises_hold(self) -> None:
        if hasattr(self, "promises"):
            self.promises.check()

    def teardown(self) -> None:
        """No fault happens any more, and what is down stays down, but for one node.

        The training comes to rest where its spec says.
        """
        if not hasattr(self, "world"):
            return
        world = self.world
        world.lagging.clear()
        world.faults.crash_in = world.faults.fail_in = None
        world.faults.quota_full = False
        if not any(node.reachable for node in world.kubelets.nodes.values()):
            world.kubelets.set_reachable("n0", powered=True, connected=True)
        stored = world.stored
        if stored and not isinstance(stored["spec"]["workers"]["replicas"], int):
            self._edit(lambda t: t["spec"]["workers"].update(replicas=2))
        self.promises.check_rest()

    def _pass(self, ticks: int) -> None:
        for _ in range(ticks):
            self.world.tick()

    def _edit(self, change: Any) -> None:
        if self.world.stored is not None:
            self.world.cluster.edit(TRAININGS, NAMESPACE, NAME, change)

    def _pods(self, slot: int) -> list[dict[str, Any]]:
        stored = self.world.stored
        uid = stored["metadata"]["uid"] if stored else ""
        return [
            pod
            for pod in self.world.cluster.objects(PODS)
            if pod["metadata"]["labels"]["dstrain.dev/slot"] == str(slot)
            and pod["metadata"]["ownerReferences"][0]["uid"] == uid
            and pod["status"]["phase"] not in TERMINAL_PHASES
        ]

    def _alive(self, slot: int) -> list[dict[str, Any]]:
        agents = self.world.agents.by_uid
        return [p for p in self._pods(slot) if p["metadata"]["uid"] in agents]


def _spec(replicas: int, wait: str, own: int, infrastructure: int) -> dict[str, Any]:
    of_its_own = {"max": own, "window": "1h"}
    spec: dict[str, Any] = {
        "entrypoint": {"module": "program"},
        "workers": {"replicas": replicas},
        "recovery": {
            "heartbeatTimeout": f"{HEARTBEAT_TIMEOUT_S:g}s",
            "budgets": {
                "application": of_its_own,
                "outOfMemory": of_its_own,
                "numeric": of_its_own,
                "infrastructure": {"max": infrastructure, "window": "1h"},
            },
        },
    }
    if wait:
        spec["elastic"] = {
            "minReplicas": 1,
            "maxReplicas": 3,
            "replacementWait": wait,
            "scaleUpSnooze": "5s",
        }
    return spec


@pytest.mark.timeout(max(300, HISTORIES))
def test_every_history_keeps_the_promises_and_comes_to_rest() -> None:
    run_state_machine_as_test(
        Histories,
        settings=settings(
            max_examples=HISTORIES,
            stateful_step_count=25,
            deadline=None,
            derandomize="DSTRAIN_HISTORIES" not in os.environ,
            print_blob=True,
            database=None,
            phases=(Phase.generate, Phase.shrink),
            suppress_health_check=list(HealthCheck),
        ),
    )

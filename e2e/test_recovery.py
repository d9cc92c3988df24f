"""One training through everything that the failure contract names, a fault after the other.

Every test waits for the first new step after its fault, so that the next one meets a training that
runs. Their times are in the report of the run.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterator
from typing import Any

import pytest

from e2e import install
from e2e.clusters.interface import Cluster
from e2e.clusters.shell import wait_until
from e2e.faults.cluster import ClusterStage
from e2e.faults.drive import Injection, injected
from e2e.faults.plan import Fault, Kind, Moment
from e2e.faults.recoveries import SLOW_S, story
from e2e.report import Report
from e2e.soak import WORKERS, manifest
from e2e.training import Seen, Training

PATIENCE_S = 120.0


class Subject:
    """A training that goes on for longer than the tests."""

    def __init__(self, training: Training, operator: install.Release, report: Report) -> None:
        self.training = training
        self.cluster = training.cluster
        self.operator = operator
        self.report = report
        self.stage = ClusterStage(training.cluster, training, operator)

    @property
    def now(self) -> Seen:
        return self.training.seen[-1]

    @property
    def generation(self) -> int:
        return int(self.now.status["generation"])

    @property
    def last(self) -> dict[str, Any]:
        """The newest entry of the history."""
        return dict(self.now.status["history"][-1])

    def restarts(self, kind: str) -> int:
        return int(self.now.status.get("restarts", {}).get(kind, 0))

    def uids(self) -> dict[str, str]:
        """Uid of the living pod in every slot."""
        return {
            p["metadata"]["labels"]["dstrain.dev/slot"]: p["metadata"]["uid"]
            for p in self.training.live_pods()
        }

    def python(self, slot: int, program: str) -> str:
        """What a program says that runs in the slot's pod."""
        return self.training.kubectl("exec", self.stage.pod(slot), "--", "python3", "-c", program)

    def suffer(self, kind: Kind, slot: int, name: str = "") -> float:
        """Inject a fault and wait for the first new step after it; the seconds between."""
        fault = Fault(at=Moment(seconds=0), kind=kind, slot=slot)
        return self.recovered(name or kind, injected(self.stage, fault))

    def recovered(self, name: str, injection: Injection) -> float:
        seconds = self.stage.recovered(injection, name, PATIENCE_S)
        self.report.time(f"recovery: {name}", seconds)
        if seconds > SLOW_S:
            self.report.text(f"why {name} took long", story(injection, self.stage.versions()))
        return seconds

    def await_spare(self) -> None:
        """Until nodes that were lost before may be used again."""

        def spare(seen: Seen) -> bool:
            return all(n["reason"] != "NodeLost" for n in seen.status.get("excludedNodes", []))

        self.training.wait("a spare", spare, PATIENCE_S)

    def steps_on(self, count: int = 20) -> None:
        """Wait for more steps."""
        self.training.wait_step(self.now.step + count, PATIENCE_S)


@pytest.fixture(scope="module")
def subject(cluster: Cluster, operator: install.Release, report: Report) -> Iterator[Subject]:
    namespace = f"recovery-{uuid.uuid4().hex[:6]}"
    cluster.kubectl("create", "namespace", namespace)
    training = Training(cluster, manifest("subject", steps=100_000), namespace)
    training.apply()
    training.wait("a commit", lambda s: bool(s.status.get("checkpoint")), 180)
    yield Subject(training, operator, report)
    training.delete()
    training.close()
    cluster.kubectl("delete", "namespace", namespace, "--wait=false")


def test_a_killed_process_keeps_all_pods(subject: Subject) -> None:
    uids, before = subject.uids(), subject.restarts("application")
    for slot in (1, 0, 2):
        subject.suffer("kill-process", slot)
        assert subject.last["exitCode"] == -9
    assert subject.uids() == uids
    assert subject.restarts("application") == before + 3


def test_a_killed_container_costs_its_own_pod_only(subject: Subject) -> None:
    uids = subject.uids()
    subject.suffer("kill-pod", 1)
    changed = {slot for slot, uid in subject.uids().items() if uids[slot] != uid}
    assert changed == {"1"}


def test_a_deleted_pod_is_replaced_and_costs_no_budget(subject: Subject) -> None:
    budgets = subject.now.status.get("failures")
    subject.suffer("delete-pod", 2)
    assert subject.last["failureClass"] == "voluntary"
    assert subject.now.status.get("failures") == budgets


DAMAGE = """
import os, pathlib
folder = pathlib.Path(os.environ["DSTRAIN_CHECKPOINT_DIR"])
step = (folder / "LATEST").read_text().strip()
shard = max((folder / step).glob("*.distcp"), key=lambda p: p.stat().st_size)
with shard.open("r+b") as file:
    file.seek(shard.stat().st_size // 2)
    byte = file.read(1)[0]
    file.seek(-1, os.SEEK_CUR)
    file.write(bytes([byte ^ 1]))
print(step.removeprefix("step-"))
"""
QUARANTINED = """
import os, pathlib
print(*(p.name for p in pathlib.Path(os.environ["DSTRAIN_CHECKPOINT_DIR"]).glob("*.bad-*")))
"""


def test_a_checkpoint_with_a_flipped_bit_is_put_aside_and_the_one_before_is_used(
    subject: Subject,
) -> None:
    known = subject.now.status["checkpoint"]["step"]
    subject.training.wait(
        "a commit", lambda s: bool(s.status["checkpoint"]["step"] > known), PATIENCE_S
    )
    damaged = int(subject.python(0, DAMAGE))
    subject.suffer("kill-pod", 1, "kill-pod, newest checkpoint damaged")
    assert 0 < subject.last["resumedStep"] < damaged
    assert f"step-{damaged}.bad-1" in subject.python(0, QUARANTINED)


def test_a_frozen_process_is_named_and_its_stack_kept(subject: Subject) -> None:
    pod = subject.stage.pod(1)
    uids = subject.uids()
    subject.suffer("freeze-process", 1)
    assert subject.last["reason"] == "Hang"
    assert subject.last["pod"] == pod
    assert subject.last["stacks"]
    assert subject.uids() == uids


def test_a_blip_of_the_network_costs_nothing(subject: Subject) -> None:
    generation, node = subject.generation, subject.stage.node_of(1)
    subject.cluster.partition(node)
    time.sleep(1.5)  # the blip itself
    subject.cluster.heal(node)
    subject.steps_on()
    assert subject.generation == generation


def test_a_lost_node_is_replaced_elsewhere_and_comes_back_without_harm(subject: Subject) -> None:
    slot = subject.stage.slot_away_from_the_operator()
    node = subject.stage.node_of(slot)
    try:
        subject.suffer("power-off", slot)
        assert (subject.last["reason"], subject.last["node"]) == ("NodeLost", node)
        assert subject.stage.node_of(slot) != node
    finally:
        subject.cluster.power_on(node)
        subject.cluster.wait_ready(node)


def test_a_partitioned_node_finds_its_pods_gone(subject: Subject) -> None:
    slot = subject.stage.slot_away_from_the_operator()
    node, uid = subject.stage.node_of(slot), subject.uids()[str(slot)]
    try:
        subject.suffer("partition", slot)
        generation = subject.generation
    finally:
        subject.cluster.heal(node)
        subject.cluster.wait_ready(node)
    subject.steps_on()
    assert subject.generation == generation, "the old pod ended nothing"
    assert uid not in {p["metadata"]["uid"] for p in subject.training.live_pods()}


def test_two_nodes_at_once_are_one_failure(subject: Subject) -> None:
    nodes = {subject.stage.node_of(slot) for slot in range(WORKERS)}
    away = sorted(nodes - {subject.operator.node()})[:2]
    entries = sum(subject.now.status["restarts"].values())
    injection = subject.stage.begun()
    for node in away:
        subject.cluster.power_off(node)
    subject.recovered("two nodes at once", injection)
    assert sum(subject.now.status["restarts"].values()) == entries + 1
    for node in away:
        subject.cluster.power_on(node)
        subject.cluster.wait_ready(node)


def test_training_does_not_notice_that_the_operator_is_killed(subject: Subject) -> None:
    generation, uids, entries = subject.generation, subject.uids(), subject.now.status["history"]
    before = subject.operator.pod()["metadata"]["name"]
    subject.stage.inject(Fault(at=Moment(seconds=0), kind="kill-operator"))
    wait_until(
        lambda: subject.operator.pod()["metadata"]["name"] != before, "a leader", timeout_s=30
    )
    subject.steps_on()
    assert (subject.generation, subject.uids()) == (generation, uids)
    assert subject.now.status["history"] == entries


def _say_of(cluster: Cluster, node: str, kind: str, value: str, message: str) -> None:
    """Set a condition of a node, as a health check does."""
    condition = {"type": kind, "status": value, "reason": "Test", "message": message}
    patch = json.dumps({"status": {"conditions": [condition]}})
    cluster.kubectl("patch", "node", node, "--subresource=status", "--type=strategic", "-p", patch)


def test_an_api_server_that_is_away_is_not_noticed(subject: Subject) -> None:
    generation, uids, step = subject.generation, subject.uids(), subject.now.step
    subject.cluster.pause_api_server()
    time.sleep(60.0)  # the outage itself
    subject.cluster.resume_api_server()
    subject.training.wait_step(step + 50, PATIENCE_S)
    subject.steps_on()
    assert (subject.generation, subject.uids()) == (generation, uids)


def test_a_drained_node_costs_no_budget(subject: Subject) -> None:
    node, budgets = subject.stage.node_of(2), subject.now.status.get("failures")
    injection = subject.stage.begun()
    subject.cluster.drain(node)
    subject.recovered("drain", injection)
    subject.cluster.uncordon(node)
    assert subject.now.status.get("failures") == budgets
    assert subject.stage.node_of(2) != node


def test_a_node_with_a_bad_gpu_is_left_before_it_crashes(subject: Subject) -> None:
    subject.await_spare()
    node = subject.stage.node_of(1)
    injection = subject.stage.begun()
    _say_of(subject.cluster, node, "GpuUnhealthy", "True", "XID 79: the GPU has fallen off the bus")
    subject.recovered("node condition GpuUnhealthy", injection)
    assert (subject.last["reason"], subject.last["node"]) == ("NodeFault", node)
    assert subject.stage.node_of(1) not in ("", node)
    assert node in {n["name"] for n in subject.now.status["excludedNodes"]}
    _say_of(subject.cluster, node, "GpuUnhealthy", "False", "")


def test_the_node_of_the_leading_operator_and_a_worker_is_lost(subject: Subject) -> None:
    subject.await_spare()
    node = _leading_beside_a_worker(subject)
    injection = subject.stage.begun()
    subject.cluster.power_off(node)
    wait_until(
        lambda: subject.operator.node() != node, "the other replica to lead", timeout_s=PATIENCE_S
    )
    leads_s = time.monotonic() - injection.at_s
    subject.report.time("recovery: the operator's node, another leads", leads_s)
    subject.recovered("the operator's node, and a worker's", injection)
    assert (subject.last["reason"], subject.last["node"]) == ("NodeLost", node)
    subject.cluster.power_on(node)
    subject.cluster.wait_ready(node)
    subject.suffer("kill-process", 0)


def _leading_beside_a_worker(subject: Subject) -> str:
    """Node of the leading replica, once leaders elsewhere were told to stop."""
    at_work = {subject.stage.node_of(slot) for slot in range(WORKERS)}
    idle = [node for node in subject.cluster.nodes() if node not in at_work]
    where = ("-n", subject.operator.namespace)
    subject.cluster.kubectl("cordon", *idle)
    try:
        while (leader := subject.operator.pod())["spec"]["nodeName"] in idle:
            subject.cluster.kubectl(*where, "delete", "pod", leader["metadata"]["name"])
        subject.cluster.kubectl(*where, "rollout", "status", "deployment", "--timeout=60s")
    finally:
        subject.cluster.kubectl("uncordon", *idle)
    return subject.operator.node()

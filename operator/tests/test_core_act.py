"""Carrying out a plan: the order of its steps, and what counts as done already."""

import asyncio
import logging

import pytest
from deepseek_operator.core.model import Event, Membership, Plan, PodDelete, Taint
from deepseek_operator.kube.port import (
    EVENTS,
    NODES,
    PODS,
    TRAININGS,
    ClusterError,
    NotFound,
    Refused,
)
from deepseek_operator.local.memory import MemoryCluster
from deepseek_operator.runtime.act import WRITES_AT_ONCE, act
from deepseek_operator.runtime.views import training_view
from dstrain_api.status import DeepSeekTrainingStatus

TRAINING = {
    "apiVersion": "dstrain.dev/v1alpha1",
    "kind": "DeepSeekTraining",
    "metadata": {"name": "mini", "namespace": "team"},
    "spec": {"entrypoint": {"module": "program"}},
}
MEMBERSHIP = Membership(generation=1, pod_uids=("u",), master_address="10.0.0.1", master_port=1)
STATUS = DeepSeekTrainingStatus(attempt=1, generation=1)
EVENT = Event(type="Normal", reason="Running", message="training on 1 worker", at_s=1.0)


class Recorder(MemoryCluster):
    """Writes down what it is told, and may refuse a kind."""

    def __init__(self):
        super().__init__(clock=lambda: 1_800_000_000.0)
        self.said = []
        self.refuses = {}

    async def create(self, manifest):
        self.said.append(f"create {manifest['kind']}")
        if error := self.refuses.get(manifest["kind"]):
            raise error
        return await super().create(manifest)

    async def delete(self, resource, *args, **kwargs):
        self.said.append(f"delete {resource.kind}")
        await super().delete(resource, *args, **kwargs)

    async def replace_status(self, *args, **kwargs):
        self.said.append("status")
        return await super().replace_status(*args, **kwargs)

    # The coordinator's part.

    def publish(self, uid, membership):
        self.said.append("publish")

    def end(self, uid, generation):
        self.said.append("end")

    def fence(self, uid, pod_uids):
        self.said.append("fence")

    def order_stop(self, uid, stop):
        pass


@pytest.fixture
def cluster():
    made = Recorder()
    asyncio.run(made.create(TRAINING))
    made.said.clear()
    return made


def pod(name="mini-0-1"):
    meta = {"name": name, "namespace": "team"}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": meta, "spec": {}}


class Slow(Recorder):
    """Answers a create of a pod only when it is let, and may fail one."""

    def __init__(self):
        super().__init__()
        self.under_way = self.most = 0
        self.fails = None

    async def create(self, manifest):
        if manifest["kind"] != "Pod":
            return await super().create(manifest)
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        await asyncio.sleep(0.001)
        self.under_way -= 1
        if manifest["metadata"]["name"] == self.fails:
            raise ClusterError("away")
        return await super().create(manifest)


@pytest.fixture
def slow():
    made = Slow()
    asyncio.run(made.create(TRAINING))
    made.said.clear()
    return made


def test_pods_are_made_many_at_once_but_not_all_and_after_what_they_need(slow):
    creates = ({**pod("s"), "kind": "Secret"}, *(pod(f"mini-{i}-1") for i in range(100)))
    outcome = carry_out(slow, creates=creates)
    assert slow.most == WRITES_AT_ONCE
    assert len(outcome.created) == 101
    assert slow.said[0] == "create Secret"


def test_after_a_failure_no_other_pod_is_begun_and_those_under_way_are_made(slow):
    slow.fails = "mini-3-1"
    with pytest.raises(ClusterError):
        carry_out(slow, creates=tuple(pod(f"mini-{i}-1") for i in range(100)))
    assert slow.under_way == 0
    assert WRITES_AT_ONCE <= len(slow.objects(PODS)) < WRITES_AT_ONCE + 5


def carry_out(cluster, **steps):
    training = training_view(cluster.get(TRAININGS, "team", "mini"))
    return asyncio.run(act(Plan(**steps), training, cluster, cluster))


def test_the_status_comes_first_then_the_coordinator_creates_deletes_and_events(cluster):
    carry_out(
        cluster,
        status=STATUS,
        fence=("old",),
        end_generation=1,
        membership=MEMBERSHIP,
        creates=(pod(),),
        deletes=(PodDelete(name="old", uid="old"),),
        events=(EVENT,),
    )
    assert cluster.said == [
        "status",
        "fence",
        "end",
        "publish",
        "create Pod",
        "delete Pod",
        "create Event",
    ]


def test_nothing_is_done_when_the_training_has_changed_meanwhile(cluster):
    training = training_view(cluster.get(TRAININGS, "team", "mini"))
    cluster.edit(TRAININGS, "team", "mini", lambda t: t["spec"].update(suspend=True))
    decided = Plan(status=STATUS, membership=MEMBERSHIP, creates=(pod(),))
    outcome = asyncio.run(act(decided, training, cluster, cluster))
    assert outcome.conflict
    assert cluster.said == ["status"]


def test_a_training_that_is_gone_is_told(cluster):
    training = training_view(cluster.get(TRAININGS, "team", "mini"))
    asyncio.run(cluster.delete(TRAININGS, "team", "mini", uid=training.uid))
    with pytest.raises(NotFound):
        asyncio.run(act(Plan(status=STATUS), training, cluster, cluster))


def test_the_new_version_of_the_training_is_returned(cluster):
    version = carry_out(cluster, status=STATUS).resource_version
    assert version == cluster.get(TRAININGS, "team", "mini")["metadata"]["resourceVersion"]


def test_what_is_there_already_is_made_and_what_is_gone_is_deleted(cluster):
    carry_out(cluster, creates=(pod(),))
    outcome = carry_out(
        cluster, creates=(pod(), pod("mini-1-1")), deletes=(PodDelete(name="x", uid="x"),)
    )
    assert [p["metadata"]["name"] for p in outcome.created] == ["mini-1-1"]
    assert outcome.refused == ""


def test_a_pod_is_deleted_only_with_its_uid(cluster):
    carry_out(cluster, creates=(pod(),))
    carry_out(cluster, deletes=(PodDelete(name="mini-0-1", uid="another"),))
    assert len(cluster.objects(PODS)) == 1


def test_what_is_refused_is_told_and_the_rest_is_made(cluster):
    cluster.refuses["Pod"] = Refused("exceeded quota")
    claim = {**pod("c"), "kind": "PersistentVolumeClaim"}
    outcome = carry_out(cluster, creates=(pod(), claim))
    assert outcome.refused == "Pod mini-0-1: exceeded quota"
    assert [o["kind"] for o in outcome.created] == ["PersistentVolumeClaim"]


def test_a_node_is_tainted_once_and_keeps_its_other_taints(cluster):
    cluster.put_node("n1")
    cluster.edit(NODES, "", "n1", lambda n: n["spec"].update(taints=[{"key": "a"}]))
    for _ in range(2):
        carry_out(cluster, taints=(Taint(node="n1", reason="Hang"),))
    assert cluster.get(NODES, "", "n1")["spec"]["taints"] == [
        {"key": "a"},
        {"key": "dstrain.dev/suspect", "value": "Hang", "effect": "NoSchedule"},
    ]


def test_a_node_that_is_gone_stops_nothing(cluster, caplog):
    with caplog.at_level(logging.WARNING):
        carry_out(cluster, taints=(Taint(node="n1", reason="Hang"),), events=(EVENT,))
    assert "n1 was not tainted" in caplog.text
    assert cluster.objects(EVENTS)


def test_an_event_that_cannot_be_posted_stops_nothing(cluster, caplog):
    cluster.refuses["Event"] = ClusterError("away")
    with caplog.at_level(logging.WARNING):
        carry_out(cluster, events=(EVENT,))
    assert "was not posted" in caplog.text


def test_saying_an_event_again_does_not_post_it_again(cluster):
    carry_out(cluster, events=(EVENT,))
    carry_out(cluster, events=(EVENT,))
    [posted] = cluster.objects(EVENTS)
    assert posted["involvedObject"]["name"] == "mini"
    assert posted["reason"] == "Running"


def test_a_failing_cluster_is_told_to_the_caller(cluster):
    cluster.refuses["Pod"] = ClusterError("away")
    with pytest.raises(ClusterError):
        carry_out(cluster, creates=(pod(),))

"""The cluster in memory keeps the rules of an API server that the operator relies on."""

import asyncio

import pytest
from deepseek_operator.kube.port import (
    NODES,
    PODS,
    SECRETS,
    TRAININGS,
    AlreadyExists,
    Cluster,
    Conflict,
    Gone,
    NotFound,
)
from deepseek_operator.local.memory import MemoryCluster


def pod(name, *, owner="", labels=None):
    owners = [{"uid": owner, "controller": True}] if owner else []
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": name,
            "namespace": "team",
            "labels": labels or {},
            "ownerReferences": owners,
        },
        "spec": {"containers": [{"name": "trainer"}]},
    }


def training(name="mini"):
    return {
        "apiVersion": "dstrain.dev/v1alpha1",
        "kind": "DeepSeekTraining",
        "metadata": {"name": name, "namespace": "team"},
        "spec": {"suspend": False},
        "status": {"attempt": 7},
    }


@pytest.fixture
def cluster():
    return MemoryCluster(clock=lambda: 1_800_000_000.0)


def now(coroutine):
    return asyncio.run(coroutine)


def names(cluster, resource):
    return [o["metadata"]["name"] for o in cluster.objects(resource)]


def test_it_is_a_cluster(cluster: MemoryCluster):
    port: Cluster = cluster
    assert port is cluster


def test_a_second_create_of_a_name_is_refused(cluster):
    now(cluster.create(pod("a")))
    with pytest.raises(AlreadyExists):
        now(cluster.create(pod("a")))


def test_a_create_gives_uid_version_and_pending_phase(cluster):
    made = now(cluster.create(pod("a")))
    assert made["metadata"]["uid"]
    assert made["metadata"]["resourceVersion"] == "1"
    assert made["status"]["phase"] == "Pending"


def test_a_create_does_not_write_the_status_subresource(cluster):
    assert "status" not in now(cluster.create(training()))


def test_a_status_write_needs_the_newest_version(cluster):
    made = now(cluster.create(training()))
    version = made["metadata"]["resourceVersion"]
    now(cluster.replace_status("team", "mini", resource_version=version, status={"attempt": 1}))
    with pytest.raises(Conflict):
        now(cluster.replace_status("team", "mini", resource_version=version, status={"attempt": 2}))


def test_a_status_write_leaves_the_generation_and_an_edit_of_the_spec_raises_it(cluster):
    made = now(cluster.create(training()))
    now(
        cluster.replace_status(
            "team",
            "mini",
            resource_version=made["metadata"]["resourceVersion"],
            status={"attempt": 1},
        )
    )
    assert cluster.get(TRAININGS, "team", "mini")["metadata"]["generation"] == 1
    cluster.edit(TRAININGS, "team", "mini", lambda t: t["spec"].update(suspend=True))
    assert cluster.get(TRAININGS, "team", "mini")["metadata"]["generation"] == 2


def test_an_object_is_replaced_only_at_the_version_that_was_read(cluster):
    now(cluster.create(pod("a")))
    read = now(cluster.read(PODS, "team", "a"))
    after = now(cluster.replace({**read, "spec": {"nodeName": "n1"}}))
    assert cluster.get(PODS, "team", "a")["spec"] == {"nodeName": "n1"}
    assert after["metadata"]["resourceVersion"] > read["metadata"]["resourceVersion"]
    with pytest.raises(Conflict):
        now(cluster.replace(read))


def test_a_delete_with_another_uid_finds_nothing(cluster):
    now(cluster.create(pod("a")))
    with pytest.raises(NotFound):
        now(cluster.delete(PODS, "team", "a", uid="another"))


def test_a_pod_without_a_node_is_gone_at_once(cluster):
    made = now(cluster.create(pod("a")))
    now(cluster.delete(PODS, "team", "a", uid=made["metadata"]["uid"]))
    assert names(cluster, PODS) == []


def test_a_pod_on_a_node_waits_for_its_kubelet(cluster):
    made = now(cluster.create(pod("a")))
    cluster.bind_pod("team", "a", "n1")
    now(cluster.delete(PODS, "team", "a", uid=made["metadata"]["uid"]))
    assert cluster.get(PODS, "team", "a")["metadata"]["deletionGracePeriodSeconds"] == 30
    cluster.finish_deletion("team", "a")
    assert names(cluster, PODS) == []


def test_grace_zero_does_not_wait_for_the_kubelet(cluster):
    made = now(cluster.create(pod("a")))
    cluster.bind_pod("team", "a", "n1")
    now(cluster.delete(PODS, "team", "a", uid=made["metadata"]["uid"], grace_s=0))
    assert names(cluster, PODS) == []


def test_a_finished_pod_is_gone_at_once(cluster):
    made = now(cluster.create(pod("a")))
    cluster.bind_pod("team", "a", "n1")
    cluster.set_pod_status("team", "a", {"phase": "Failed"})
    now(cluster.delete(PODS, "team", "a", uid=made["metadata"]["uid"]))
    assert names(cluster, PODS) == []


def test_what_a_training_owns_goes_with_it(cluster):
    uid = now(cluster.create(training()))["metadata"]["uid"]
    now(cluster.create(pod("a", owner=uid)))
    now(cluster.create(pod("running", owner=uid)))
    cluster.bind_pod("team", "running", "n1")
    secret = {**pod("token", owner=uid), "kind": "Secret"}
    now(cluster.create(secret))
    now(cluster.delete(TRAININGS, "team", "mini", uid=uid))
    assert names(cluster, PODS) == ["running"]
    assert "deletionTimestamp" in cluster.get(PODS, "team", "running")["metadata"]
    assert names(cluster, SECRETS) == []


def test_a_child_of_an_owner_that_is_gone_is_collected(cluster):
    now(cluster.create(pod("a", owner="gone")))
    assert names(cluster, PODS) == []


def test_a_list_comes_in_pages_and_selects_by_namespace_and_labels():
    cluster = MemoryCluster(clock=lambda: 0.0, page_size=2)

    async def pages():
        for name in "abc":
            await cluster.create(pod(name, labels={"app": "x"}))
        await cluster.create(pod("other"))
        found = cluster.list_pages(PODS, namespace="team", label_selector="app=x")
        return [[o["metadata"]["name"] for o in page.items] async for page in found]

    assert now(pages()) == [["a", "b"], ["c"]]


def test_a_watch_replays_what_came_after_its_version_and_then_follows(cluster):
    async def seen():
        await cluster.create(pod("old"))
        await cluster.create(pod("a"))
        found = []
        async for event in cluster.watch(PODS, resource_version="1"):
            found.append((event.type, event.object["metadata"]["name"]))
            if len(found) == 1:
                cluster.put_node("n1")
                await cluster.create(pod("b"))
                cluster.finish_deletion("team", "b")
            if len(found) == 3:
                cluster.disconnect()
        return found

    assert now(seen()) == [("ADDED", "a"), ("ADDED", "b"), ("DELETED", "b")]


def test_a_watch_from_before_the_history_is_gone(cluster):
    async def watch():
        await cluster.create(pod("a"))
        cluster.forget_history()
        async for _ in cluster.watch(PODS, resource_version="0"):
            pass

    with pytest.raises(Gone):
        now(watch())


def test_an_observer_hears_of_each_change_at_once(cluster):
    heard = []
    cluster.observe(lambda resource, event: heard.append((resource, event.type)))
    cluster.put_node("n1")
    cluster.put_node("n1", ready=False)
    assert heard == [(NODES, "ADDED"), (NODES, "MODIFIED")]

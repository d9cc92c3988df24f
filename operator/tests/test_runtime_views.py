"""What the views make of objects as an API server stores them."""

from __future__ import annotations

from typing import Any

import pytest
from deepseek_operator.core.clock import seconds
from deepseek_operator.runtime.views import node_view, pod_view, training_view


def training(**changes: Any) -> dict[str, Any]:
    return {
        "apiVersion": "dstrain.dev/v1alpha1",
        "kind": "DeepSeekTraining",
        "metadata": {
            "namespace": "team",
            "name": "mini",
            "uid": "u1",
            "resourceVersion": "7",
            "generation": 2,
            "creationTimestamp": "2026-11-21T12:00:00Z",
        },
        "spec": {
            "model": {"preset": "mini"},
            "data": {"sources": [{"uri": "builtin://mini"}]},
            "training": {"total": {"tokens": 1_000_000}},
            "workers": {"replicas": 2},
        },
        **changes,
    }


def pod(**status: Any) -> dict[str, Any]:
    return {
        "metadata": {
            "namespace": "team",
            "name": "mini-1-3",
            "uid": "p1",
            "creationTimestamp": "2026-11-21T12:00:00Z",
            "labels": {
                "dstrain.dev/training": "mini",
                "dstrain.dev/slot": "1",
                "dstrain.dev/attempt": "3",
            },
            "ownerReferences": [{"kind": "DeepSeekTraining", "uid": "u1", "controller": True}],
        },
        "spec": {"nodeName": "node-1"},
        "status": {"phase": "Running", **status},
    }


def test_training_with_its_defaults() -> None:
    view = training_view(training())
    assert (view.key.namespace, view.key.name, view.resource_version) == ("team", "mini", "7")
    assert view.created_at_s == 1795262400.0
    assert view.spec is not None
    assert view.spec.workers.replicas == 2
    assert view.status.attempt == 0
    assert not view.deleting


def test_invalid_spec_says_what_to_change_and_where() -> None:
    stored = training()
    stored["spec"]["workers"]["replicas"] = 0
    view = training_view(stored)
    assert view.spec is None
    assert "replicas" in view.spec_error


def test_fields_of_a_later_version_are_ignored_in_spec_and_status() -> None:
    stored = training(status={"attempt": 3, "later": {"x": 1}})
    stored["spec"]["later"] = 1
    stored["spec"]["workers"]["laterToo"] = 1
    view = training_view(stored)
    assert view.spec_error == ""
    assert view.spec is not None
    assert view.status.attempt == 3


def test_unreadable_status_is_an_error_because_its_facts_must_not_be_lost() -> None:
    with pytest.raises(ValueError, match="team/mini"):
        training_view(training(status={"attempt": "three"}))


def test_pod() -> None:
    view = pod_view(pod())
    assert view is not None
    assert (view.slot, view.attempt, view.node, view.training_uid) == (1, 3, "node-1", "u1")
    assert not view.finished


def test_pod_that_no_training_made_is_none_of_ours() -> None:
    stranger = pod()
    stranger["metadata"]["ownerReferences"] = []
    assert pod_view(stranger) is None
    unlabelled = pod()
    del unlabelled["metadata"]["labels"]["dstrain.dev/slot"]
    assert pod_view(unlabelled) is None


def test_pod_that_was_out_of_memory() -> None:
    ended = {"exitCode": 137, "reason": "OOMKilled", "message": "killed"}
    view = pod_view(
        pod(
            phase="Failed",
            containerStatuses=[
                {"name": "sidecar", "state": {"running": {}}},
                {"name": "trainer", "state": {"terminated": ended}},
            ],
        )
    )
    assert view is not None
    assert view.finished
    assert (view.container.exit_code, view.container.terminated_reason) == (137, "OOMKilled")


def test_pod_with_what_tells_why_it_ended() -> None:
    stored = pod(
        phase="Failed",
        reason="Evicted",
        message="The node was low on resource: memory.",
        conditions=[
            {
                "type": "PodScheduled",
                "status": "True",
                "lastTransitionTime": "2026-11-21T12:00:05Z",
            }
        ],
    )
    limits = {"limits": {"memory": "2Gi"}}
    stored["spec"]["containers"] = [{"name": "sidecar"}, {"name": "trainer", "resources": limits}]
    view = pod_view(stored)
    assert view is not None
    assert (view.reason, view.message) == ("Evicted", "The node was low on resource: memory.")
    assert view.memory_limit == "2Gi"
    assert view.scheduled_at_s - view.created_at_s == 5


def test_pod_that_waits_for_its_image() -> None:
    waiting = {"reason": "ImagePullBackOff", "message": "no such image"}
    statuses = [{"name": "trainer", "state": {"waiting": waiting}}]
    view = pod_view(pod(phase="Pending", containerStatuses=statuses))
    assert view is not None
    assert view.container.waiting_reason == "ImagePullBackOff"
    assert not view.container.running


def test_pod_that_cannot_be_scheduled_or_was_disrupted() -> None:
    view = pod_view(
        pod(
            phase="Pending",
            conditions=[
                {
                    "type": "PodScheduled",
                    "status": "False",
                    "reason": "Unschedulable",
                    "message": "0/3 nodes are available",
                },
                {"type": "DisruptionTarget", "status": "True", "reason": "EvictionByEvictionAPI"},
            ],
        )
    )
    assert view is not None
    assert view.unschedulable == "0/3 nodes are available"
    assert view.disrupted == "EvictionByEvictionAPI"


@pytest.mark.parametrize(
    ("status", "ready"), [("True", True), ("False", False), ("Unknown", False), (None, False)]
)
def test_node_is_ready_only_when_it_says_so(status: str | None, ready: bool) -> None:
    conditions = [{"type": "Ready", "status": status}] if status else []
    assert (
        node_view({"metadata": {"name": "n"}, "status": {"conditions": conditions}}).ready is ready
    )


def test_node_says_what_is_broken_that_it_leaves_and_that_it_is_off() -> None:
    came = {"lastTransitionTime": "2026-01-01T00:00:07Z"}
    ready = {"type": "Ready", "status": "True", **came}
    xid = {"type": "SysLogsXIDError", "status": "True", "message": "[79] fell off the bus"}

    def view(conditions: list[Any], *keys: str) -> Any:
        taints = [{"key": key, "effect": "NoSchedule"} for key in keys]
        return node_view(
            {
                "metadata": {"name": "n"},
                "spec": {"taints": taints},
                "status": {"conditions": conditions},
            }
        )

    assert view([ready, xid]).fault == "SysLogsXIDError: [79] fell off the bus"
    assert view([ready], "cloud.google.com/impending-node-termination").leaving
    assert not view([ready], "node.kubernetes.io/out-of-service").ready
    assert view([ready]).ready
    assert view([ready]).ready_since_s == seconds("2026-01-01T00:00:07Z")

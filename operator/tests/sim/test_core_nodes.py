"""Which nodes workers avoid, when they leave one, and when they use it all the same."""

from dataclasses import replace

import pytest
from deepseek_operator.core.clock import seconds
from deepseek_operator.core.evidence import Failure
from deepseek_operator.core.model import NodeView, Observed, Taint
from deepseek_operator.core.nodes import blame
from deepseek_operator.core.situation import survey
from dstrain_api.protocol import HANG, PREFLIGHT
from plan_case import NOW_S, SETTINGS, Case, deleted, made

BUDGETS = {
    "infrastructure": {"max": 100, "window": "24h"},
    "application": {"max": 100, "window": "1h"},
}


def case(replicas=2):
    made_here = Case(replicas=replicas, recovery={"budgets": BUDGETS, "heartbeatTimeout": "5s"})
    return made_here.running(*range(replicas))


def crash(training, slot=1, after_s=0.0, **error):
    """A worker of that slot crashes in the next generation."""
    training.now_s += after_s
    generation = training.status.generation + 1
    slots = sorted(training.pods)
    training.running(*slots, generation=generation).knows(errors=())
    training.error(slot, **{"exit_code": -11, "fingerprint": f"f{generation}", **error})
    training.status = training.plan().status
    training.knows(membership=None)
    return training


def avoided(training):
    return [n.name for n in training.status.excluded_nodes]


def faulty(training, name="n1", **facts):
    training.nodes[name] = NodeView(name=name, ready=True, **{"fault": "GpuUnhealthy", **facts})
    return training


@pytest.mark.parametrize("error", [{}, {"exit_code": -9, "fingerprint": HANG}])
def test_a_node_where_workers_crash_twice_within_an_hour_is_avoided(error):
    training = crash(case(), **error)
    assert avoided(training) == []
    crash(training, after_s=3590, **error)
    [node] = training.status.excluded_nodes
    assert node.name == "n1"
    assert "1.5 failures within an hour point at it" in node.reason
    assert seconds(node.until) - training.now_s == pytest.approx(3600, abs=20)


def test_crashes_further_apart_are_chance():
    assert avoided(crash(crash(case()), after_s=3700)) == []


def test_crashes_on_different_nodes_are_chance():
    assert avoided(crash(crash(case(), slot=0), slot=1)) == []


@pytest.mark.parametrize(
    "error",
    [
        pytest.param({"exit_code": -9}, id="killed from outside"),
        pytest.param({"exit_code": 1}, id="an exception"),
        pytest.param({"exit_code": -11, "failure_class": "outOfMemory"}, id="out of memory"),
    ],
)
def test_what_says_nothing_of_the_node_is_not_held_against_it(error):
    training = case()
    for _ in range(2):
        crash(training, **error)
    assert training.status.nodes == []


def test_the_event_names_the_node_and_why():
    training = crash(case())
    training.now_s += 60
    training.running(0, 1, generation=3).knows(errors=()).error(1, -11, fingerprint="f3")
    [event] = [e for e in training.plan().events if e.reason == "NodeExcluded"]
    assert "avoid node n1: ProcessKilled" in event.message


def test_workers_leave_a_node_that_has_become_one_to_avoid_without_another_failure():
    training = crash(crash(case()), after_s=60)
    counted = training.status.restarts.counted
    training.joining(0, 1)
    decided = training.plan()
    assert deleted(decided) == [("mini-1-1", None)]
    training.status = decided.status or training.status
    assert training.status.restarts.counted == counted


def test_a_node_is_tainted_only_where_that_is_asked_for_and_only_for_what_happened_there():
    training = crash(case())
    training.now_s += 60
    training.running(0, 1, generation=3).knows(errors=()).error(1, -11, fingerprint="f3")
    assert training.plan().taints == ()
    training.settings = replace(SETTINGS, taint_nodes=True)
    assert training.plan().taints == (Taint(node="n1", reason="ProcessKilled"),)
    training.status = training.plan().status
    assert training.plan().taints == ()
    lost = case().silent(1)
    lost.settings = training.settings
    assert lost.plan().taints == ()


def test_pods_that_find_no_other_node_tolerate_the_taint():
    training = faulty(case()).written()
    training.settings = replace(SETTINGS, taint_nodes=True)
    training = unschedulable(training, why="1 node(s) had untolerated taint(s) dstrain.dev/suspect")
    assert tolerated(training) == ["n1"]
    training.status = training.plan().status
    del training.pods[1]
    pod = training.plan().creates[-1]
    assert {"key": "dstrain.dev/suspect", "operator": "Exists"} in pod["spec"]["tolerations"]


def test_the_memory_of_nodes_is_bounded_and_fades():
    training = case()
    for index in range(40):
        failure = Failure(
            failure_class="application", reason="x", message="", node=f"x{index}", exit_code=-11
        )
        s = survey(training.training(), training.training().spec, _seen(training), SETTINGS, NOW_S)
        training.status = training.status.model_copy(update={"nodes": blame(s, failure)})
    assert len(training.status.nodes) == 32
    training.now_s += 4 * 3600
    crash(training)
    assert [r.name for r in training.status.nodes] == ["n1"]


def _seen(training):
    return Observed(pods=tuple(training.pods.values()), nodes=training.nodes)


def test_a_worker_leaves_a_node_whose_gpu_is_broken_before_it_crashes():
    training = faulty(case(), fault="SysLogsXIDError: [79] GPU has fallen off the bus")
    decided = training.plan()
    assert deleted(decided) == [("mini-1-1", None)]
    assert decided.end_generation is None  # it ends when the worker has saved and gone
    entry = decided.status.history[-1]
    assert (entry.failure_class, entry.reason, entry.node) == ("infrastructure", "NodeFault", "n1")
    assert "[79] GPU has fallen off the bus" in entry.message
    training.status = decided.status
    again = training.plan()  # a cache that lags does not show yet that the pod ends
    assert (again.status, deleted(again)) == (None, [("mini-1-1", None)])
    training.change_pod(1, deleting=True)
    assert training.plan().deletes == ()
    del training.members[training.pods.pop(1).uid]
    later = training.plan()
    assert made(later) == ["mini-1-1"]
    assert later.creates[-1]["metadata"]["annotations"] == {"dstrain.dev/excluded-nodes": "n1"}


def test_a_node_that_is_about_to_go_is_left_and_nobody_is_to_blame():
    training = faulty(case(), fault="", leaving="karpenter.sh/disrupted")
    after = training.plan().status
    assert (after.history[-1].failure_class, after.restarts.counted) == ("preemption", 0)


def test_all_workers_on_broken_nodes_leave_together_as_one_failure():
    training = faulty(faulty(case(replicas=3), "n1"), "n2")
    decided = training.plan()
    assert [name for name, _ in deleted(decided)] == ["mini-1-1", "mini-2-1"]
    assert decided.status.restarts.infrastructure == 1


def test_new_pods_avoid_broken_nodes_of_which_nothing_is_remembered():
    training = faulty(Case(), "n3")
    assert training.plan().creates[-1]["metadata"]["annotations"] == {
        "dstrain.dev/excluded-nodes": "n3"
    }


def unschedulable(training, excluded=("n1",), age_s=20.0, why="1 node(s) didn't match affinity"):
    """The worker that left n1 finds no other node."""
    training.started(1, attempt=2)
    training.members.pop("u1-1", None)
    facts = {"node": "", "phase": "Pending", "unschedulable": why, "excluded_nodes": excluded}
    return training.change_pod(1, created_at_s=training.now_s - age_s, **facts)


def tolerated(training):
    after = training.plan().status or training.status
    return [r.name for r in after.nodes if r.tolerated]


def test_a_bad_node_is_used_again_when_there_is_no_other():
    training = faulty(case()).written()
    assert tolerated(unschedulable(training, age_s=5.0)) == []
    assert training.plan().requeue_after_s == pytest.approx(5.0)
    training = unschedulable(training)
    assert tolerated(training) == ["n1"]
    decided = training.plan()
    assert decided.status.excluded_nodes == []
    training.status = decided.status
    assert deleted(training.plan()) == [("mini-1-2", None)]
    training.started(1, attempt=2)
    assert training.plan().deletes == ()


def test_the_mildest_of_several_bad_nodes_is_used_again():
    training = faulty(crash(crash(case()), after_s=60), "n0")
    training = unschedulable(training, excluded=("n0", "n1"))
    assert tolerated(training) == ["n1"]
    training.status = training.plan().status
    assert deleted(training.plan()) == [("mini-1-2", None)]
    assert tolerated(training) == ["n1"], "the other only if that does not help"


def test_every_node_of_one_failure_is_avoided():
    training = case(replicas=3).silent(1).silent(2).written()
    assert avoided(training) == ["n1", "n2"]
    assert [entry.node for entry in training.status.history] == ["n1"]


def test_a_node_that_is_noticed_a_moment_after_another_is_avoided_and_costs_nothing_more():
    training = case(replicas=3).silent(1).written()
    del training.members[training.pods.pop(1).uid]
    training.started(1, attempt=2).joining(0).knows(membership=None).silent(2)
    decided = training.plan()
    assert deleted(decided) == [("mini-2-1", 0)]
    assert [e.message for e in decided.events] == ["new worker pods avoid node n2: NodeLost"]
    training.written()
    assert avoided(training) == ["n1", "n2"]
    assert training.status.restarts.counted == 1
    again = training.plan()  # a cache that lags still shows the pod
    assert (again.status, deleted(again)) == (None, [("mini-2-1", 0)])


def test_a_lost_node_is_not_tolerated():
    training = case().silent(1).written()
    assert tolerated(unschedulable(training)) == []


def test_a_lost_node_that_has_come_back_is_used_when_there_is_no_other():
    training = case().silent(1).written()
    unschedulable(training)
    training.nodes["n1"] = replace(training.nodes["n1"], ready=False)
    assert tolerated(training) == []
    training.nodes["n1"] = NodeView(name="n1", ready=True, ready_since_s=training.now_s + 5)
    training.now_s += 6
    assert tolerated(training) == ["n1"]


def test_a_node_that_was_lost_long_ago_and_is_about_to_go_is_used_when_there_is_no_other():
    training = case().silent(1).written()
    del training.members[training.pods.pop(1).uid]
    training.now_s += 61
    faulty(training, fault="", leaving="karpenter.sh/disrupted")
    training.status = training.plan().status
    assert tolerated(unschedulable(training)) == ["n1"]


def test_a_pod_that_is_too_large_for_every_node_frees_no_bad_one():
    training = faulty(case()).written()
    training = unschedulable(training, why="0/3 nodes are available: 3 Insufficient cpu")
    assert tolerated(training) == []


def test_a_lost_node_may_go_again_when_it_is_ready_and_a_while_has_passed():
    training = case().silent(1).written()
    assert avoided(training) == ["n1"]
    del training.members[training.pods.pop(1).uid]
    training.now_s += 61
    assert training.plan().creates[-1]["metadata"]["annotations"] == {}
    training.nodes["n1"] = replace(training.nodes["n1"], ready=False)
    assert training.plan().creates[-1]["metadata"]["annotations"] != {}


FAILED_CHECK = {
    "exit_code": 1,
    "fingerprint": PREFLIGHT,
    "message": "Traceback\ndeepseek_trainer.preflight.check.PreflightFailed: products took 9 ms",
}


def test_a_node_that_fails_the_check_before_training_is_left_at_once():
    training = crash(case(), **FAILED_CHECK)
    [entry] = training.status.history
    assert (entry.failure_class, entry.reason) == ("infrastructure", "PreflightFailed")
    assert entry.message.endswith(
        "mini-1-1: node n1 failed the check before training: products took 9 ms"
    )
    assert avoided(training) == ["n1"]
    training.joining(0, 1)
    assert deleted(training.plan()) == [("mini-1-1", None)]


def test_a_failed_check_without_words_is_one_all_the_same():
    training = crash(case(), **{**FAILED_CHECK, "message": ""})
    assert avoided(training) == ["n1"]

"""What the plan does about failures: class, count, replacement, budget."""

import pytest
from deepseek_operator.core.model import ContainerView, NodeView
from dstrain_api.constants import EXIT_RESTART
from plan_case import Case, deleted, made


def test_a_failed_pod_is_counted_and_replaced_under_a_new_attempt_while_others_stay():
    decided = Case().running(0, 1).fails(1, exit_code=3).plan()
    assert decided.status.attempt == 2
    assert decided.status.restarts.application == 1
    assert made(decided) == ["mini-1-2"]
    assert decided.end_generation == 1
    assert deleted(decided) == []


def test_a_failure_is_counted_once_although_its_pod_stays_for_its_logs():
    case = Case().running(0, 1).fails(1).written()
    decided = case.plan()  # the new pod does not show yet
    assert made(decided) == ["mini-1-2"]
    assert decided.status is None or decided.status.restarts.application == 1


def test_pods_that_fail_together_are_one_failure():
    after = Case().running(0, 1).fails(0).fails(1).plan().status
    assert (after.restarts.application, len(after.history)) == (1, 1)


def test_a_silent_member_is_fenced_force_deleted_and_replaced_when_it_is_gone():
    case = Case().running(0, 1).silent(1)
    decided = case.plan()
    assert decided.fence == ("u1-1",)
    assert deleted(decided) == [("mini-1-1", 0)]
    assert decided.end_generation == 1
    assert made(decided) == []
    [entry] = decided.status.history
    assert (entry.reason, entry.node, entry.failure_class) == ("NodeLost", "n1", "infrastructure")
    case.status = decided.status
    del case.pods[1]
    assert made(case.plan()) == ["mini-1-2"]


def test_no_new_attempt_while_a_cache_may_hide_a_pod_of_this_one():
    case = Case(replicas=3).running(0, 1, 2).silent(0)
    del case.pods[1]
    decided = case.plan()
    assert made(decided) == ["mini-1-1"]
    assert decided.status.attempt == 1


def test_a_lost_node_is_avoided_by_new_pods_until_it_is_ready_and_a_while_has_passed():
    case = Case().running(0, 1).silent(1).written()
    del case.pods[1]
    assert case.plan().creates[-1]["metadata"]["annotations"] == {
        "dstrain.dev/excluded-nodes": "n1"
    }
    case.now_s += 61
    assert case.plan().creates[-1]["metadata"]["annotations"] == {}
    case.nodes["n1"] = NodeView(name="n1", ready=False)
    assert case.plan().creates[-1]["metadata"]["annotations"] != {}


def test_a_pod_that_finds_no_node_because_it_avoids_a_good_one_is_made_again():
    case = Case().joining(0).started(1)
    case.change_pod(1, node="", unschedulable="0/3 nodes", excluded_nodes=("n9",), phase="Pending")
    assert deleted(case.plan()) == [("mini-1-1", None)]


def test_a_pod_never_heard_of_is_unknown_and_not_lost():
    case = Case().started(0, 1)
    assert not case.plan().deletes


def test_a_pod_never_heard_of_on_a_node_that_is_down_is_lost():
    case = Case().started(0, 1)
    case.nodes["n1"] = NodeView(name="n1", ready=False)
    assert deleted(case.plan()) == [("mini-1-1", 0)]
    case.knows(listening_s=1.0)
    assert not case.plan().deletes


def test_a_member_that_beats_is_kept_although_its_node_is_called_down():
    case = Case().running(0, 1)
    case.nodes["n1"] = NodeView(name="n1", ready=False)
    assert not case.plan().deletes


def test_when_everybody_is_silent_the_listener_is_doubted_first():
    case = Case().running(0, 1).silent(0, 6).silent(1, 6)
    decided = case.plan()
    assert not decided.fence
    assert decided.requeue_after_s
    assert case.silent(0, 31).silent(1, 31).plan().fence


def test_a_whole_gang_on_one_node_that_is_silent_is_lost_with_it():
    case = Case().running(0, 1).change_pod(1, node="n0").change_member(1, node="n0")
    assert len(case.silent(0, 6).silent(1, 6).plan().fence) == 2


def test_a_member_that_fell_silent_before_the_operator_began_to_listen_is_lost():
    case = Case().running(0, 1).knows(membership=None, listening_s=9.0)
    del case.members["u1-1"]
    decided = case.plan()
    assert not decided.fence
    assert decided.requeue_after_s == pytest.approx(1.0)
    assert case.knows(listening_s=11.0).plan().fence == ("u1-1",)


def test_what_runs_is_not_called_otherwise_before_a_new_operator_could_hear_of_it():
    case = Case().running(0, 1).knows(membership=None, listening_s=1.0)
    case.members.clear()
    decided = case.plan()
    assert decided.status is None
    assert decided.requeue_after_s == pytest.approx(4.0)
    assert case.knows(listening_s=5.0).plan().status.phase == "Recovering"


def test_a_pod_that_is_newer_than_the_operator_is_still_to_come():
    case = Case().running(0, 1).knows(membership=None, listening_s=40.0)
    del case.members["u1-1"]
    assert case.plan().fence
    assert not case.change_pod(1, created_at_s=case.now_s - 39).plan().fence


def test_a_node_lost_under_a_pod_that_had_a_failed_process_before_is_news():
    case = Case(replicas=3).running(0, 1, 2).error(1, -9, ago_s=1).written()
    case.running(0, 1, 2, generation=2).knows(errors=()).silent(2).written()
    case.started(2, attempt=2).running(0, 1, generation=3)
    case.joining(2, attempt=2).change_member(2, state="running", generation=3)
    lost = case.silent(1).plan().status.history[-1]
    assert (lost.reason, lost.pod, lost.generation) == ("NodeLost", "mini-1-1", 3)


@pytest.mark.parametrize("attempt", [0, 4])
def test_pods_of_a_deleted_training_of_the_same_name_do_not_take_the_names(attempt):
    case = Case(replicas=1).started(0, attempt=4)
    case.change_pod(0, training_uid="another", deleting=True)
    case.status = case.status.model_copy(update={"attempt": attempt})
    decided = case.plan()
    assert decided.status.attempt == 5
    assert made(decided) == ["mini-0-5"]


@pytest.mark.parametrize("missing", ['persistentvolumeclaim "c" not found', 'secret "t" not found'])
def test_what_a_pod_does_not_find_is_made_again(missing):
    case = Case().started(0, 1)
    if "secret" in missing:
        waiting = ContainerView(
            waiting_reason="CreateContainerConfigError", waiting_message=missing
        )
        case.change_pod(1, phase="Pending", container=waiting)
    else:
        case.change_pod(1, node="", phase="Pending", unschedulable=missing)
    kinds = [m["kind"] for m in case.plan().creates]
    assert kinds == ["Secret", "Service", "PersistentVolumeClaim"]


def test_a_worker_error_counts_once_for_its_generation_and_names_the_signal_first():
    case = Case().running(0, 1).error(0, 1, ago_s=2).error(1, -9, ago_s=1)
    decided = case.plan()
    [entry] = decided.status.history
    assert (entry.reason, entry.exit_code, entry.pod) == ("ProcessKilled", -9, "mini-1-1")
    assert decided.end_generation == 1
    case.status = decided.status
    assert case.knows(membership=None).plan().status is None


def test_a_restart_that_was_asked_for_is_no_error():
    assert Case().running(0, 1).error(0, EXIT_RESTART).plan().status is None


def test_an_error_waits_until_the_others_are_known_to_live():
    case = Case().running(0, 1).error(0, 1, ago_s=1.0).silent(1, 2.0)
    assert case.plan().status is None
    case.silent(1, 6.0)
    [entry] = case.plan().status.history
    assert entry.reason == "NodeLost"


def test_errors_that_follow_from_a_deleted_pod_are_not_counted():
    case = Case().running(0, 1).error(0, 1).change_pod(1, deleting=True).knows(over=True)
    after = case.plan().status
    assert after.restarts.application == 0
    assert (after.history[-1].reason, after.restarts.voluntary) == ("PodDeleted", 1)

"""When a generation ends, when the next is formed, and how large."""

from dataclasses import replace

import pytest
from deepseek_operator.core.model import CommitView
from dstrain_api.status import NodeRecord
from plan_case import NOW_S, Case, deleted, made


def test_a_member_that_asks_for_the_next_generation_ends_this_one():
    assert Case().running(0, 1).knows(over=True).plan().end_generation == 1


def test_a_member_whose_pod_is_gone_ends_the_generation_and_is_made_again():
    case = Case().running(0, 1)
    del case.pods[1]
    first = case.plan()
    assert made(first) == ["mini-1-1"]
    case.started(1)
    case.change_pod(1, uid="u1-again")
    decided = case.plan()
    assert decided.end_generation == 1
    assert decided.status.restarts.voluntary == 1


def test_a_pod_that_is_being_deleted_is_replaced_when_it_is_gone():
    assert made(Case().running(0, 1).change_pod(1, deleting=True).plan()) == []


def test_a_coordinator_that_has_just_started_is_given_time_to_find_the_generation():
    case = Case().running(0, 1).knows(membership=None)
    del case.members["u1-1"]
    decided = case.plan()
    assert decided.end_generation is None
    assert decided.membership is None


def test_a_generation_that_can_never_be_whole_again_is_given_up():
    case = Case().running(0, 1).knows(membership=None)
    del case.members["u1-1"]
    case.joining(1)
    assert case.plan().end_generation == 1


def test_pods_above_the_target_size_are_deleted():
    case = Case(replicas=3).running(0, 1, 2).edit(workers={"replicas": 2})
    assert deleted(case.plan()) == [("mini-2-1", None)]


def test_a_scale_up_makes_pods_and_lets_training_go_on_until_they_have_joined():
    case = Case().running(0, 1).edit(workers={"replicas": 3})
    decided = case.plan()
    assert made(decided) == ["mini-2-1"]
    assert decided.end_generation is None


def test_a_scale_up_takes_the_new_ones_in_after_the_next_commit():
    case = Case().running(0, 1)
    old = CommitView(step=20, uri="", generation=1, at_s=NOW_S - 30)
    case.knows(commit=old).edit(workers={"replicas": 3}).joining(2, waiting_s=10)
    assert case.plan().end_generation is None
    case.knows(commit=replace(old, step=40, at_s=NOW_S - 1))
    decided = case.plan()
    assert decided.end_generation == 1
    assert decided.status.history[-1].reason == "Scaled"


def checked(case):
    return case.plan().membership.preflight


@pytest.mark.parametrize(
    ("generations", "expected"), [((0, 0), True), ((3, 0), True), ((3, 3), False), ((2, 3), False)]
)
def test_nodes_are_checked_when_a_worker_is_new_and_not_when_processes_restart(
    generations, expected
):
    case = Case().joining(0, 1)
    for slot, generation in enumerate(generations):
        case.change_member(slot, generation=generation)
    assert checked(case) == expected


def test_the_check_can_be_turned_off():
    assert not checked(Case(recovery={"preflight": "never"}).joining(0, 1))


def test_a_node_that_is_used_for_want_of_a_better_one_is_not_checked_again():
    case = Case().joining(0, 1)
    record = NodeRecord(name="n1", reason="PreflightFailed", time="", tolerated=True)
    case.status = case.status.model_copy(update={"nodes": [record]})
    assert not checked(case)

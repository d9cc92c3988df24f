"""How large a gang is while some of it is missing, and when it grows again."""

import pytest
from deepseek_operator.core.clock import rfc3339_ms
from deepseek_operator.core.model import CommitView
from dstrain_api.status import HistoryEntry
from plan_case import ELASTIC, NOW_S, Case, says

AUTO = {**ELASTIC, "replacementWait": "auto"}
MODEL = {
    "model": {"preset": "mini"},
    "data": {"sources": [{"uri": "builtin://mini"}]},
    "training": {"total": {"tokens": 10**6}, "globalBatch": 32, "microBatch": 4},
}


def divided(case):
    """The same with a global batch of 32 that has to be divided."""
    case.spec = {k: v for k, v in case.spec.items() if k != "entrypoint"} | MODEL
    return case


def survivors(*slots, replicas=4, elastic=AUTO):
    """A gang of four has lost the others, whose pods are made again, and has joined again."""
    case = Case(replicas=replicas, elastic=elastic).running(*range(4))
    case.knows(membership=None)
    for slot in range(4):
        if slot in slots:
            case.change_member(slot, state="joining", waiting_s=0.2, joined_at_s=NOW_S - 40)
        else:
            del case.members[case.pods.pop(slot).uid]
            case.started(slot, attempt=2).change_pod(slot, created_at_s=NOW_S - 1)
    return case


def recovered(case, seconds):
    entry = HistoryEntry(
        failure_class="application", reason="x", time=rfc3339_ms(NOW_S - 500), seconds=seconds
    )
    case.status = case.status.model_copy(update={"history": [entry]})
    return case


def size(decided):
    return len(decided.membership.pod_uids) if decided.membership else 0


def test_an_elastic_training_goes_on_with_those_who_are_there_after_the_wait():
    case = Case(replicas=3, elastic=ELASTIC).joining(0, 2, waiting_s=44.0).started(1)
    decided = case.plan()
    assert decided.membership is None
    assert decided.requeue_after_s == pytest.approx(1.0)
    case.joining(0, 2, waiting_s=46.0)
    decided = case.plan()
    assert decided.membership.pod_uids == ("u0-1", "u2-1")
    assert says(decided.status, "Degraded").reason == "FewerWorkers"


def test_a_training_that_is_not_elastic_waits_for_ever():
    assert Case(replicas=3).joining(0, 2, waiting_s=9999.0).started(1).plan().membership is None


def test_a_smaller_gang_has_a_size_that_divides():
    case = divided(Case(replicas=4, elastic=ELASTIC))
    decided = case.joining(0, 1, 2, waiting_s=60.0).started(3).plan()
    assert len(decided.membership.pod_uids) == 2


def test_without_a_replacement_to_wait_for_the_survivors_go_on_at_once():
    decided = survivors(0, 1, 3).plan()
    assert decided.membership.pod_uids == ("u0-1", "u1-1", "u3-1")
    assert says(decided.status, "Degraded").reason == "FewerWorkers"


def test_the_survivors_wait_for_each_other_first():
    case = survivors(0, 1, 3)
    case.change_member(3, state="running")
    decided = case.plan()
    assert size(decided) == 0
    assert size(case.change_member(3, state="joining", waiting_s=0.1).plan()) == 3


def test_a_gang_that_starts_waits_for_its_pods_before_it_goes_on_with_fewer():
    case = Case(replicas=3, elastic=AUTO).joining(0, waiting_s=44.0).started(1, 2)
    assert size(case.plan()) == 0
    assert size(case.joining(0, waiting_s=46.0).plan()) == 1


@pytest.mark.parametrize(
    ("restart_s", "pod_age_s", "formed"),
    [
        pytest.param(3.0, 1.0, 3, id="a new pod takes longer than a restart"),
        pytest.param(60.0, 1.0, 0, id="a new pod is there before a restart is over"),
        pytest.param(60.0, 30.0, 3, id="a new pod that is overdue may never come"),
    ],
)
def test_a_restart_is_weighed_against_the_time_that_a_new_pod_takes(restart_s, pod_age_s, formed):
    case = recovered(survivors(0, 1, 3), restart_s)
    case.change_pod(2, created_at_s=NOW_S - pod_age_s)  # the others joined after 10 s
    assert size(case.plan()) == formed


def test_the_wait_for_a_new_pod_is_no_longer_than_a_restart():
    case = recovered(survivors(0, 1, 3), 15.0)
    assert case.plan().requeue_after_s == pytest.approx(14.8)
    for slot in (0, 1, 3):
        case.change_member(slot, waiting_s=15.1)
    assert size(case.plan()) == 3


def test_a_pod_that_no_node_fits_is_not_waited_for():
    case = recovered(survivors(0, 1, 3), 60.0)
    case.change_pod(2, node="", unschedulable="0/3 nodes")
    assert size(case.plan()) == 3


def test_nobody_waits_again_for_those_who_were_missing_before():
    case = survivors(0, 1, 3, elastic=ELASTIC)
    for slot in (0, 1, 3):
        case.change_member(slot, group_world_size=3)
    assert size(case.plan()) == 3


def test_two_of_four_are_lost_and_a_size_of_three_would_not_divide():
    assert size(divided(survivors(0, 1, 3)).plan()) == 2


def shrunk(replicas=4, slots=(0, 1), waiting=(2, 3), waiting_s=10.0):
    """A gang that had to shrink, with others that wait to be taken in."""
    case = Case(replicas=replicas, elastic=AUTO).joining(*slots, waiting_s=60.0)
    case.started(*(slot for slot in range(replicas) if slot not in slots)).written()
    assert says(case.status, "Degraded").reason == "FewerWorkers"
    case.running(*slots, generation=case.status.generation)
    return case.joining(*waiting, waiting_s=waiting_s)


def commit_at(case, at_s):
    return case.knows(
        commit=CommitView(step=40, uri="", generation=case.status.generation, at_s=at_s)
    )


def test_a_smaller_gang_grows_at_the_first_commit_after_the_others_have_joined():
    case = shrunk()
    assert commit_at(case, NOW_S - 11).plan().end_generation is None
    decided = commit_at(case, NOW_S - 9).plan()
    assert decided.end_generation == 1
    entry = decided.status.history[-1]
    assert (entry.failure_class, entry.reason) == ("voluntary", "Grown")


def test_a_gang_that_shrinks_again_grows_again_only_after_its_snooze():
    case = shrunk()
    grown = HistoryEntry(failure_class="voluntary", reason="Grown", time=rfc3339_ms(NOW_S - 299))
    case.status = case.status.model_copy(update={"history": [grown]})
    assert commit_at(case, NOW_S).plan().end_generation is None
    case.now_s += 2
    assert commit_at(case, NOW_S + 2).plan().end_generation == 1


def test_a_gang_grows_without_those_who_do_not_come_back():
    case = shrunk(waiting=(2,), waiting_s=44.0)
    assert commit_at(case, NOW_S).plan().end_generation is None
    case = commit_at(shrunk(waiting=(2,), waiting_s=46.0), NOW_S)
    assert case.plan().end_generation == 1
    case.status = case.plan().status
    case.knows(membership=None, commit=None).joining(0, 1, 2)
    for slot in (0, 1):
        case.change_member(slot, generation=1, group_world_size=2)
    assert size(case.plan()) == 3


def test_from_four_to_two_to_three_to_four_workers():
    """By `kubectl scale`, with the pods as they would be."""
    case = Case(replicas=4, elastic=AUTO).running(0, 1, 2, 3)
    case.edit(workers={"replicas": 2})
    assert [d.name for d in case.plan().deletes] == ["mini-2-1", "mini-3-1"]
    for slot in (2, 3):
        del case.members[case.pods.pop(slot).uid]
    decided = case.plan()
    assert (decided.end_generation, decided.status.history[-1].reason) == (1, "Scaled")
    case.status = decided.status
    case.knows(membership=None)
    for generation, replicas in ((2, 2), (3, 3), (4, 4)):
        if replicas > 2:
            case.edit(workers={"replicas": replicas})
            commit_at(case, case.now_s - 60)
            case.joining(replicas - 1)
            assert case.plan().end_generation is None
            decided = commit_at(case, case.now_s).plan()
            assert decided.end_generation == generation - 1
            assert decided.status.history[-1].reason == "Scaled"
            case.status = decided.status
            case.knows(membership=None)
        case.joining(*range(replicas))
        decided = case.plan()
        assert size(decided) == replicas
        assert says(decided.status, "Degraded").status == "False"
        case.status = decided.status
        case.running(*range(replicas), generation=generation)
    assert case.status.restarts.counted == 0

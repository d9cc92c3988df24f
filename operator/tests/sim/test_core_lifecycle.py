"""A training without trouble: it starts, runs, is suspended, completes; and what people read."""

from dataclasses import replace

import pytest
from deepseek_operator.core.clock import rfc3339_ms
from deepseek_operator.core.model import CommitView, ContainerView, Gathering, Observed
from deepseek_operator.core.plan import plan
from dstrain_api.protocol import ProgressReport, SlowRank
from dstrain_api.status import HistoryEntry
from plan_case import NOW_S, SETTINGS, Case, deleted, made, says


def test_a_new_training_gets_its_first_attempt_and_all_its_pods():
    decided = Case(replicas=3).plan()
    assert decided.status.attempt == 1
    assert made(decided) == ["mini-0-1", "mini-1-1", "mini-2-1"]


def test_a_generation_waits_for_everybody():
    assert Case().started(1).joining(0).plan().membership is None


def test_a_generation_is_formed_in_the_order_of_slots_and_its_number_is_durable():
    decided = Case().joining(1, 0).plan()
    assert decided.status.generation == 1
    assert decided.membership.pod_uids == ("u0-1", "u1-1")
    assert (decided.membership.master_address, decided.membership.master_port) == ("10.0.0.0", 5)


def test_a_training_that_runs_needs_nothing():
    decided = Case().running(0, 1).plan()
    assert decided.status is None
    assert not (decided.creates)
    assert not (decided.deletes)
    assert not (decided.membership)
    assert not (decided.events)


def test_progress_alone_is_written_only_now_and_then():
    case = Case().running(0, 1)
    case.knows(progress=ProgressReport(step=50, total_steps=100))
    assert case.plan().status.progress.step == 50
    observed = Observed(
        pods=tuple(case.pods.values()),
        nodes=case.nodes,
        gathering=replace(case.gathering, members=tuple(case.members.values())),
        status_written_at_s=NOW_S - 4,
    )
    decided = plan(case.training(), observed, SETTINGS, NOW_S)
    assert decided.status is None
    assert decided.requeue_after_s == pytest.approx(6.0)


def test_a_commit_is_written_at_once():
    commit = CommitView(step=40, uri="file:///c/step-40", generation=1, at_s=NOW_S)
    decided = Case().running(0, 1).knows(commit=commit).plan()
    assert decided.status.checkpoint.step == 40
    assert says(decided.status, "CheckpointCurrent").status == "True"


@pytest.mark.parametrize("how", ["done", "succeeded"])
def test_the_end_of_the_program_completes_the_training(how):
    case = Case().running(0, 1)
    if how == "done":
        case.knows(done=True)
    else:
        case.change_pod(0, phase="Succeeded").change_pod(1, phase="Succeeded")
    decided = case.plan()
    assert decided.status.phase == "Complete"
    assert says(decided.status, "Finished").status == "True"


def test_once_done_a_failure_no_longer_matters():
    decided = Case().running(0, 1).knows(done=True).fails(1).plan()
    assert decided.status.phase == "Complete"


def test_pods_of_a_complete_training_may_end_by_themselves_and_are_then_deleted():
    case = Case().running(0, 1).knows(done=True).written()
    case.change_pod(0, phase="Succeeded")
    assert case.plan().deletes == ()
    case.now_s += 31
    assert deleted(case.plan()) == [("mini-1-1", None)]


def test_a_finished_training_is_deleted_when_its_time_is_over():
    case = Case(ttlSecondsAfterFinished=100).running(0, 1).knows(done=True).written()
    case.change_pod(0, phase="Succeeded").change_pod(1, phase="Succeeded")
    assert not case.plan().delete_training
    case.now_s += 100
    assert case.plan().delete_training


def test_a_deleted_training_is_left_to_its_owner_references():
    assert Case().plan(deleting=True) == plan(
        replace(Case().training(), deleting=True), Observed(), SETTINGS, NOW_S
    )
    assert Case().plan(deleting=True).status is None


def test_a_spec_that_cannot_be_trained_is_told_and_its_pods_are_left_alone():
    decided = Case().running(0, 1).plan(spec=None, spec_error="spec.workers: no")
    accepted = says(decided.status, "Accepted")
    assert (accepted.status, accepted.message) == ("False", "spec.workers: no")
    assert not (decided.creates)
    assert not (decided.deletes)


def test_a_suspension_deletes_the_pods_with_their_grace():
    case = Case().running(0, 1).edit(suspend=True)
    decided = case.plan()
    assert deleted(decided) == [("mini-0-1", None), ("mini-1-1", None)]
    assert decided.status.phase == "Suspended"
    assert decided.status.restarts.voluntary == 0


def test_after_a_suspension_the_pods_belong_to_a_new_attempt():
    case = Case().running(0, 1).edit(suspend=True).written()
    case.pods.clear()
    case.members.clear()
    case.gathering = Gathering(listening_s=100.0)
    decided = case.edit(suspend=False).plan()
    assert made(decided) == ["mini-0-2", "mini-1-2"]
    assert says(decided.status, "Suspended").status == "False"


def test_a_failure_is_over_when_the_first_new_step_is_reported():
    case = Case().running(0, 1, generation=2)
    entry = HistoryEntry(
        generation=1, failure_class="application", reason="PodFailed", time=rfc3339_ms(NOW_S - 8)
    )
    case.status = case.status.model_copy(update={"history": [entry]})
    progress = ProgressReport(step=21, total_steps=100, resumed_step=20)
    [after] = case.knows(progress=progress).plan().status.history
    assert (after.seconds, after.resumed_step) == (8.0, 20)


def test_a_return_to_a_checkpoint_because_of_bad_numbers_is_told():
    case = Case().running(0, 1)
    progress = case.gathering.progress.model_copy(
        update={"step": 31, "rollbacks": 1, "skipped_steps": 10}
    )
    decided = case.knows(progress=progress).plan()
    assert (decided.status.progress.rollbacks, decided.status.progress.skipped_steps) == (1, 10)
    [event] = [e for e in decided.events if e.reason == "RolledBack"]
    assert "before step 40" in event.message


def test_a_pod_without_a_node_says_what_is_missing_and_what_to_do():
    case = Case().started(0, 1)
    message = "0/3 nodes are available: 3 Insufficient cpu. preemption: 0/3 nodes are available."
    case.change_pod(1, node="", phase="Pending", unschedulable=message)
    decided = case.plan()
    scheduled = says(decided.status, "Scheduled")
    assert (scheduled.status, scheduled.reason) == ("False", "Unschedulable")
    assert "3 Insufficient cpu; free or add nodes" in scheduled.message
    assert "preemption" not in scheduled.message
    assert "Unschedulable" in [e.reason for e in decided.events]


def test_an_event_tells_what_the_scheduler_says_in_the_end():
    case = Case().started(0, 1)
    case.change_pod(1, node="", phase="Pending", unschedulable="unbound PersistentVolumeClaims")
    case.status = case.plan().status
    case.change_pod(1, node="", phase="Pending", unschedulable="3 Insufficient cpu")
    assert "Insufficient cpu" in case.plan().events[0].message


def test_an_image_that_cannot_be_pulled_is_named():
    waiting = ContainerView(waiting_reason="ImagePullBackOff", waiting_message="not found")
    case = Case().started(0, 1).change_pod(0, phase="Pending", container=waiting)
    decided = case.plan()
    degraded = says(decided.status, "Degraded")
    assert (degraded.status, degraded.reason) == ("True", "ImageUnavailable")
    assert "example/trainer:1" in degraded.message
    assert "not found" in degraded.message


def test_what_the_cluster_refuses_is_told_and_tried_again():
    case = Case().started(0)
    case.refused = "Pod mini-1-1: exceeded quota"
    decided = case.plan()
    assert says(decided.status, "Scheduled").reason == "Refused"
    assert "exceeded quota" in decided.status.summary.message
    assert made(decided) == ["mini-1-1"]
    assert decided.requeue_after_s


def test_the_columns_show_how_far_it_is():
    case = Case().running(0, 1)
    progress = ProgressReport(
        step=41,
        total_steps=100,
        tokens=4100,
        loss=4.3125,
        tokens_per_second=5210.0,
        step_seconds=2.0,
        mfu=0.314,
    )
    summary = case.knows(progress=progress).plan().status.summary
    assert (summary.progress, summary.step, summary.tokens_per_second) == ("41%", "41/100", "5.2k")
    assert (summary.eta, summary.mfu, summary.workers) == ("1m58s", "31%", "2/2")
    assert summary.message == "training on 2 workers"


def slow(*ranks, step=50, ratio=2.34):
    found = tuple(SlowRank(rank=rank, ratio=ratio) for rank in ranks)
    return ProgressReport(step=step, total_steps=100, stragglers=found)


def test_a_slow_rank_is_told_once_with_its_pod_and_node_and_nothing_is_restarted():
    case = Case(workers={"replicas": 2, "processesPerWorker": 2}).running(0, 1)
    decided = case.knows(progress=slow(3)).plan()
    [event] = decided.events
    assert (event.type, event.reason) == ("Warning", "Straggler")
    assert "rank 3 in mini-1-1 on node n1" in event.message
    assert "2.3 times" in event.message
    assert decided.end_generation is None
    assert not decided.deletes
    case.status = decided.status
    assert not case.knows(progress=slow(3, step=60, ratio=2.6)).plan().events
    assert [e.message[:19] for e in case.knows(progress=slow(3, 0)).plan().events] == [
        "all wait for rank 0"
    ]


def test_a_rank_is_no_longer_slow_when_its_generation_is_over_or_it_says_so():
    case = Case().running(0, 1).knows(progress=slow(1)).written()
    assert [(slow.rank, slow.pod) for slow in case.status.stragglers] == [(1, "mini-1-1")]
    assert case.knows(progress=slow()).plan().status.stragglers == []
    assert case.knows(progress=slow(1), over=True).plan().status.stragglers == []


def test_a_rank_that_does_not_exist_is_not_slow():
    assert Case().running(0, 1).knows(progress=slow(7)).written().status.stragglers == []

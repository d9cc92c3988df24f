"""The rules of the plan, each by the behaviour that a person would notice."""

from dataclasses import replace

import pytest
from deepseek_operator.core.clock import rfc3339_ms
from deepseek_operator.core.model import (
    CommitView,
    ContainerView,
    Gathering,
    Membership,
    MemberView,
    NodeView,
    Observed,
    PodView,
    Settings,
    Training,
    WorkerError,
)
from deepseek_operator.core.plan import plan
from dstrain_api.constants import EXIT_RESTART
from dstrain_api.protocol import PEER_LOST, ProgressReport
from dstrain_api.rules import validate
from dstrain_api.status import DeepSeekTrainingStatus, HistoryEntry

NOW_S = 1_800_000_000.0
SETTINGS = Settings(trainer_image="example/trainer:1", coordinator_url="http://op:8080")
ELASTIC = {"minReplicas": 1, "maxReplicas": 4, "replacementWait": "45s", "scaleUpSnooze": "5m"}


class Case:
    """A training of two workers that can be put into any state, and what the plan says to it."""

    def __init__(self, replicas=2, **spec):
        self.spec = {
            "entrypoint": {"module": "program"},
            "workers": {"replicas": replicas},
            "recovery": {"heartbeatTimeout": "5s"},
            **spec,
        }
        self.status = DeepSeekTrainingStatus()
        self.pods, self.members, self.nodes = {}, {}, {}
        self.gathering = Gathering(listening_s=100.0)
        self.refused = ""
        self.now_s = NOW_S
        for name in ("n0", "n1", "n2", "n3"):
            self.nodes[name] = NodeView(name=name, ready=True)

    def started(self, *slots, attempt=1):
        """Pods of these slots run and have not joined."""
        self.status = self.status.model_copy(update={"attempt": max(attempt, self.status.attempt)})
        for slot in slots:
            self.pods[slot] = PodView(
                namespace="team",
                name=f"mini-{slot}-{attempt}",
                uid=f"u{slot}-{attempt}",
                training="mini",
                training_uid="t",
                slot=slot,
                attempt=attempt,
                node=f"n{slot}",
                phase="Running",
                deleting=False,
                created_at_s=self.now_s - 50,
                container=ContainerView(running=True),
            )
        return self

    def joining(self, *slots, waiting_s=1.0, attempt=1):
        self.started(*slots, attempt=attempt)
        for slot in slots:
            self._member(slot, state="joining", waiting_s=waiting_s)
        return self

    def running(self, *slots, generation=1, attempt=1):
        """A generation of these slots is formed and at step 40."""
        self.started(*slots, attempt=attempt)
        for rank, slot in enumerate(slots):
            self._member(
                slot,
                state="running",
                generation=generation,
                group_rank=rank,
                group_world_size=len(slots),
            )
        members = tuple(self.pods[s].uid for s in slots)
        self.gathering = replace(
            self.gathering,
            membership=Membership(
                generation=generation,
                pod_uids=members,
                master_address="10.0.0.0",
                master_port=1,
            ),
            progress=ProgressReport(step=40, total_steps=100, tokens=4000, resumed_step=0),
            progress_generation=generation,
            progress_at_s=self.now_s,
        )
        self.status = self.status.model_copy(update={"generation": generation})
        return self.written()

    def written(self):
        """The status is as the operator would have written it."""
        decided = self.plan()
        self.status = decided.status or self.status
        return self

    def _member(self, slot, **facts):
        pod = self.pods[slot]
        self.members[pod.uid] = MemberView(
            pod=pod.name,
            pod_uid=pod.uid,
            slot=slot,
            node=pod.node,
            **{"silent_s": 0.5, "generation": 0, "address": f"10.0.0.{slot}", "port": 5, **facts},
        )

    def change_pod(self, slot, **facts):
        self.pods[slot] = replace(self.pods[slot], **facts)
        return self

    def fails(self, slot, exit_code=1, **facts):
        container = ContainerView(exit_code=exit_code, terminated_reason="Error", **facts)
        return self.change_pod(slot, phase="Failed", container=container)

    def silent(self, slot, silent_s=6.0):
        uid = self.pods[slot].uid
        self.members[uid] = replace(self.members[uid], silent_s=silent_s)
        return self

    def knows(self, **facts):
        self.gathering = replace(self.gathering, **facts)
        return self

    def edit(self, **spec):
        self.spec = {**self.spec, **spec}
        return self

    def error(self, slot, exit_code=1, ago_s=1.0, message="ValueError: no", fingerprint="f"):
        pod = self.pods[slot]
        found = WorkerError(
            pod=pod.name,
            pod_uid=pod.uid,
            node=pod.node,
            generation=self.status.generation,
            exit_code=exit_code,
            message=message,
            fingerprint=fingerprint,
            at_s=self.now_s - ago_s,
        )
        return self.knows(errors=(*self.gathering.errors, found))

    def training(self):
        return Training(
            namespace="team",
            name="mini",
            uid="t",
            resource_version="7",
            generation=1,
            created_at_s=NOW_S - 1000,
            deleting=False,
            spec=validate(self.spec),
            spec_error="",
            status=self.status,
        )

    def plan(self, **training):
        observed = Observed(
            pods=tuple(self.pods.values()),
            nodes=self.nodes,
            gathering=replace(self.gathering, members=tuple(self.members.values())),
            refused=self.refused,
            token="token",
            status_written_at_s=self.now_s - 60,
        )
        return plan(replace(self.training(), **training), observed, SETTINGS, self.now_s)


def made(decided):
    return [m["metadata"]["name"] for m in decided.creates if m["kind"] == "Pod"]


def deleted(decided):
    return [(d.name, d.grace_s) for d in decided.deletes]


def says(status, kind):
    return next((c for c in status.conditions if c.type == kind), None)


# A life without trouble.


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


# Suspension.


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


# Failures.


def test_a_failed_pod_is_counted_and_replaced_under_a_new_attempt_while_others_stay():
    decided = Case().running(0, 1).fails(1, exit_code=3).plan()
    assert decided.status.attempt == 2
    assert decided.status.restarts.application == 1
    assert made(decided) == ["mini-1-2"]
    assert decided.end_generation == 1
    assert deleted(decided) == []


@pytest.mark.parametrize(
    ("pod", "failure_class", "reason"),
    [
        ({"container": ContainerView(exit_code=1)}, "application", "PodFailed"),
        (
            {"container": ContainerView(exit_code=137, terminated_reason="OOMKilled")},
            "application",
            "OOMKilled",
        ),
        ({"reason": "Evicted"}, "infrastructure", "Evicted"),
        ({"disrupted": "DeletionByTaintManager"}, "infrastructure", "Evicted"),
        ({"disrupted": "EvictionByEvictionAPI"}, "voluntary", "Drained"),
        ({"disrupted": "PreemptionByScheduler"}, "voluntary", "Preempted"),
        (
            {"container": ContainerView(exit_code=137, terminated_reason="ContainerStatusUnknown")},
            "infrastructure",
            "ContainerStatusUnknown",
        ),
    ],
)
def test_how_a_pod_ended_decides_its_class(pod, failure_class, reason):
    case = Case().running(0, 1).change_pod(1, phase="Failed", **pod)
    [entry] = case.plan().status.history
    assert (entry.failure_class, entry.reason) == (failure_class, reason)


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


@pytest.mark.parametrize("kind", ["application", "infrastructure"])
def test_one_failure_more_than_the_budget_ends_the_training(kind):
    budgets = {kind: {"max": 2, "window": "1h"}}
    case = Case(recovery={"budgets": budgets, "heartbeatTimeout": "5s"}).running(0, 1)
    times = [rfc3339_ms(NOW_S - ago_s) for ago_s in (3000, 60)]
    case.status = case.status.model_copy(update={"failures": {kind: times}})
    case.fails(1, terminated_message="ZeroDivisionError") if kind == "application" else case.silent(
        1
    )
    decided = case.plan()
    assert decided.status.phase == "Failed"
    assert "more than the budget of 2" in says(decided.status, "Failed").message
    assert decided.stop
    assert made(decided) == []


def test_failures_outside_the_window_are_forgiven():
    case = Case().running(0, 1)
    times = [rfc3339_ms(NOW_S - 3601 - i) for i in range(3)]
    case.status = case.status.model_copy(update={"failures": {"application": times}})
    after = case.fails(1).plan().status
    assert after.phase != "Failed"
    assert len(after.failures["application"]) == 1


def test_a_terminal_training_stays_terminal():
    case = Case(recovery={"budgets": {"application": {"max": 0, "window": "1h"}}})
    case.running(0, 1).fails(1).written()
    assert case.status.phase == "Failed"
    case.edit(suspend=True)
    assert case.plan().status is None
    assert made(case.plan()) == []


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


# Errors of worker processes.


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


def test_the_text_of_the_error_that_was_one_too_many_is_in_the_condition():
    case = Case(recovery={"budgets": {"application": {"max": 0, "window": "1h"}}})
    decided = case.running(0, 1).error(0, message="KeyError: 'lr'").plan()
    assert "KeyError: 'lr'" in says(decided.status, "Failed").message
    assert "Failed" in {e.reason for e in decided.events} | {
        c.type for c in decided.status.conditions
    }


# Generations.


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


# Size.


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
    model = {
        "model": {"preset": "mini"},
        "data": {"sources": [{"uri": "builtin://mini"}]},
        "training": {"total": {"tokens": 10**6}, "globalBatch": 32, "microBatch": 4},
    }
    case = Case(replicas=4, elastic=ELASTIC)
    case.spec = {k: v for k, v in case.spec.items() if k != "entrypoint"} | model
    decided = case.joining(0, 1, 2, waiting_s=60.0).started(3).plan()
    assert len(decided.membership.pod_uids) == 2


def test_a_smaller_gang_grows_after_its_snooze_and_a_commit():
    case = Case(replicas=2, elastic=ELASTIC).joining(0, waiting_s=60.0).started(1).written()
    assert case.status.generation == 1
    case.running(0, generation=1)
    case.joining(1, waiting_s=400.0)
    commit = CommitView(step=40, uri="", generation=1, at_s=NOW_S + 299)
    case.now_s = NOW_S + 310
    assert case.knows(commit=commit).plan().end_generation is None
    case.knows(commit=replace(commit, at_s=NOW_S + 301))
    assert case.plan().end_generation == 1


# What people read.


def test_a_failure_is_over_when_the_first_new_step_is_reported():
    case = Case().running(0, 1, generation=2)
    entry = HistoryEntry(
        generation=1, failure_class="application", reason="PodFailed", time=rfc3339_ms(NOW_S - 8)
    )
    case.status = case.status.model_copy(update={"history": [entry]})
    progress = ProgressReport(step=21, total_steps=100, resumed_step=20)
    [after] = case.knows(progress=progress).plan().status.history
    assert (after.seconds, after.resumed_step) == (8.0, 20)


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


def test_a_lost_connection_never_hides_the_error_that_broke_it():
    case = Case().running(0, 1)
    case.error(0, ago_s=3.0, message="Connection reset by peer", fingerprint=PEER_LOST)
    case.error(1, ago_s=1.0, message="ValueError: no")
    entry = case.knows(over=True).plan().status.history[-1]
    assert (entry.failure_class, entry.pod) == ("application", "mini-1-1")


def test_a_lost_connection_that_nothing_explains_is_no_fault_of_the_program():
    case = Case().running(0, 1)
    case.error(0, message="Connection reset by peer", fingerprint=PEER_LOST)
    entry = case.knows(over=True).plan().status.history[-1]
    assert (entry.failure_class, entry.reason) == ("infrastructure", "PeerLost")

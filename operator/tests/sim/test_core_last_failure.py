"""When a failure is the last one: budgets, the same error again, no progress."""

import pytest
from deepseek_operator.core.clock import rfc3339_ms
from deepseek_operator.core.model import CommitView, ContainerView
from dstrain_api.protocol import HANG, PEER_LOST
from dstrain_api.status import DeepSeekTrainingStatus
from plan_case import NOW_S, Case, deleted, made, says

MODEL = {
    "model": {"preset": "mini"},
    "data": {"sources": [{"uri": "builtin://mini"}]},
    "training": {"total": {"tokens": 10**6}},
}
PLENTY = {
    kind: {"max": 100, "window": "1h"}
    for kind in ("infrastructure", "application", "outOfMemory", "configuration", "numeric")
}


def lenient(**spec):
    return Case(recovery={"budgets": PLENTY, "heartbeatTimeout": "5s"}, **spec)


def fails_at(case, step, generation, **error):
    """The next generation reaches this step and ends with this error."""
    case.now_s += 60
    case.pods.clear()
    case.members.clear()
    case.running(0, 1, generation=generation)
    case.change_pod(1, node=f"x{generation}")  # so that no node is to blame
    case.knows(errors=(), progress=case.gathering.progress.model_copy(update={"step": step}))
    case.error(1, **{"step": step, "fingerprint": f"f{generation}", **error})
    decided = case.plan()
    case.status = decided.status
    return decided.status


def ends(case, steps, **error):
    for generation, step in enumerate(steps, start=1):
        after = fails_at(case, step, generation, **error)
    return says(after, "Failed").reason if after.phase == "Failed" else after.phase


@pytest.mark.parametrize("kind", ["application", "infrastructure", "outOfMemory", "numeric"])
def test_one_failure_more_than_the_budget_ends_the_training(kind):
    budgets = {kind: {"max": 2, "window": "1h"}}
    case = Case(recovery={"budgets": budgets, "heartbeatTimeout": "5s"}).running(0, 1)
    times = [rfc3339_ms(NOW_S - ago_s) for ago_s in (3000, 60)]
    case.status = case.status.model_copy(update={"failures": {kind: times}})
    if kind == "infrastructure":
        case.silent(1)
    else:
        case.error(1, failure_class=kind)
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


def test_a_program_that_cannot_run_as_described_is_not_tried_again():
    case = Case().running(0, 1)
    case.error(1, failure_class="configuration", message="ValueError: no such tokenizer")
    failed = says(case.plan().status, "Failed")
    assert failed.reason == "InvalidConfiguration"
    assert "no such tokenizer" in failed.message


@pytest.mark.parametrize(
    ("waited_s", "generation", "phase"),
    [(599, 0, "Starting"), (601, 0, "Failed"), (601, 1, "Recovering")],
)
def test_an_image_that_never_was_there_ends_the_training_but_a_registry_may_be_away(
    waited_s, generation, phase
):
    case = Case().started(0, 1)
    case.status = case.status.model_copy(update={"generation": generation})
    waiting = ContainerView(waiting_reason="ImagePullBackOff", waiting_message="not found")
    case.change_pod(1, phase="Pending", container=waiting, scheduled_at_s=NOW_S - waited_s)
    after = case.plan().status
    assert after.phase == phase
    if phase == "Failed":
        assert says(after, "Failed").reason == "ImageUnavailable"
        assert after.restarts.configuration == 1


def test_with_a_budget_a_pod_that_cannot_be_started_is_made_again():
    budgets = {"configuration": {"max": 1, "window": "1h"}}
    case = Case(recovery={"budgets": budgets}).started(0, 1)
    waiting = ContainerView(waiting_reason="CreateContainerError")
    case.change_pod(1, phase="Pending", container=waiting, scheduled_at_s=NOW_S - 601)
    decided = case.plan()
    assert deleted(decided) == [("mini-1-1", None)]
    assert decided.status.attempt == 2
    case.status = decided.status
    again = case.plan()  # a cache that lags does not show yet that the pod ends
    assert deleted(again) == [("mini-1-1", None)]
    assert again.status is None


def test_the_same_error_at_the_same_step_twice_is_the_last():
    case = lenient()
    assert ends(case, [50, 50], fingerprint="ValueError-1", message="ValueError: no") == (
        "RepeatedError"
    )
    failed = says(case.status, "Failed")
    assert "the same error at step 50 twice" in failed.message
    assert "ValueError: no" in failed.message


def test_a_node_lost_in_between_does_not_hide_that_an_error_repeats():
    case = lenient()
    fails_at(case, 50, 1, fingerprint="ValueError-1")
    case.pods.clear()
    case.members.clear()
    case.running(0, 1, generation=2).knows(errors=()).silent(1).written()
    assert case.status.history[-1].reason == "NodeLost"
    assert fails_at(case, 50, 3, fingerprint="ValueError-1").phase == "Failed"


@pytest.mark.parametrize(
    "steps", [pytest.param([50, 51], id="later"), pytest.param([50, 60, 50], id="passed once")]
)
def test_the_same_error_elsewhere_is_another_failure(steps):
    assert ends(lenient(), steps, fingerprint="ValueError-1") == "Recovering"


@pytest.mark.parametrize(
    "error",
    [
        pytest.param({"exit_code": -9, "fingerprint": "signal-9"}, id="killed from outside"),
        pytest.param({"fingerprint": PEER_LOST}, id="lost a peer"),
        pytest.param({"fingerprint": ""}, id="not known"),
        pytest.param({"exit_code": -9, "fingerprint": HANG}, id="hang"),
    ],
)
def test_what_may_not_be_the_programs_error_is_not_taken_for_a_repeated_one(error):
    assert ends(lenient(), [50, 50], **error) == "Recovering"


def test_a_program_that_reports_no_steps_is_not_judged_by_them():
    case = lenient()
    for generation in (1, 2, 3, 4):
        case.pods.clear()
        case.members.clear()
        case.status = case.status.model_copy(update={"progress": DeepSeekTrainingStatus().progress})
        case.running(0, 1, generation=generation).knows(progress=None, errors=())
        case.error(1, fingerprint="exit-1")
        case.status = case.status.model_copy(update={"progress": DeepSeekTrainingStatus().progress})
        case.status = case.plan().status
    assert case.status.phase == "Recovering"
    assert case.status.restarts.application == 4


def test_three_generations_that_get_no_further_are_the_last():
    case = lenient()
    assert ends(case, [50, 40, 50]) == "Recovering"
    assert fails_at(case, 45, 4).phase == "Failed"
    failed = says(case.status, "Failed")
    assert failed.reason == "NoProgress"
    assert "without a step after step 50" in failed.message


def test_three_generations_that_end_before_the_first_step_are_the_last():
    case = lenient()
    case.spec = {k: v for k, v in case.spec.items() if k != "entrypoint"} | MODEL
    assert ends(case, [0, 0]) == "Recovering"
    fails_at(case, 0, 3)
    assert says(case.status, "Failed").reason == "NoProgress"


def test_a_new_checkpoint_is_progress():
    case = lenient()
    assert ends(case, [50, 40, 50]) == "Recovering"
    case.knows(commit=CommitView(step=44, uri="", generation=4, at_s=case.now_s))
    assert fails_at(case, 45, 4).phase == "Recovering"


def test_hangs_without_progress_are_the_last_in_the_end():
    case = lenient()
    assert ends(case, [50] * 4, exit_code=-9, fingerprint=HANG) == "NoProgress"


@pytest.mark.parametrize(
    "error",
    [
        pytest.param({"exit_code": -9}, id="killed"),
        pytest.param({"fingerprint": PEER_LOST}, id="lost a peer"),
    ],
)
def test_what_ends_a_generation_from_outside_is_not_counted_as_no_progress(error):
    assert ends(lenient(), [50] * 9, **error) == "Recovering"


def test_a_terminal_training_stays_terminal():
    case = Case(recovery={"budgets": {"application": {"max": 0, "window": "1h"}}})
    case.running(0, 1).fails(1).written()
    assert case.status.phase == "Failed"
    case.edit(suspend=True)
    assert case.plan().status is None
    assert made(case.plan()) == []


def test_the_text_of_the_error_that_was_one_too_many_is_in_the_condition():
    case = Case(recovery={"budgets": {"application": {"max": 0, "window": "1h"}}})
    decided = case.running(0, 1).error(0, message="KeyError: 'lr'").plan()
    assert "KeyError: 'lr'" in says(decided.status, "Failed").message
    assert "Failed" in {e.reason for e in decided.events} | {
        c.type for c in decided.status.conditions
    }


def test_the_next_generation_is_told_how_often_this_training_fails():
    case = Case().joining(0, 1)
    assert case.plan().membership.failure_interval_s == 0.0
    status = case.status.model_copy(
        update={"start_time": rfc3339_ms(NOW_S - 3600), "restarts": case.status.restarts}
    )
    for kind in ("application", "infrastructure", "voluntary", "preemption"):
        status = status.model_copy(update={"restarts": status.restarts.plus(kind)})
    case.status = status
    assert case.plan().membership.failure_interval_s == 1800.0

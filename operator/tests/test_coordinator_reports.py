"""What members tell of a generation: commits, errors, progress, the end."""

from __future__ import annotations

import pytest
from coordinator_gang import UID, Gang
from deepseek_operator.runtime.coordinator import UnknownTraining
from dstrain_api.protocol import ErrorReport, ProgressReport, Report


def test_commit_is_accepted_only_from_a_member_of_the_current_generation() -> None:
    gang = Gang()
    gang.form(2)
    assert gang.commit(0, 2, 10)
    assert not gang.commit(0, 1, 20)
    assert not gang.commit(0, 3, 20)
    assert not gang.commit(7, 2, 20)
    gang.coordinator.end(UID, 2)
    assert not gang.commit(0, 2, 20)
    assert gang.seen.commit is not None
    assert gang.seen.commit.step == 10


def test_commit_must_be_newer_within_its_generation_but_may_be_asked_again() -> None:
    gang = Gang()
    gang.form(1)
    assert gang.commit(0, 1, 10)
    assert gang.commit(0, 1, 10), "the answer may have been lost"
    assert not gang.commit(0, 1, 9)
    gang.form(2)
    assert gang.commit(0, 2, 9), "the last commit may never have become visible"


def test_commit_while_adopting_is_to_be_asked_again() -> None:
    gang = Gang(generation=3)
    gang.beat(0, 3)
    with pytest.raises(UnknownTraining):
        gang.commit(0, 3, 10)
    gang.beat(1, 3)
    assert gang.commit(0, 3, 10)


def test_errors_are_kept_until_the_next_generation_with_who_and_where() -> None:
    gang = Gang()
    gang.form(1)
    error = ErrorReport(local_rank=0, exit_code=-9, message="killed")
    gang.report(1, 1, error=error)
    gang.report(1, 1, error=error)
    (kept,) = gang.seen.errors
    assert (kept.pod, kept.node, kept.exit_code) == ("mini-1-1", "node-1", -9)
    gang.coordinator.end(UID, 1)
    assert len(gang.seen.errors) == 1
    gang.publish(2)
    assert gang.seen.errors == ()
    gang.report(0, 1, error=error)
    assert gang.seen.errors == (), "late errors of an old generation are dropped"


def test_errors_are_bounded_and_a_signal_is_never_the_one_left_out() -> None:
    gang = Gang()
    gang.form(1)
    for rank in range(200):
        message = f"connection reset {rank}"
        gang.report(1, 1, error=ErrorReport(local_rank=0, exit_code=1, message=message))
    gang.report(0, 1, error=ErrorReport(local_rank=0, exit_code=-9))
    assert len(gang.seen.errors) == 64
    assert gang.seen.errors[-1].exit_code == -9


def test_long_error_text_keeps_its_end_without_control_characters() -> None:
    gang = Gang()
    gang.form(1)
    gang.report(
        0, 1, error={"localRank": 0, "exitCode": 1, "message": "x" * 1_000_000 + "\x1b[2J\nEnd"}
    )
    (kept,) = gang.seen.errors
    assert len(kept.message) <= 2048
    assert kept.message.endswith("[2J\nEnd")


def test_progress_of_an_old_generation_is_ignored() -> None:
    gang = Gang()
    gang.form(2)
    gang.report(0, 2, progress=ProgressReport(step=5))
    gang.report(0, 1, progress=ProgressReport(step=9))
    assert gang.seen.progress is not None
    assert gang.seen.progress.step == 5
    assert gang.seen.progress_generation == 2


def test_progress_is_news_only_at_the_first_report_and_the_first_new_step_of_a_generation() -> None:
    gang = Gang()
    gang.form(1)
    for step in (40, 41, 42, 43):
        gang.report(0, 1, progress=ProgressReport(step=step, resumed_step=40))
    assert gang.news == [UID, UID]


def test_figures_that_are_not_finite_do_not_reach_the_status() -> None:
    gang = Gang()
    gang.form(1)
    gang.report(
        0, 1, progress=ProgressReport(step=1, loss=float("nan"), tokens_per_second=float("inf"))
    )
    assert gang.seen.progress is not None
    assert gang.seen.progress.loss is None
    assert gang.seen.progress.tokens_per_second == 0


def test_done_stays_done_whatever_fails_afterwards() -> None:
    gang = Gang()
    gang.form(1)
    gang.report(0, 1, done=True)
    gang.report(0, 1, error=ErrorReport(local_rank=0, exit_code=1))
    gang.beat(0, 1, "leaving")
    assert gang.seen.done


def test_done_of_an_old_generation_is_ignored() -> None:
    gang = Gang()
    gang.form(2)
    gang.report(0, 1, done=True)
    assert not gang.seen.done


def test_an_error_is_kept_with_its_class_its_step_and_the_folder_of_its_stacks() -> None:
    gang = Gang()
    gang.form(1)
    report = ErrorReport(
        local_rank=0, exit_code=-9, failure_class="numeric", step=40, stacks="/mnt/\x1bstacks"
    )
    gang.coordinator.report(UID, Report(pod_uid="uid-0", generation=1, error=report))
    [error] = gang.seen.errors
    assert (error.failure_class, error.step, error.stacks) == ("numeric", 40, "/mnt/stacks")


def test_progress_goes_back_only_by_a_rollback() -> None:
    gang = Gang()
    gang.form(1)
    gang.report(0, 1, progress={"step": 40})
    gang.report(0, 1, progress={"step": 30})
    assert gang.seen.progress
    assert gang.seen.progress.step == 40
    gang.report(0, 1, progress={"step": 31, "rollbacks": 1})
    assert gang.seen.progress
    assert gang.seen.progress.step == 31


def test_a_rank_that_turns_slow_is_news_and_stays_none() -> None:
    gang = Gang()
    gang.form(1)
    gang.report(0, 1, progress={"step": 1})
    for step, ranks, news in ((2, [], False), (3, [1], True), (4, [1], False), (5, [], True)):
        gang.news.clear()
        slow = [{"rank": rank, "ratio": 2.0 + step} for rank in ranks]
        gang.report(0, 1, progress={"step": step, "stragglers": slow})
        assert bool(gang.news) == news

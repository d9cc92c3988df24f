"""Who belongs to a generation: joins, beats, silence, fences, adoption after a restart."""

from __future__ import annotations

import pytest
from coordinator_gang import UID, Gang
from deepseek_operator.core.model import Membership
from deepseek_operator.runtime.coordinator import Fenced, UnknownTraining, training_token


def test_join_waits_until_the_generation_is_published_then_gives_ranks_in_published_order() -> None:
    gang = Gang()
    assert gang.join(0).generation == 0
    assert gang.join(1).generation == 0
    gang.publish(1, "uid-1", "uid-0")
    place = gang.join(0)
    assert (place.generation, place.group_rank, place.group_world_size) == (1, 1, 2)
    assert (place.master_address, place.master_port) == ("10.0.0.0", 29500)


def test_join_is_news_and_a_replayed_join_is_not() -> None:
    gang = Gang()
    gang.join(0)
    assert gang.news == [UID]
    gang.clock.now_s += 20
    gang.join(0)
    assert gang.news == [UID]
    assert gang.member(0).waiting_s == 20
    assert gang.member(0).silent_s == 0


def test_replayed_join_after_a_lost_answer_gets_the_same_place() -> None:
    gang = Gang()
    gang.join(0)
    gang.join(1)
    gang.publish(1)
    assert gang.join(1) == gang.join(1)
    assert not gang.seen.over


def test_join_that_names_the_current_generation_says_that_it_is_over() -> None:
    gang = Gang()
    gang.form(1)
    assert gang.join(1, generation=1).generation == 0
    assert gang.seen.over
    assert gang.news
    assert gang.beat(0, 1).generation == 1, "only the plan ends a generation"
    gang.coordinator.end(UID, 1)
    assert gang.beat(0, 1).generation == 0
    assert gang.seen.membership is None


def test_pod_outside_the_membership_cannot_end_the_generation() -> None:
    gang = Gang()
    gang.form(1)
    gang.join(0, generation=1, uid="stranger")
    assert not gang.seen.over


def test_beats_of_an_older_generation_are_told_the_current_one() -> None:
    gang = Gang()
    gang.form(1)
    gang.coordinator.end(UID, 1)
    gang.join(0, 1)
    gang.publish(2, "uid-0")
    assert gang.beat(1, 1).generation == 2


def test_plain_beats_are_no_news() -> None:
    gang = Gang()
    gang.form(1)
    for _ in range(10):
        gang.clock.now_s += 1
        gang.beat(0, 1)
        gang.beat(1, 1)
        gang.coordinator.tick()
    assert gang.news == []


def test_silence_beyond_the_timeout_is_news_once_and_so_is_its_end() -> None:
    gang = Gang()
    gang.form(1)
    gang.clock.now_s += 4.9
    gang.beat(0, 1)
    gang.coordinator.tick()
    assert gang.news == []
    gang.clock.now_s += 0.2
    gang.coordinator.tick()
    gang.coordinator.tick()
    assert gang.news == [UID]
    assert gang.member(1).silent_s == pytest.approx(5.1)
    gang.beat(1, 1)
    assert gang.news == [UID, UID]


def test_standstill_of_the_operator_is_not_silence_of_the_pods() -> None:
    gang = Gang()
    gang.form(1)
    gang.clock.now_s += 60
    gang.coordinator.forgive(59.5)
    gang.coordinator.tick()
    assert gang.news == []
    assert gang.member(0).silent_s == pytest.approx(0.5)


def test_beat_overtaken_by_its_own_join_does_not_undo_the_join() -> None:
    gang = Gang()
    gang.form(1)
    gang.join(0, 1)
    gang.beat(0, 1, "running")
    assert gang.member(0).state == "joining"


def test_joining_beat_of_a_pod_that_has_not_joined_makes_nobody_joining() -> None:
    gang = Gang()
    gang.beat(0, 0, "joining")
    assert gang.seen.members == ()


def test_leaving_pod_is_dropped() -> None:
    gang = Gang()
    gang.form(1)
    gang.beat(1, 1, "leaving")
    assert [m.pod_uid for m in gang.seen.members] == ["uid-0"]
    assert gang.news


def test_fenced_pod_is_refused_for_good_in_every_way() -> None:
    gang = Gang()
    gang.form(1)
    gang.coordinator.fence(UID, ("uid-1",))
    assert [m.pod_uid for m in gang.seen.members] == ["uid-0"]
    with pytest.raises(Fenced):
        gang.beat(1, 1)
    with pytest.raises(Fenced):
        gang.join(1, 1)
    with pytest.raises(Fenced):
        gang.commit(1, 1, 10)
    with pytest.raises(Fenced):
        gang.report(1, 1, done=True)


def test_generation_is_adopted_after_a_restart_once_all_ranks_have_beaten() -> None:
    gang = Gang()
    gang.form(3)
    gang.restart_operator(generation=3)
    assert gang.beat(1, 3).generation == 3, "nobody is told to stop while adopting"
    assert gang.seen.membership is None
    assert gang.beat(0, 3).generation == 3
    assert gang.seen.membership == Membership(
        generation=3, pod_uids=("uid-0", "uid-1"), master_address="10.0.0.0", master_port=29500
    )


def test_generation_below_the_status_is_not_adopted() -> None:
    gang = Gang(generation=3)
    assert gang.beat(0, 2).generation == 0
    gang.beat(1, 2)
    assert gang.seen.membership is None


def test_join_that_names_the_generation_being_adopted_ends_the_adoption() -> None:
    gang = Gang(generation=3)
    gang.beat(0, 3)
    gang.join(1, 3)
    assert gang.beat(0, 3).generation == 0
    gang.beat(1, 3)
    assert gang.seen.membership is None


def test_plan_can_end_a_generation_that_cannot_be_adopted() -> None:
    gang = Gang(generation=3)
    gang.beat(0, 3)
    gang.coordinator.end(UID, 3)
    assert gang.beat(0, 3).generation == 0


def test_ended_generation_is_not_adopted_again() -> None:
    gang = Gang()
    gang.form(1)
    gang.coordinator.end(UID, 1)
    gang.beat(0, 1)
    gang.beat(1, 1)
    assert gang.seen.membership is None


def test_ending_an_older_generation_leaves_the_current_one() -> None:
    gang = Gang()
    gang.form(1)
    gang.coordinator.end(UID, 1)
    gang.publish(2)
    gang.coordinator.end(UID, 1)
    assert gang.seen.membership is not None


def test_stop_is_an_order_to_all_members_and_can_be_taken_back() -> None:
    gang = Gang()
    gang.form(1)
    gang.coordinator.order_stop(UID, True)
    assert gang.beat(0, 1).stop
    gang.coordinator.order_stop(UID, False)
    assert not gang.beat(0, 1).stop


def test_a_training_that_is_gone_is_answered_until_its_pods_have_ended() -> None:
    gang = Gang()
    gang.form(1)
    gang.coordinator.retire(UID)
    gang.coordinator.tick()
    gang.beat(0, 1)
    gang.clock.now_s += 61
    gang.coordinator.tick()
    with pytest.raises(UnknownTraining):
        gang.beat(0, 1)
    assert gang.seen.members == ()


def test_token_is_that_of_the_training_only() -> None:
    gang = Gang()
    assert gang.coordinator.authenticate(UID, "t")
    assert not gang.coordinator.authenticate(UID, "T")
    assert not gang.coordinator.authenticate(UID, "ü")
    with pytest.raises(UnknownTraining):
        gang.coordinator.authenticate("another", "t")
    assert training_token(b"key", "a") != training_token(b"key", "b")


def test_silent_stranger_is_forgotten_and_a_silent_member_is_not() -> None:
    gang = Gang()
    gang.form(1)
    gang.join(5)
    gang.clock.now_s += 601
    gang.coordinator.tick()
    assert [m.pod_uid for m in gang.seen.members] == ["uid-0", "uid-1"]


def test_a_member_shows_how_late_its_beats_have_been_and_that_fades() -> None:
    gang = Gang()
    gang.form(1)
    gang.clock.now_s += 2.5
    gang.beat(0, 1)
    assert gang.member(0).gap_s == 2.5
    for _ in range(100):
        gang.clock.now_s += 0.5
        gang.beat(0, 1)
    assert gang.member(0).gap_s < 1.0


def test_when_a_pod_first_joined_is_known_also_generations_later() -> None:
    gang = Gang()
    joined_at_s = gang.clock.now_s
    gang.join(0)
    gang.clock.now_s += 10
    gang.join(0)
    gang.join(0, generation=1)
    assert gang.member(0).joined_at_s == joined_at_s


def test_a_place_comes_with_the_time_between_failures_and_whether_to_check_the_nodes() -> None:
    gang = Gang()
    gang.join(0)
    gang.coordinator.publish(
        UID,
        Membership(
            generation=1,
            pod_uids=("uid-0",),
            master_address="10.0.0.0",
            master_port=1,
            failure_interval_s=1800.0,
            preflight=True,
        ),
    )
    place = gang.join(0)
    assert (place.failure_interval_s, place.preflight) == (1800.0, True)

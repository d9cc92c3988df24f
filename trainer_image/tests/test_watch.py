"""Bad numbers: what is only skipped, what makes training go back, and what is left out then."""

import math
import random
from typing import Any

import pytest
from deepseek_trainer.optim.watch import (
    BAD_STEPS,
    LEAST,
    NEW_NORMAL,
    SPIKE_STEPS,
    Verdict,
    Watch,
    is_spike,
    next_batch,
    touches,
)
from hypothesis import given
from hypothesis import strategies as st

BATCH = 10


class Story:
    """Steps of one batch each, from position 0."""

    def __init__(self, on_loss_spike: Any = "warn") -> None:
        self.watch = Watch(on_loss_spike)
        self.position = 0

    def step(self, loss: float = 4.0, *, bad: bool = False) -> Verdict:
        begin, self.position = self.position, self.position + BATCH
        return self.watch.after(bad=bad, loss=loss, begin=begin, end=self.position)

    def steps(self, count: int, loss: float = 4.0, *, bad: bool = False) -> list[Verdict]:
        return [self.step(loss, bad=bad) for _ in range(count)]


def test_ten_bad_steps_in_a_row_leave_out_their_samples() -> None:
    story = Story()
    story.steps(3)
    *before, tenth = story.steps(BAD_STEPS, math.nan, bad=True)
    assert [verdict.leave_out for verdict in before] == [None] * 9
    assert before[0].begins
    assert not before[1].begins
    assert tenth.leave_out == (30, 130)


def test_a_good_step_in_between_starts_the_count_again() -> None:
    story = Story()
    for verdict in [*story.steps(9, bad=True), story.step(), *story.steps(9, bad=True)]:
        assert verdict.leave_out is None


def test_an_overflow_of_the_scaled_loss_is_neither_bad_nor_a_spike() -> None:
    story = Story("rollback")
    story.steps(LEAST)
    for verdict in story.steps(40, math.nan):
        assert verdict == Verdict("fine")
    assert story.step(40.0).kind == "spike"  # they did not get among what is normal


def curve(count: int, seed: int = 1) -> list[float]:
    """A loss that falls from 10 towards 3, with noise."""
    rng = random.Random(seed)
    return [3 + 7 * math.exp(-step / 50) + rng.gauss(0, 0.05) for step in range(count)]


@given(st.integers(0, 1000))
def test_an_ordinary_curve_has_no_spike(seed: int) -> None:
    losses = curve(300, seed)
    assert not any(is_spike(loss, losses[max(0, i - 128) : i]) for i, loss in enumerate(losses))


@pytest.mark.parametrize("factor", [1.5, 2, 10])
def test_a_loss_far_above_the_others_is_a_spike(factor: float) -> None:
    losses = curve(300)
    assert is_spike(losses[-1] * factor, losses[-129:-1])


def test_a_spike_is_told_once_and_not_taken_for_normal() -> None:
    story = Story()
    story.steps(LEAST)
    spikes = story.steps(20, 40.0)
    assert [verdict.begins for verdict in spikes] == [True] + [False] * 19
    assert all(verdict.kind == "spike" for verdict in spikes)
    assert all(verdict.leave_out is None for verdict in spikes)  # only warned
    assert story.step().kind == "fine"


def test_a_lasting_spike_leaves_out_its_samples_and_those_of_the_step_that_made_it() -> None:
    story = Story("rollback")
    story.steps(40)
    *before, last = story.steps(SPIKE_STEPS, 40.0)
    assert all(verdict.leave_out is None for verdict in before)
    assert last.leave_out == (390, 400 + SPIKE_STEPS * BATCH)


def test_a_level_that_stays_becomes_normal() -> None:
    story = Story()
    story.steps(LEAST)
    story.steps(NEW_NORMAL, 40.0)
    assert story.step(40.0).kind == "fine"


def test_spikes_can_be_ignored() -> None:
    story = Story("ignore")
    story.steps(LEAST)
    assert story.step(40.0).kind == "fine"


def test_after_a_return_the_count_starts_again() -> None:
    story = Story()
    story.steps(BAD_STEPS, bad=True)
    story.watch.went_back()
    assert [verdict.leave_out for verdict in story.steps(9, bad=True)] == [None] * 9


@pytest.mark.parametrize(
    ("position", "left_out", "expected"),
    [
        (0, (), 0),
        (20, ((30, 50),), 20),
        (30, ((30, 50),), 50),
        (25, ((30, 50),), 50),  # a batch that would reach into it
        (30, ((50, 60), (30, 50)), 60),
        (55, ((30, 50),), 55),
    ],
)
def test_batches_go_around_what_is_left_out(
    position: int, left_out: tuple[tuple[int, int], ...], expected: int
) -> None:
    assert next_batch(position, BATCH, left_out) == expected


@pytest.mark.parametrize(
    ("span", "again"), [((50, 70), True), ((45, 70), True), ((60, 80), False), ((0, 20), False)]
)
def test_what_follows_directly_on_samples_left_out_is_not_their_fault(
    span: tuple[int, int], again: bool
) -> None:
    assert touches(span, ((30, 50),)) is again

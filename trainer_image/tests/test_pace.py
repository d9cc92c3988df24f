"""When saves and local copies are due."""

import math
from typing import Any

import pytest
from deepseek_trainer.state.pace import Pace, copy_interval_s, daly_s, save_interval_s
from hypothesis import given
from hypothesis import strategies as st

HOUR = 3600.0


def lost(interval_s: float, cost_s: float, failure_interval_s: float) -> float:
    """Expected share of lost time (Daly's model, restarts for free)."""
    segment = math.expm1((interval_s + cost_s) / failure_interval_s)
    return 1 - interval_s / (failure_interval_s * segment)


@pytest.mark.parametrize("cost_s", [0.1, 2.0, 60.0])
@pytest.mark.parametrize("failure_interval_s", [HOUR, 24 * HOUR])
def test_no_other_interval_loses_noticeably_less(cost_s: float, failure_interval_s: float) -> None:
    best = lost(daly_s(cost_s, failure_interval_s), cost_s, failure_interval_s)
    for factor in (0.5, 0.8, 0.95, 1.05, 1.25, 2.0):
        other = lost(factor * daly_s(cost_s, failure_interval_s), cost_s, failure_interval_s)
        assert other > best - 1e-5


@given(st.floats(1e-3, 1e4), st.floats(1, 1e9))
def test_the_optimum_is_positive(cost_s: float, failure_interval_s: float) -> None:
    assert daly_s(cost_s, failure_interval_s) > 0


def interval(every: Any = "auto", **changes: float) -> float:
    facts: dict[str, Any] = {"cost_s": 2.0, "durable_s": 10.0, "failure_interval_s": 2 * HOUR}
    return save_interval_s(every, **facts | {"world": 16} | changes)


def test_the_interval_follows_cost_and_failures() -> None:
    assert interval() == max(daly_s(2.0, 2 * HOUR), 200.0)
    assert interval(failure_interval_s=24 * HOUR) == daly_s(2.0, 24 * HOUR)
    # The reference's table: 16 processes, 2 s, failures not known.
    assert interval(failure_interval_s=0.0) == pytest.approx(5151, rel=0.01)


def test_saves_never_cost_more_than_a_hundredth_and_never_overtake_each_other() -> None:
    assert interval(failure_interval_s=60.0) == 200.0
    assert interval(failure_interval_s=60.0, durable_s=300.0) == 300.0


def test_a_given_interval_is_taken_as_it_is() -> None:
    assert interval(30) == 30.0


def test_copies_cost_a_hundredth() -> None:
    assert copy_interval_s(0.05) == pytest.approx(5.0)
    assert copy_interval_s(0.0) == 0.25


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def pace(clock: Clock, every_seconds: Any = 60) -> Pace:
    return Pace(
        every_steps=10, every_seconds=every_seconds, failure_interval_s=0.0, world=4, now=clock
    )


def test_multiples_of_the_steps_are_due_until_they_are_saved() -> None:
    due = pace(Clock())
    assert not due.save_is_due(9)
    assert due.save_is_due(10)
    assert due.save_is_due(11)  # the one before was still being written
    due.saved()
    assert not due.save_is_due(12)


def test_a_save_is_due_when_its_time_has_come() -> None:
    clock = Clock()
    due = pace(clock)
    clock.now_s += 59
    assert not due.save_is_due(1)
    clock.now_s += 1
    assert due.save_is_due(2)


def test_auto_uses_what_was_measured() -> None:
    clock = Clock()
    due = pace(clock, "auto")
    due.save_took(0.5)
    due.commit_took(40.0)
    clock.now_s += daly_s(0.5, 29_500 * HOUR / 4) - 1
    assert not due.save_is_due(1)
    clock.now_s += 2
    assert due.save_is_due(2)


def test_one_slow_copy_does_not_stretch_the_pace() -> None:
    clock = Clock()
    due = pace(clock)
    assert due.copy_is_due()
    for cost_s in (0.004, 0.004, 0.9, 0.004):
        due.copy_took(cost_s)
    due.copied()
    clock.now_s += 0.3
    assert not due.copy_is_due()
    clock.now_s += 0.2
    assert due.copy_is_due()

"""Fault plans: what they accept, when they act, what they measure."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from e2e.faults.drive import Injection, RealTime, Version, drive
from e2e.faults.plan import Fault, FaultPlan, Moment, random_plan
from e2e.faults.recoveries import histogram, percentile, recovery_s


class Recorded(RealTime):
    """A stage whose training makes a step every time somebody looks."""

    def __init__(self, steps: int) -> None:
        self._steps = steps
        self._seen: list[Version] = []
        self.injected: list[tuple[int, str]] = []

    def versions(self) -> list[Version]:
        step = len(self._seen)
        phase = "Complete" if step >= self._steps else "Running"
        status = {"phase": phase, "progress": {"step": step}, "generation": 1, "history": []}
        self._seen.append(Version(float(step), status))
        return self._seen

    def node_of(self, slot: int) -> str:
        return f"node{slot}"

    def inject(self, fault: Fault) -> float:
        self.injected.append((self._seen[-1].status["progress"]["step"], fault.kind))
        return self._seen[-1].at_s

    def repair(self, fault: Fault, node: str) -> None:
        raise AssertionError("nothing here lasts")


def status(generation: int, *, seconds: float | None = 2.0, phase: str = "Running") -> Any:
    history = [{"reason": "ProcessFailed", "seconds": seconds}]
    return {"generation": generation, "phase": phase, "history": history}


def at_step(step: int, kind: Any) -> Fault:
    return Fault(at=Moment(step=step), kind=kind)


def test_a_plan_is_read_from_yaml(tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text("faults:\n  - {at: {step: 40}, kind: power-off, slot: 1, lastsSeconds: 9}\n")
    assert FaultPlan.load(path).faults == [
        Fault(at=Moment(step=40), kind="power-off", slot=1, lasts_seconds=9)
    ]


def test_a_moment_is_one_of_three() -> None:
    with pytest.raises(ValueError, match="exactly one of step, seconds and event"):
        Moment(step=1, seconds=2)


def test_faults_come_at_their_steps_and_in_order() -> None:
    stage = Recorded(steps=100)
    plan = FaultPlan(faults=[at_step(10, "kill-pod"), at_step(30, "kill-process")])
    assert [i.fault.kind for i in drive(plan, stage)] == ["kill-pod", "kill-process"]
    assert [step // 10 for step, _ in stage.injected] == [1, 3]


def test_what_comes_after_the_end_of_the_training_is_left_out() -> None:
    plan = FaultPlan(faults=[at_step(10, "kill-pod"), at_step(500, "kill-process")])
    assert len(drive(plan, Recorded(steps=50))) == 1


def test_a_random_plan_is_the_same_for_the_same_seed() -> None:
    def plan(seed: int) -> FaultPlan:
        return random_plan(seed, minutes=30, mean_seconds=60, slots=3, kinds=["kill-pod"])

    assert plan(7) == plan(7)
    assert plan(7) != plan(8)
    assert 15 <= len(plan(7).faults) <= 50


def test_a_recovery_ends_with_the_first_step_of_a_later_generation() -> None:
    injection = Injection(at_step(1, "kill-pod"), at_s=10.0, generation=3)
    versions = [
        Version(9.0, status(3)),
        Version(11.0, status(4, seconds=None)),
        Version(12.0, status(4, seconds=None, phase="Recovering")),
        Version(14.5, status(4)),
        Version(20.0, status(5)),
    ]
    assert recovery_s(injection, versions) == 4.5
    assert recovery_s(injection, versions[:3]) is None


def test_the_next_generation_is_not_what_a_killed_operator_cost() -> None:
    injection = Injection(at_step(1, "kill-operator"), at_s=10.0, generation=3)
    assert recovery_s(injection, [Version(9.0, status(3)), Version(90.0, status(4))]) is None


def test_percentiles_are_values_that_were_seen() -> None:
    values = [float(v) for v in range(1, 21)]
    assert (percentile(values, 0.5), percentile(values, 0.95), percentile([3.0], 0.95)) == (
        10.0,
        19.0,
        3.0,
    )


def test_the_histogram_counts_what_did_not_recover() -> None:
    table = histogram([("kill-pod", 2.0), ("kill-pod", None), ("power-off", 8.25)])
    assert "kill-pod             2     2.0     2.0     2.0  (1 without a new generation)" in table
    assert "power-off            1     8.2     8.2     8.2" in table

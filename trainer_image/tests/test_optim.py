"""Schedule, loss scale, and what happens to a gradient that is not finite."""

import math

import pytest
import torch
from deepseek_trainer.loop import StopFlag, Trainer
from deepseek_trainer.optim.scale import GROWTH_STEPS, LossScale
from deepseek_trainer.parallel.mesh import join_world
from deepseek_trainer.schedule import learning_rate
from deepseek_trainer.state.progress import Progress
from dstrain_api.spec import OptimizerSpec, ScheduleSpec, WarmupSpec
from hypothesis import given, settings
from hypothesis import strategies as st

from .examples import config
from .ranks import launch

TOTAL = 1_000_000


def spec(decay: str = "cosine", warmup: float = 0.1, floor: float = 0.01) -> OptimizerSpec:
    schedule = ScheduleSpec(warmup=WarmupSpec(ratio=warmup), decay=decay, min_ratio=floor)
    return OptimizerSpec(lr=1.0, schedule=schedule)


def test_the_rate_rises_linearly_and_falls_to_its_floor() -> None:
    assert learning_rate(spec(), 50_000, TOTAL) == pytest.approx(0.5)
    assert learning_rate(spec(), 100_000, TOTAL) == pytest.approx(1.0)
    assert learning_rate(spec(), 550_000, TOTAL) == pytest.approx(0.505)
    assert learning_rate(spec(), TOTAL, TOTAL) == pytest.approx(0.01)
    assert learning_rate(spec("constant"), TOTAL, TOTAL) == 1.0


@settings(deadline=None)
@given(st.integers(1, TOTAL), st.floats(0, 1), st.floats(0, 1))
def test_the_rate_stays_between_zero_and_its_peak(tokens: int, warmup: float, floor: float) -> None:
    assert 0 <= learning_rate(spec(warmup=warmup, floor=floor), tokens, TOTAL) <= 1.0


def test_an_overflow_halves_the_scale_and_long_calm_doubles_it() -> None:
    scale = LossScale.start("fp16")
    halved = scale.after(finite=False, compute="fp16")
    assert halved == LossScale(scale.scale / 2)
    for _ in range(GROWTH_STEPS):
        halved = halved.after(finite=True, compute="fp16")
    assert halved == scale


@pytest.mark.parametrize("compute", ["fp32", "bf16"])
def test_other_formats_are_not_scaled(compute: str) -> None:
    assert LossScale.start(compute).after(finite=False, compute=compute) == LossScale(1.0)


def poisoned(on_non_finite: str) -> tuple[bool, bool, int, float]:
    """A NaN gets into the gradient of rank 1 only."""
    settings = config(optimizer={"on_non_finite": on_non_finite})
    trainer = Trainer(settings, join_world(), StopFlag())
    progress = Progress()
    trainer.step(progress)
    weights = list(trainer.model.parameters())
    before = [weight.to_local().clone() for weight in weights]  # type: ignore[attr-defined]
    bias = trainer.model.mixtures[0].expert_bias.clone()
    accumulate = trainer.accumulate

    def accumulate_and_spoil(progress: Progress) -> torch.Tensor:
        loss = accumulate(progress)
        if trainer.mesh.rank == 1:
            weights[0].grad.to_local().view(-1)[0] = math.nan  # type: ignore[union-attr]
        return loss

    trainer.accumulate = accumulate_and_spoil  # type: ignore[method-assign]
    totals = trainer.step(progress)
    same = all(
        torch.equal(weight.to_local(), old)  # type: ignore[attr-defined]
        for weight, old in zip(weights, before, strict=True)
    ) and torch.equal(bias, trainer.model.mixtures[0].expert_bias)
    trainer.accumulate = accumulate  # type: ignore[method-assign]
    after = trainer.step(progress)
    return totals.finite, same, progress.step, after.loss_sum


def test_a_nan_on_one_rank_skips_the_step_on_all_and_training_goes_on() -> None:
    for finite, unchanged, step, loss in launch(2, poisoned, "skip"):
        assert not finite
        assert unchanged
        assert step == 3
        assert math.isfinite(loss)


def test_a_nan_stops_every_rank_when_that_was_asked_for() -> None:
    with pytest.raises(AssertionError, match="NonFiniteGradient: step 2"):
        launch(2, poisoned, "stop")

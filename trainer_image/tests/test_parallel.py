"""Every way to spread the model gives the loss and the gradients of one process."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from deepseek_trainer.loop import StopFlag, Trainer
from deepseek_trainer.model.deepseek import DeepSeek
from deepseek_trainer.model.init import initialise
from deepseek_trainer.optim.scale import LossScale
from deepseek_trainer.parallel.mesh import Layout, join_world, plan_layout
from deepseek_trainer.state.checkpoint import Progress
from dstrain_api.spec import ParallelismSpec

from .examples import config, tiny
from .ranks import launch

Found = tuple[float, dict[str, torch.Tensor], list[tuple[float, float]]]

LAYOUTS: dict[str, tuple[int, dict[str, int]]] = {
    "two ranks sharded": (2, {}),
    "two ranks tensor": (2, {"tensor": 2}),
    "two ranks replicated": (2, {"data_replicate": 2}),
    "three ranks sharded": (3, {}),
    "four ranks sharded": (4, {}),
    "four ranks sharded x tensor": (4, {"tensor": 2}),
    "four ranks replicated x sharded": (4, {"data_replicate": 2}),
    "four ranks replicated x tensor": (4, {"data_replicate": 2, "tensor": 2}),
    "four ranks tensor": (4, {"tensor": 4}),
}


def plain() -> tuple[float, dict[str, torch.Tensor]]:
    """Loss per token and gradients of a global batch by a model without mesh or accumulation."""
    settings = config()
    model = DeepSeek(settings.architecture)
    initialise(model, seed=settings.training.seed)
    trainer = Trainer(settings, join_world(), StopFlag())
    samples = torch.from_numpy(trainer.stream.read(0, settings.training.global_batch))
    tokens = samples[:, 1:].numel()
    loss = model(samples[:, :-1], samples[:, 1:], 1 / settings.training.global_batch)
    (loss / tokens).backward()
    return loss.item() / tokens, {n: w.grad for n, w in model.named_parameters()}  # type: ignore[misc]


def spread_out(layouts: dict[str, dict[str, int]]) -> dict[str, Found]:
    """For each layout: loss and gradients of the first batch, (loss, norm) of four steps."""
    device = join_world()
    found: dict[str, Found] = {}
    for name, layout in layouts.items():
        trainer = Trainer(config(**layout), device, StopFlag())
        loss = trainer.accumulate(Progress()) / trainer.tokens_per_step / trainer.mesh.layout.tensor
        dist.all_reduce(loss)
        gradients = {n: w.grad.full_tensor() for n, w in trainer.model.named_parameters()}  # type: ignore[union-attr]
        trainer.model.zero_grad()
        for mixture in trainer.model.mixtures:
            mixture.take_load()
        progress = Progress()
        steps = [trainer.step(progress) for _ in range(4)]
        norms = [(t.loss_sum / trainer.tokens_per_step, t.norm) for t in steps]
        found[name] = (loss.item(), gradients, norms)
    return found


@pytest.fixture(scope="module")
def one_process() -> Found:
    ((loss, gradients),) = launch(1, plain)
    (steps,) = launch(1, lambda: spread_out({"one": {}})["one"][2])
    return loss, gradients, steps


@pytest.fixture(scope="module")
def spread() -> dict[str, Found]:
    found: dict[str, Found] = {}
    for world in (2, 3, 4):
        layouts = {name: layout for name, (ranks, layout) in LAYOUTS.items() if ranks == world}
        found |= launch(world, spread_out, layouts)[0]
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_loss_and_gradients_equal_those_of_one_process(
    layout: str, one_process: Found, spread: dict[str, Found]
) -> None:
    loss, gradients, _ = spread[layout]
    assert loss == pytest.approx(one_process[0], rel=1e-5)
    for name, expected in one_process[1].items():
        error = (gradients[name] - expected).abs().max() / expected.abs().max()
        assert error < 1e-5, name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_steps_equal_those_of_one_process(
    layout: str, one_process: Found, spread: dict[str, Found]
) -> None:
    for step, expected in zip(spread[layout][2], one_process[2], strict=True):
        assert step == pytest.approx(expected, rel=1e-5)


SIXTEEN_BITS = {
    "bf16 sharded": ("bf16", {}),
    "bf16 tensor": ("bf16", {"tensor": 2}),
    "fp16 sharded": ("fp16", {}),
    "fp16 tensor": ("fp16", {"tensor": 2}),
}


def sixteen_bits() -> dict[str, Any]:
    device = join_world()
    found = {}
    for name, (compute, layout) in SIXTEEN_BITS.items():
        trainer = Trainer(config(compute=compute, steps=25, **layout), device, StopFlag())
        progress = Progress(loss_scale=LossScale.start(compute))
        totals = [trainer.step(progress) for _ in range(25)]
        losses = [t.loss_sum / trainer.tokens_per_step for t in totals]
        dtype = next(iter(trainer.model.parameters())).dtype
        found[name] = (losses[0], losses[-1], sum(not t.finite for t in totals), dtype)
    return found


def test_a_model_learns_in_sixteen_bits_on_two_ranks() -> None:
    (found, *_) = launch(2, sixteen_bits)
    for name, (first_loss, last_loss, skipped, weights) in found.items():
        assert last_loss < first_loss - 0.7, name
        assert skipped <= 2, name
        assert weights == torch.float32, name


def test_what_the_sizes_leave_is_sharded() -> None:
    layout = plan_layout(ParallelismSpec(tensor=2, data_replicate=2), 16, tiny())
    assert layout == Layout(replicate=2, shard=4, tensor=2)


@pytest.mark.parametrize(
    ("spec", "world", "field"),
    [
        (ParallelismSpec(tensor=2), 3, "tensor 2"),
        (ParallelismSpec(data_shard=2), 3, "dataShard 2"),
        (ParallelismSpec(tensor=3), 3, "heads 4"),
    ],
)
def test_sizes_that_do_not_divide_name_the_field(
    spec: ParallelismSpec, world: int, field: str
) -> None:
    with pytest.raises(ValueError, match=field):
        plan_layout(spec, world, tiny())


def test_a_global_batch_that_does_not_divide_names_the_field() -> None:
    with pytest.raises(
        AssertionError, match=r"training\.globalBatch 12 must be a multiple of the 5"
    ):
        launch(5, lambda: Trainer(config(), join_world(), StopFlag()))

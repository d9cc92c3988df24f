"""A training that nothing happens to: what disturbed ones are held against."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any

Losses = dict[int, float]


def losses(training: dict[str, Any]) -> Losses:
    """Nats per token after each step, by the trainer's own steps in this process alone: without an
    operator, agents, checkpoints and other ranks, and with the whole batch at once.
    """
    # Here, for nobody else who reads this module needs torch.
    import torch.distributed as dist
    from deepseek_operator.core.worker import trainer_config
    from deepseek_trainer.loop import StopFlag, Trainer
    from deepseek_trainer.parallel.mesh import join_world
    from deepseek_trainer.state.progress import Progress
    from dstrain_api.spec import DeepSeekTrainingSpec

    batch = training["spec"]["training"]
    whole = {"training": batch | {"microBatch": batch["globalBatch"]}}
    spec = DeepSeekTrainingSpec.model_validate(training["spec"] | whole)
    config = trainer_config(training["metadata"]["name"], spec)
    assert config is not None
    device = join_world()
    trainer, progress, found = Trainer(config, device, StopFlag()), Progress(), {}
    while progress.step < trainer.total_steps:
        totals = trainer.step(progress)
        found[progress.step] = totals.loss_sum / trainer.tokens_per_step
    dist.destroy_process_group()
    return found


@contextmanager
def begun(training: dict[str, Any]) -> Iterator[Future[Losses]]:
    """`losses` from a process of its own, in what time other programs leave."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, initializer=os.nice, initargs=(19,)) as pool:
        yield pool.submit(losses, training)

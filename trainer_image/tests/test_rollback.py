"""Going back to a checkpoint and leaving samples out, with real ranks, gradients and files."""

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from deepseek_trainer.loop import StopFlag, Trainer
from deepseek_trainer.optim.watch import Spans
from deepseek_trainer.parallel.mesh import join_world
from deepseek_trainer.state.checkpoint import Checkpointer
from deepseek_trainer.state.progress import Progress
from dstrain_api.config import TrainerConfig
from dstrain_api.constants import ENV_CHECKPOINT_DIR

from .examples import config
from .ranks import launch

BATCH = 12
Harm = Callable[[Trainer, Progress], None]  # done after backward


def nan_in_gradient(trainer: Trainer) -> None:
    weight = next(trainer.model.parameters())
    weight.grad.to_local().view(-1)[0] = math.nan  # type: ignore[union-attr]


def nan_between(begin: int, end: int) -> Harm:
    """The samples at these positions are to blame, and rank 1 has the worst of them."""

    def harm(trainer: Trainer, progress: Progress) -> None:
        if trainer.mesh.rank == 1 and begin <= progress.position < end:
            nan_in_gradient(trainer)

    return harm


def run(
    folder: Path,
    settings: TrainerConfig,
    harm: Harm,
    left_out: Spans = (),
    stop: StopFlag | None = None,
) -> tuple[int, list[int], float]:
    """Train to the end; the exit code, the batches in the order in which they were read, and the
    last loss.
    """
    os.environ[ENV_CHECKPOINT_DIR] = str(folder)
    trainer = Trainer(settings, join_world(), stop or StopFlag())
    accumulate, step, restore = trainer.accumulate, trainer.step, Checkpointer.restore
    batches, losses = [], []

    def accumulate_and_harm(progress: Progress) -> torch.Tensor:
        batches.append(progress.position // BATCH)
        loss = accumulate(progress)
        harm(trainer, progress)
        return loss

    def step_and_note(*arguments: Any) -> Any:
        totals = step(*arguments)
        losses.append(totals.loss_sum)
        return totals

    def restore_and_leave_out(checkpoints: Checkpointer) -> Progress:
        progress = restore(checkpoints)
        progress.left_out = progress.left_out or left_out
        return progress

    trainer.accumulate = accumulate_and_harm  # type: ignore[method-assign]
    trainer.step = step_and_note  # type: ignore[method-assign]
    Checkpointer.restore = restore_and_leave_out  # type: ignore[method-assign]
    return trainer.run(), batches, losses[-1]


def last_manifest(folder: Path) -> dict[str, Any]:
    name = (folder / "LATEST").read_text().strip()
    manifest: dict[str, Any] = json.loads((folder / name / "manifest.json").read_text())
    return manifest


SETTINGS = config(steps=20, every_steps=4)
BAD = (5 * BATCH, 15 * BATCH)


def test_ten_bad_batches_are_left_out_and_the_rest_trains_as_if_they_were_not_there(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "checkpoints"
    found = launch(2, run, folder, SETTINGS, nan_between(*BAD))
    clean = launch(2, run, tmp_path / "clean", SETTINGS, nan_between(0, 0), (BAD,))
    for (code, batches, loss), (_, clean_batches, clean_loss) in zip(found, clean, strict=True):
        assert code == 0
        assert batches == [*range(15), 4, *range(15, 30)]
        assert clean_batches == [*range(5), *range(15, 30)]
        assert loss == clean_loss
    manifest = last_manifest(folder)
    assert manifest["step"] == manifest["updates"] == 20
    assert manifest["left_out"] == [list(BAD)]
    assert (manifest["skipped_steps"], manifest["rollbacks"]) == (10, 1)
    assert manifest["data"]["cursor"] == 30 * BATCH


def test_what_was_left_out_stays_out_after_a_resume(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"

    def back_and_stopped(folder: Path) -> None:
        """Told to stop as soon as it has gone back and made one step more."""
        stop = StopFlag()

        def harm_until_back(trainer: Trainer, progress: Progress) -> None:
            stop.raised = progress.rollbacks > 0
            nan_between(*BAD)(trainer, progress)

        run(folder, SETTINGS, harm_until_back, stop=stop)

    launch(2, back_and_stopped, folder)
    assert last_manifest(folder)["step"] == 5
    _, batches, _ = launch(2, run, folder, SETTINGS, nan_between(*BAD))[0]
    assert batches == [*range(15, 30)]


@pytest.mark.parametrize(
    ("every_steps", "end", "reason"),
    [(1000, 15, "no checkpoint to go back to"), (4, 40, "so it is not the data")],
)
def test_training_gives_up_where_going_back_cannot_help(
    every_steps: int, end: int, reason: str, tmp_path: Path
) -> None:
    settings = config(steps=30, every_steps=every_steps)
    with pytest.raises(AssertionError, match=f"RollbackFailed: step .*{reason}"):
        launch(2, run, tmp_path / "checkpoints", settings, nan_between(5 * BATCH, end * BATCH))


def test_overflows_of_the_loss_scale_are_no_bad_numbers(tmp_path: Path) -> None:
    settings = config(steps=14, every_steps=4, compute="fp16")

    def overflow(trainer: Trainer, progress: Progress) -> None:
        if progress.loss_scale.scale > 2.0**4:
            nan_in_gradient(trainer)

    folder = tmp_path / "checkpoints"
    code, batches, _ = launch(1, run, folder, settings, overflow)[0]
    manifest = last_manifest(folder)
    assert (code, batches) == (0, [*range(14)])
    assert (manifest["skipped_steps"], manifest["rollbacks"], manifest["updates"]) == (0, 0, 2)


def test_a_lasting_loss_spike_is_undone_where_that_was_asked_for(tmp_path: Path) -> None:
    settings = config(steps=50, every_steps=10)
    training = settings.training.model_copy(update={"on_loss_spike": "rollback"})
    settings = settings.model_copy(update={"training": training})

    def harm(trainer: Trainer, progress: Progress) -> None:
        """The update from batch 38 throws the weights far off."""
        if progress.position == 38 * BATCH:
            with torch.no_grad():
                trainer.model.head.to_local().mul_(1000.0)  # type: ignore[operator]

    folder = tmp_path / "checkpoints"
    code, batches, loss = launch(1, run, folder, settings, harm)[0]
    assert code == 0
    assert batches == [*range(44), *range(30, 38), *range(44, 56)]
    assert loss < 12 * 32 * 6  # nats of a batch; the spike had far more
    manifest = last_manifest(folder)
    assert manifest["left_out"] == [[38 * BATCH, 44 * BATCH]]
    assert (manifest["skipped_steps"], manifest["rollbacks"]) == (0, 1)

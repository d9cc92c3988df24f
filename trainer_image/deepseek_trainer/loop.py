"""The training loop. `Trainer.step` is one optimizer step, in the only order that is right."""

import logging
import os
import signal
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist
from dstrain_api.config import TrainerConfig
from dstrain_api.constants import (
    ENV_CHECKPOINT_DIR,
    ENV_FAILURE_INTERVAL,
    ENV_LOCAL_DIR,
    EXIT_RESTART,
)

from deepseek_trainer import preflight, reporting
from deepseek_trainer.console import Console, report_commit
from deepseek_trainer.data.corpus import open_corpora
from deepseek_trainer.data.sampler import Stream
from deepseek_trainer.model.deepseek import DeepSeek
from deepseek_trainer.model.moe import moved_bias
from deepseek_trainer.optim.adamw import ShardedAdamW
from deepseek_trainer.optim.totals import NO_FLAGS, Flags, StepTotals, reduce_totals
from deepseek_trainer.optim.watch import Watch, next_batch, touches
from deepseek_trainer.parallel.mesh import join_world, make_mesh, plan_layout
from deepseek_trainer.parallel.shard import sharded, spread
from deepseek_trainer.schedule import learning_rate
from deepseek_trainer.state.checkpoint import Checkpointer
from deepseek_trainer.state.commit import Committer, ask_coordinator, generation
from deepseek_trainer.state.committed import CommittedTier
from deepseek_trainer.state.open import open_store
from deepseek_trainer.state.pace import Pace
from deepseek_trainer.state.progress import Progress
from deepseek_trainer.state.verify import Verifier
from deepseek_trainer.stopwatch import Stopwatch

_log = logging.getLogger(__name__)


class NonFiniteGradient(RuntimeError):
    """A gradient is NaN or infinite, and optimizer.onNonFinite is stop."""


class RollbackFailed(RuntimeError):
    """Numbers are bad, and going back to a checkpoint cannot mend them."""


@dataclass
class StopFlag:
    """Raised by SIGTERM; all ranks agree on it at the end of a step."""

    raised: bool = False

    def set(self, _signal: int, _frame: FrameType | None) -> None:
        """Signal handler."""
        self.raised = True


def main(config: TrainerConfig) -> int:
    """Train to the end, or until told to stop; the exit code of this process.

    Raises:
        ValueError: the configuration contradicts itself, the world, the data or the checkpoint.
        NoUsableCheckpoint: all checkpoints are damaged.
        NonFiniteGradient, RollbackFailed: the numbers are bad.
        PreflightFailed: the node is.
    """
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.INFO)
    stop = StopFlag()
    signal.signal(signal.SIGTERM, stop.set)
    device = join_world()
    if not preflight.passed(device):
        return EXIT_RESTART  # the rank that failed says why
    code = Trainer(config, device, stop).run()
    dist.destroy_process_group()
    return code


class Trainer:
    """One rank of one training."""

    def __init__(self, config: TrainerConfig, device: torch.device, stop: StopFlag) -> None:
        training, data = config.training, config.data
        self.config = config
        self.stop = stop
        layout = plan_layout(config.parallelism, dist.get_world_size(), config.architecture)
        if training.global_batch % layout.data:
            raise ValueError(
                f"training.globalBatch {training.global_batch} must be a multiple of the "
                f"{layout.data} data-parallel ranks (workers.replicas x "
                "workers.processesPerWorker / parallelism.tensor): change one of them"
            )
        self.mesh = mesh = make_mesh(layout, device)
        self.stream = Stream(
            open_corpora(
                [source.uri for source in data.sources],
                tokenizer=data.tokenizer,
                vocabulary=config.architecture.vocabulary,
                sequence_length=data.sequence_length,
            ),
            [source.weight for source in data.sources],
            training.seed,
        )
        with torch.device("meta"):
            self.model = DeepSeek(config.architecture, mesh.tensor_group)
        spread(self.model, mesh, compute=config.precision.compute, seed=training.seed)
        self.own_work = Stopwatch(device)
        for block in self.model.blocks:
            self.own_work.watch(block)
        self.optimizer = ShardedAdamW(self.model, config.optimizer, mesh)
        self.tokens_per_step = training.global_batch * data.sequence_length
        self.total_steps = -(-training.total.tokens // self.tokens_per_step)

    def run(self) -> int:
        """Train to the end, or until told to stop; the exit code of this process."""
        checkpoints = self.checkpointer()
        with reporting.section("restore"):
            progress = checkpoints.restore()
        console = Console(self.config, self.mesh, total_steps=self.total_steps, resumed=progress)
        watch = Watch(self.config.training.on_loss_spike)
        stopping = False
        while progress.step < self.total_steps and not stopping:
            begin = progress.position
            totals = self.step(progress, checkpoints.flags(progress.step + 1))
            verdict = watch.after(
                bad=totals.bad,
                loss=totals.loss_sum / self.tokens_per_step,
                begin=begin,
                end=progress.position,
            )
            if verdict.kind == "fine":  # what is saved or copied now may be gone back to
                checkpoints.keep(progress, totals.flags)
            stopping = totals.flags.stop
            last = stopping or progress.step == self.total_steps
            console.step(
                progress,
                totals,
                verdict,
                learning_rate=self.learning_rate(progress),
                saving=checkpoints.figures(),
                last=last,
            )
            if verdict.leave_out and not last:
                progress = self.roll_back(checkpoints, progress, verdict.leave_out)
                watch.went_back()
        with reporting.section("save"):
            if not checkpoints.holds(progress.step):
                checkpoints.save(progress)
            accepted = checkpoints.settle()
        if not accepted:
            return EXIT_RESTART  # the commit was refused: another generation goes on
        if progress.step < self.total_steps:
            return 0 if self.stop.raised else EXIT_RESTART
        reporting.report_done()
        return 0

    def roll_back(
        self, checkpoints: Checkpointer, progress: Progress, span: tuple[int, int]
    ) -> Progress:
        """Go back to the last checkpoint, and leave out the samples of a span from now on.

        Raises:
            RollbackFailed: there is no checkpoint, or this has not helped before.
        """
        why = f"step {progress.step}: the numbers are bad since sample {span[0]}"
        advice = "lower optimizer.lr, or look at the data there"
        if touches(span, progress.left_out):
            raise RollbackFailed(
                f"{why}, right after samples that were left out for the same reason, so it is not "
                f"the data: {advice}"
            )
        with reporting.section("restore"):
            restored = checkpoints.roll_back()
        if restored is None:
            raise RollbackFailed(f"{why}, and there is no checkpoint to go back to: {advice}")
        _log.warning(
            "%s: back at step %d, samples %d to %d are left out", why, restored.step, *span
        )
        restored.left_out = (*progress.left_out, span)
        restored.skipped_steps = progress.skipped_steps
        restored.rollbacks = progress.rollbacks + 1
        batch = self.config.training.global_batch
        restored.position = next_batch(restored.position, batch, restored.left_out)
        return restored

    def step(self, progress: Progress, flags: Flags = NO_FLAGS) -> StepTotals:
        """One optimizer step over one global batch, taken or skipped by all ranks alike.

        Args:
            progress: is moved on by one step.
            flags: what this rank says to the others, besides whether it was told to stop.
        """
        loss_sum = self.accumulate(progress)
        mixtures = self.model.mixtures
        scale = progress.loss_scale.scale
        totals = reduce_totals(
            self.mesh,
            loss_sum=loss_sum,
            norm_squared=self.optimizer.collect_gradients(),
            flags=replace(flags, stop=self.stop.raised),
            loads=[mixture.take_load() for mixture in mixtures],
            own_s=self.own_work.take(),
        ).unscaled(scale)
        progress.step += 1
        batch = self.config.training.global_batch
        progress.position = next_batch(progress.position + batch, batch, progress.left_out)
        progress.tokens += self.tokens_per_step
        if totals.finite:
            clip = min(1.0, self.config.optimizer.clip_norm / (totals.norm + 1e-6))
            with self.own_work.running():
                self.optimizer.step(
                    learning_rate=self.learning_rate(progress), gradient_factor=clip / scale
                )
            for mixture, load_e in zip(mixtures, totals.loads, strict=True):
                speed = mixture.moe.bias_update_speed
                mixture.expert_bias.copy_(moved_bias(mixture.expert_bias, load_e, speed))
        elif self.config.optimizer.on_non_finite == "stop" and totals.bad:
            raise NonFiniteGradient(
                f"step {progress.step}: the gradient is not finite; lower optimizer.lr, or set "
                "optimizer.onNonFinite to skip"
            )
        self.optimizer.drop_gradients()
        progress.skipped_steps += totals.bad
        progress.loss_scale = progress.loss_scale.after(
            finite=totals.finite, compute=self.config.precision.compute
        )
        return totals

    def accumulate(self, progress: Progress) -> torch.Tensor:
        """Forward and backward over this rank's samples; ranks sum gradients in the last one.

        Returns:
            The loss over this rank's samples, in nats, fp32 scalar.
        """
        training = self.config.training
        share = training.global_batch // self.mesh.layout.data
        begin = progress.position + share * self.mesh.data_rank
        with self.own_work.running():
            samples = torch.from_numpy(self.stream.read(begin, begin + share)).to(self.mesh.device)
        # Gradients are of the mean over the global batch's tokens, times the loss scale.
        factor = progress.loss_scale.scale / self.tokens_per_step
        balance_factor = progress.loss_scale.scale / training.global_batch
        batches = samples.split(training.micro_batch)
        loss_sum = torch.zeros((), device=self.mesh.device)
        for number, batch in enumerate(batches, start=1):
            sharded(self.model).set_requires_gradient_sync(number == len(batches))
            loss = self.model(batch[:, :-1], batch[:, 1:], balance_factor)
            (loss * factor).backward()
            loss_sum += loss.detach()
        return loss_sum

    def learning_rate(self, progress: Progress) -> float:
        """Rate of the step that ends at this progress."""
        total = self.total_steps * self.tokens_per_step
        return learning_rate(self.config.optimizer, progress.tokens, total)

    def checkpointer(self) -> Checkpointer:
        """The checkpoints in the folders that the environment names."""
        keep = self.config.checkpoint
        folder = Path(os.environ[ENV_CHECKPOINT_DIR]).absolute()
        store = open_store(keep.uri, folder)
        local_dir = os.environ.get(ENV_LOCAL_DIR)
        pace = Pace(
            every_steps=keep.every_steps,
            every_seconds=keep.every_seconds,
            failure_interval_s=float(os.environ.get(ENV_FAILURE_INTERVAL, "0")),
            world=self.mesh.world,
        )

        def prune() -> None:
            try:
                store.prune(keep_last=keep.keep_last, keep_every_steps=keep.keep_every_steps)
            except OSError as error:  # the next commit tries again
                _log.warning("old checkpoints could not be deleted: %s", error)

        verifier = Verifier(store, verified=prune, damaged=pace.hurry)

        def committed(step: int, save_s: float) -> None:
            report_commit(step, save_s)
            pace.commit_took(save_s)
            verifier.committed()
            prune()

        uri = keep.uri or folder.as_uri()
        first = self.mesh.rank == 0
        tier = CommittedTier(
            config=self.config,
            store=store,
            generation=generation(),
            mesh=self.mesh,
            stream=self.stream,
            committer=Committer(store, ask=ask_coordinator, uri=uri, committed=committed)
            if first
            else None,
            verifier=verifier if first else None,
        )
        return Checkpointer(
            tier,
            self.model,
            self.optimizer,
            local_dir=Path(local_dir) if local_dir else None,
            pace=pace,
        )

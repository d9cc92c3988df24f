"""The training loop, in the order that is right: see `train`."""

import logging
import os
import signal
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Final

import torch
import torch.distributed as dist
from dstrain_api.config import TrainerConfig
from dstrain_api.constants import ENV_CHECKPOINT_DIR, EXIT_RESTART

from deepseek_trainer import reporting
from deepseek_trainer.data.corpus import open_corpora
from deepseek_trainer.data.sampler import Stream
from deepseek_trainer.flops import flops_per_token, peak_flops
from deepseek_trainer.model.deepseek import DeepSeek
from deepseek_trainer.model.moe import moved_bias
from deepseek_trainer.optim.adamw import ShardedAdamW
from deepseek_trainer.optim.totals import StepTotals, reduce_totals
from deepseek_trainer.parallel.mesh import Mesh, join_world, make_mesh, plan_layout
from deepseek_trainer.parallel.shard import sharded, spread
from deepseek_trainer.schedule import learning_rate
from deepseek_trainer.state.checkpoint import Checkpointer, Progress
from deepseek_trainer.state.commit import Committer, ask_coordinator, generation
from deepseek_trainer.state.folder import CheckpointFolder

_log = logging.getLogger(__name__)
_REPORT_EVERY_S: Final = 0.25
_PRINT_EVERY_S: Final = 2.0
_WINDOW_STEPS: Final = 20


class NonFiniteGradient(RuntimeError):  # noqa: N818
    """A gradient is NaN or infinite, and optimizer.onNonFinite is stop."""


def main(config: TrainerConfig) -> int:
    """Train to the end, or until told to stop; the exit code of this process."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.INFO)
    stop = StopFlag()
    signal.signal(signal.SIGTERM, stop.set)
    device = join_world()
    code = Trainer(config, device, stop).run()
    dist.destroy_process_group()
    return code


@dataclass
class StopFlag:
    """Raised by SIGTERM; read at step boundaries."""

    raised: bool = False

    def set(self, _signal: int, _frame: FrameType | None) -> None:
        """Signal handler."""
        self.raised = True


@dataclass
class Meter:
    """Throughput over the last steps."""

    tokens_per_step: int
    ends: deque[float] = field(
        default_factory=lambda: deque([time.monotonic()], maxlen=_WINDOW_STEPS + 1)
    )

    def tick(self) -> tuple[float, float]:
        """(seconds of the step that ends now, tokens per second over the window)."""
        self.ends.append(time.monotonic())
        window_s = self.ends[-1] - self.ends[0]
        return self.ends[-1] - self.ends[-2], self.tokens_per_step * (len(self.ends) - 1) / window_s


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
                f"{layout.data} data-parallel ranks (workers.replicas x workers.processesPerWorker "
                "/ parallelism.tensor): change one of them"
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
        self.optimizer = ShardedAdamW(self.model, config.optimizer, mesh)
        self.checkpoints = make_checkpointer(config, mesh, self.model, self.optimizer, self.stream)
        self.tokens_per_step = training.global_batch * data.sequence_length
        self.total_steps = -(-training.total.tokens // self.tokens_per_step)

    def run(self) -> int:
        """Train to the end, or until told to stop; the exit code of this process."""
        progress = self.checkpoints.restore()
        resumed_step, saved_step = progress.step, progress.step
        console = Console(self, resumed_step)
        console.begin(progress)
        stopping = False
        while progress.step < self.total_steps and not stopping:
            totals = self.step(progress)
            stopping = totals.stop
            last = stopping or progress.step == self.total_steps
            console.step(progress, totals, last=last)
            if last or progress.step % self.config.checkpoint.every_steps == 0:
                console.saved(progress, self.checkpoints.save(progress))
                saved_step = progress.step
        if saved_step != resumed_step:
            committed = self.checkpoints.settle()
            if not committed:
                return EXIT_RESTART  # this generation is over; its successor goes on
        if progress.step < self.total_steps:
            return 0 if self.stop.raised else EXIT_RESTART
        reporting.report_done()
        return 0

    def step(self, progress: Progress) -> StepTotals:
        """One optimizer step over one global batch; `progress` moves on, whether it is taken or
        skipped.
        """
        loss_sum = self.accumulate(progress)
        mixtures = self.model.mixtures
        totals = reduce_totals(
            self.mesh,
            loss_sum=loss_sum,
            norm_squared=self.optimizer.collect_gradients(),
            stop=self.stop.raised,
            loads=[mixture.load_e for mixture in mixtures if mixture.load_e is not None],
        )
        scale = progress.loss_scale.scale
        totals = totals.unscaled(scale)
        progress.step += 1
        progress.position += self.config.training.global_batch
        progress.tokens += self.tokens_per_step
        if totals.finite:
            clip = min(1.0, self.config.optimizer.clip_norm / (totals.norm + 1e-6))
            self.optimizer.step(
                learning_rate=self.learning_rate(progress), gradient_factor=clip / scale
            )
            for mixture, load_e in zip(mixtures, totals.loads, strict=True):
                speed = mixture.moe.bias_update_speed
                mixture.expert_bias.copy_(moved_bias(mixture.expert_bias, load_e, speed))
        elif self.config.optimizer.on_non_finite == "stop" and scale == 1.0:
            raise NonFiniteGradient(
                f"step {progress.step}: the gradient is not finite; lower optimizer.lr, or set "
                "optimizer.onNonFinite to skip"
            )
        self.optimizer.drop_gradients()
        for mixture in mixtures:
            mixture.load_e = None
        progress.loss_scale = progress.loss_scale.after(
            finite=totals.finite, compute=self.config.precision.compute
        )
        return totals

    def accumulate(self, progress: Progress) -> torch.Tensor:
        """Forward and backward over this rank's samples; gradients are summed over ranks in the
        last micro-batch.

        Returns:
            The loss over this rank's samples, in nats, fp32 scalar.
        """
        training = self.config.training
        share = training.global_batch // self.mesh.layout.data
        begin = progress.position + share * self.mesh.data_rank
        sample_bt = torch.from_numpy(self.stream.read(begin, begin + share)).to(self.mesh.device)
        # Every gradient is of the mean over the global batch's tokens, times the loss scale.
        factor = progress.loss_scale.scale / self.tokens_per_step
        balance_factor = progress.loss_scale.scale / training.global_batch
        batches = sample_bt.split(training.micro_batch)
        loss_sum = torch.zeros((), device=self.mesh.device)
        root = sharded(self.model)
        for number, batch_bt in enumerate(batches, start=1):
            root.set_requires_gradient_sync(number == len(batches))
            loss = self.model(batch_bt[:, :-1], batch_bt[:, 1:], balance_factor)
            (loss * factor).backward()
            loss_sum += loss.detach()
        return loss_sum

    def learning_rate(self, progress: Progress) -> float:
        """Rate of the step that ends at this progress."""
        total = self.total_steps * self.tokens_per_step
        return learning_rate(self.config.optimizer, progress.tokens, total)


class Console:
    """Tells the agent and, on rank 0, the log how far the training is."""

    def __init__(self, trainer: Trainer, resumed_step: int) -> None:
        self.trainer = trainer
        self.resumed_step = resumed_step
        self.meter = Meter(trainer.tokens_per_step)
        config, mesh = trainer.config, trainer.mesh
        peak = peak_flops(mesh.device, config.precision.compute)
        flops = flops_per_token(config.architecture, config.data.sequence_length)
        self.mfu_per_rate = flops / (peak * mesh.world) if peak else None
        self.next_report_s = self.next_print_s = 0.0
        self.talks = mesh.rank == 0

    def begin(self, progress: Progress) -> None:
        """Before the first step."""
        if self.talks:
            start = f"resumed at step {progress.step}" if progress.step else "from scratch"
            layout = self.trainer.mesh.layout.to_json()
            _log.info("training %s to step %d, layout %s", start, self.trainer.total_steps, layout)

    def step(self, progress: Progress, totals: StepTotals, *, last: bool) -> None:
        """After a step."""
        trainer = self.trainer
        step_s, rate = self.meter.tick()
        now_s = time.monotonic()
        if now_s >= self.next_report_s or last:
            self.next_report_s = now_s + _REPORT_EVERY_S
            reporting.report(
                step=progress.step,
                loss=totals.loss_sum / trainer.tokens_per_step,
                tokens=progress.tokens,
                total_steps=trainer.total_steps,
                tokens_per_second=rate,
                step_seconds=step_s,
                mfu=None if self.mfu_per_rate is None else rate * self.mfu_per_rate,
                resumed_step=self.resumed_step,
                metrics={
                    "dstrain_grad_norm": totals.norm,
                    "dstrain_learning_rate": trainer.learning_rate(progress),
                },
            )
        if self.talks and (now_s >= self.next_print_s or last):
            self.next_print_s = now_s + _PRINT_EVERY_S
            _log.info(
                "step %d/%d loss %.4f norm %.3f lr %.2e %.0f tok/s",
                progress.step,
                trainer.total_steps,
                totals.loss_sum / trainer.tokens_per_step,
                totals.norm,
                trainer.learning_rate(progress),
                rate,
            )

    def saved(self, progress: Progress, stall_s: float) -> None:
        """After a checkpoint was written."""
        if self.talks:
            _log.info("checkpoint of step %d written in %.2f s", progress.step, stall_s)


def make_checkpointer(
    config: TrainerConfig, mesh: Mesh, model: DeepSeek, optimizer: ShardedAdamW, stream: Stream
) -> Checkpointer:
    """The checkpoints in the folder that the environment names."""
    folder = CheckpointFolder(Path(os.environ[ENV_CHECKPOINT_DIR]))
    keep = config.checkpoint

    def committed(step: int, path: Path) -> None:
        _log.info("checkpoint of step %d committed: %s", step, path)
        folder.prune(keep_last=keep.keep_last, keep_every_steps=keep.keep_every_steps)

    committer = None
    if mesh.rank == 0:
        uri = keep.uri or folder.root.absolute().as_uri()
        committer = Committer(folder, ask=ask_coordinator, uri=uri, committed=committed)
    return Checkpointer(
        config=config,
        folder=folder,
        generation=generation(),
        mesh=mesh,
        model=model,
        optimizer=optimizer,
        stream=stream,
        committer=committer,
    )

"""What a rank says of its progress: figures to the pod's agent, lines to the log of rank 0."""

import logging
import time
from collections import deque
from typing import Final

from dstrain_api.config import TrainerConfig

from deepseek_trainer import reporting
from deepseek_trainer.flops import flops_per_token, peak_flops
from deepseek_trainer.optim.totals import StepTotals
from deepseek_trainer.optim.watch import Verdict
from deepseek_trainer.parallel.mesh import Mesh
from deepseek_trainer.state.checkpoint import SavingFigures
from deepseek_trainer.state.progress import Progress
from deepseek_trainer.stragglers import Stragglers

_log = logging.getLogger(__name__)
_REPORT_EVERY_S: Final = 0.25
_PRINT_EVERY_S: Final = 2.0
_WINDOW_STEPS: Final = 20


class Console:
    """Tells how far the training is, a few times per second at most.

    Args:
        config: of the training.
        mesh: rank 0 speaks for all; the others report their own step only.
        total_steps: steps until complete.
        resumed: where this generation began.
    """

    def __init__(
        self, config: TrainerConfig, mesh: Mesh, *, total_steps: int, resumed: Progress
    ) -> None:
        self._first, self._rank = mesh.rank == 0, mesh.rank
        self._total_steps = total_steps
        self._resumed_step = resumed.step
        self._rollbacks_before = resumed.rollbacks
        self._tokens_per_step = config.training.global_batch * config.data.sequence_length
        peak = peak_flops(mesh.device, config.precision.compute)
        flops = flops_per_token(config.architecture, config.data.sequence_length)
        self._mfu_per_rate = flops / (peak * mesh.world) if peak else None
        self._ends_s = deque([time.monotonic()], maxlen=_WINDOW_STEPS + 1)
        self._skipped = self._spikes = 0
        self._own_s = 0.0
        self._stragglers = Stragglers()
        self._next_report_s = self._next_print_s = 0.0
        if self._first:
            start = f"resumed at step {resumed.step}" if resumed.step else "from scratch"
            layout = ", ".join(f"{name} {size}" for name, size in mesh.layout.to_json().items())
            _log.info("training %s to step %d; %s", start, total_steps, layout)

    def step(
        self,
        progress: Progress,
        totals: StepTotals,
        verdict: Verdict,
        *,
        learning_rate: float,
        saving: SavingFigures,
        last: bool,
    ) -> None:
        """A step was taken or skipped."""
        self._skipped += not totals.finite
        if verdict.kind == "spike" and verdict.begins:
            self._spikes += 1
            if self._first:
                loss = totals.loss_sum / self._tokens_per_step
                _log.warning("step %d: the loss jumped to %.4f", progress.step, loss)
        now_s = time.monotonic()
        self._ends_s.append(now_s)
        self._own_s += totals.ranks_s[self._rank]
        if self._stragglers.step(totals.ranks_s, now_s) and self._first:
            for slow in self._stragglers.worst:
                _log.warning(
                    "rank %d needs %.1f times as long as others for its own part of a step",
                    slow.rank,
                    slow.ratio,
                )
        if last or now_s >= self._next_report_s:
            self._next_report_s = now_s + _REPORT_EVERY_S
            self._report(progress, totals, learning_rate, saving)
        else:
            reporting.report_step(progress.step)  # an error is told apart by its step
        if self._first and (last or now_s >= self._next_print_s):
            self._next_print_s = now_s + _PRINT_EVERY_S
            _log.info(
                "step %d/%d  loss %.4f  norm %.3f  lr %.2e  %.0f tok/s",
                progress.step,
                self._total_steps,
                totals.loss_sum / self._tokens_per_step,
                totals.norm,
                learning_rate,
                self._rate(),
            )

    def _report(
        self,
        progress: Progress,
        totals: StepTotals,
        learning_rate: float,
        saving: SavingFigures,
    ) -> None:
        rate = self._rate()
        metrics = {
            "dstrain_grad_norm": totals.norm,
            "dstrain_learning_rate": learning_rate,
            "dstrain_skipped_steps_total": self._skipped,
            "dstrain_loss_spikes_total": self._spikes,
            "dstrain_rollbacks_total": progress.rollbacks - self._rollbacks_before,
            "dstrain_checkpoint_stall_seconds_total": saving.stall_s,
        }
        if saving.verified_step:
            metrics["dstrain_checkpoint_last_verified_step"] = saving.verified_step
        reporting.report(
            step=progress.step,
            loss=totals.loss_sum / self._tokens_per_step,
            tokens=progress.tokens,
            total_steps=self._total_steps,
            tokens_per_second=rate,
            step_seconds=self._ends_s[-1] - self._ends_s[-2],
            mfu=None if self._mfu_per_rate is None else rate * self._mfu_per_rate,
            resumed_step=self._resumed_step,
            skipped_steps=progress.skipped_steps,
            rollbacks=progress.rollbacks,
            verified_step=saving.verified_step,
            stragglers={slow.rank: slow.ratio for slow in self._stragglers.worst},
            own_seconds=self._own_s,
            metrics=metrics,
        )

    def _rate(self) -> float:
        """Tokens per second over the last steps, with whatever stood between them."""
        steps = len(self._ends_s) - 1
        return self._tokens_per_step * steps / (self._ends_s[-1] - self._ends_s[0])


def report_commit(step: int, save_s: float) -> None:
    """A checkpoint became the one to resume from, `save_s` seconds after its save began."""
    _log.info("step %d is committed, %.2f s after its save began", step, save_s)
    reporting.report_metrics(
        {
            "dstrain_checkpoint_last_step": step,
            "dstrain_checkpoint_save_duration_seconds": save_s,
        }
    )

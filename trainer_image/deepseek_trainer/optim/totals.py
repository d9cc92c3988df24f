"""What all ranks must agree on after backward, in one all-reduce: loss, gradient norm, stop flag
and expert load.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist

from deepseek_trainer.parallel.mesh import Mesh


@dataclass(frozen=True)
class StepTotals:
    """Sums over the global batch, equal on every rank, so that every decision from them is too."""

    loss_sum: float
    norm: float
    stop: bool
    loads: tuple[torch.Tensor, ...]

    def unscaled(self, scale: float) -> "StepTotals":
        """The same with the norm of the true gradient; the loss was never scaled."""
        return replace(self, norm=self.norm / scale)

    @property
    def finite(self) -> bool:
        """Whether no rank has a gradient with NaN or infinity."""
        return math.isfinite(self.norm) and math.isfinite(self.loss_sum)


def reduce_totals(
    mesh: Mesh,
    *,
    loss_sum: torch.Tensor,
    norm_squared: torch.Tensor,
    stop: bool,
    loads: Sequence[torch.Tensor],
) -> StepTotals:
    """Add up every rank's part.

    Args:
        mesh: the ranks of one tensor group hold the same loss and loads; the first of them counts.
        loss_sum: loss over this rank's samples.
        norm_squared: this rank's addend (`ShardedAdamW.collect_gradients`), of gradients that are
            already summed.
        stop: whether this rank was told to stop.
        loads: tokens per expert of every mixture layer, over this rank's samples.
    """
    first = 1.0 if mesh.tensor_rank == 0 else 0.0
    # fp64 holds token counts exactly.
    own = torch.cat([loss_sum.double().reshape(1), *(load.double() for load in loads)]) * first
    rest = torch.stack([norm_squared, norm_squared.new_tensor(float(stop))])
    total = torch.cat([rest, own])
    dist.all_reduce(total)
    norm_squared_sum, stops, loss = total[:3].tolist()
    return StepTotals(
        loss_sum=loss,
        norm=math.sqrt(norm_squared_sum) if norm_squared_sum >= 0 else math.nan,
        stop=stops > 0,
        loads=total[3:].split([len(load) for load in loads]) if loads else (),
    )

"""What all ranks must agree on after backward, in one all-reduce: loss, gradient norm, flags
and expert load; and how long each of them has worked.
"""

import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace
from typing import Final

import torch
import torch.distributed as dist

from deepseek_trainer.parallel.mesh import Mesh


@dataclass(frozen=True)
class Flags:
    """What any rank has to say to the others; raised for all when raised by one.

    `stop`: it was told to stop. `save`, `copy`: a checkpoint, a local copy is due. `busy`: it is
    not done with the last one.
    """

    stop: bool = False
    save: bool = False
    copy: bool = False
    busy: bool = False


NO_FLAGS: Final = Flags()


@dataclass(frozen=True)
class StepTotals:
    """Sums over the global batch, equal on every rank, so that every decision from them is too.

    `scale` is the loss scale that the gradients still had when they were summed. `ranks_s` are the
    seconds that each rank has worked without waiting for others.
    """

    loss_sum: float
    norm: float
    flags: Flags
    loads: tuple[torch.Tensor, ...]
    scale: float = 1.0
    ranks_s: tuple[float, ...] = ()

    def unscaled(self, scale: float) -> "StepTotals":
        """The same with the norm of the true gradient; the loss was never scaled."""
        return replace(self, norm=self.norm / scale, scale=scale)

    @property
    def finite(self) -> bool:
        """Whether no rank has a gradient with NaN or infinity."""
        return math.isfinite(self.norm) and math.isfinite(self.loss_sum)

    @property
    def bad(self) -> bool:
        """Whether one has, and a smaller loss scale would not have helped."""
        return not self.finite and self.scale == 1.0


def reduce_totals(
    mesh: Mesh,
    *,
    loss_sum: torch.Tensor,
    norm_squared: torch.Tensor,
    flags: Flags,
    loads: Sequence[torch.Tensor],
    own_s: float = 0.0,
) -> StepTotals:
    """Add up every rank's part.

    Args:
        mesh: the ranks of one tensor group hold the same loss and loads; the first of them counts.
        loss_sum: loss over this rank's samples.
        norm_squared: this rank's addend (`ShardedAdamW.collect_gradients`), of gradients that are
            already summed.
        flags: of this rank.
        loads: tokens per expert of every mixture layer, over this rank's samples.
        own_s: how long this rank has worked.
    """
    first = 1.0 if mesh.tensor_rank == 0 else 0.0
    # fp64 holds token counts exactly.
    own = torch.cat([loss_sum.double().reshape(1), *(load.double() for load in loads)]) * first
    raised = [float(flag) for flag in astuple(flags)]
    ranks_s = [own_s if rank == mesh.rank else 0.0 for rank in range(mesh.world)]
    figures = norm_squared.new_tensor(raised + ranks_s)
    total = torch.cat([norm_squared.reshape(1), figures, own])
    dist.all_reduce(total)
    begin = 2 + len(figures)
    norm_squared_sum, *summed, loss = total[:begin].tolist()
    votes, ranks_s = summed[: len(raised)], summed[len(raised) :]
    return StepTotals(
        loss_sum=loss,
        norm=math.sqrt(norm_squared_sum) if norm_squared_sum >= 0 else math.nan,
        flags=Flags(*(vote > 0 for vote in votes)),
        loads=total[begin:].split([len(load) for load in loads]) if loads else (),
        ranks_s=tuple(ranks_s),
    )

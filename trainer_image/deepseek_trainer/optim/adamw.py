"""AdamW on the local shards of distributed weights.

The update is elementwise, so every rank steps its own shards as plain tensors: nothing is
dispatched through DTensor, and the moments become distributed tensors only for a checkpoint.
"""

from dataclasses import dataclass
from typing import cast

import torch
from dstrain_api.spec import OptimizerSpec
from torch import nn
from torch.distributed.tensor import DTensor

from deepseek_trainer.model.deepseek import DeepSeek
from deepseek_trainer.parallel.mesh import Mesh
from deepseek_trainer.parallel.tensor import split_dim

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class _Part:
    name: str
    weight: DTensor
    shard: nn.Parameter  # shares its memory with the weight
    counted: bool  # whether this rank adds the gradient to the global norm


class ShardedAdamW:
    """AdamW over the weights of a sharded model. Weight decay is for matrices; norms have none.

    Args:
        model: after `parallel.shard.spread`.
        spec: rates and decay; the learning rate is given at each step.
        mesh: decides which of several holders of the same gradient counts it.
    """

    def __init__(self, model: DeepSeek, spec: OptimizerSpec, mesh: Mesh) -> None:
        self._parts = [_part(name, weight, mesh) for name, weight in model.named_parameters()]
        matrices = [part.shard for part in self._parts if part.weight.ndim > 1]
        vectors = [part.shard for part in self._parts if part.weight.ndim == 1]
        self._adamw = torch.optim.AdamW(
            [
                {"params": matrices, "weight_decay": spec.weight_decay},
                {"params": vectors, "weight_decay": 0.0},
            ],
            lr=spec.lr,
            betas=(spec.betas[0], spec.betas[1]),
            fused=True,
        )
        for part in self._parts:
            self._adamw.state[part.shard] = {
                "step": torch.zeros((), device=part.shard.device),
                **{moment: torch.zeros_like(part.shard) for moment in MOMENTS},
            }

    def collect_gradients(self) -> torch.Tensor:
        """Take the gradients of the last backward; this rank's addend of the squared global norm,
        fp64 scalar.
        """
        for part in self._parts:
            part.shard.grad = cast(DTensor, part.weight.grad).to_local()
            part.weight.grad = None
        counted = [
            grad for part, grad in zip(self._parts, self._gradients(), strict=True) if part.counted
        ]
        if not counted:
            return torch.zeros((), dtype=torch.float64, device=self._parts[0].shard.device)
        norms = torch._foreach_norm(counted)
        return torch.stack(norms).double().square().sum()

    def step(self, *, learning_rate: float, gradient_factor: float) -> None:
        """Update the weights with the collected gradients, each multiplied by a factor."""
        if gradient_factor != 1.0:
            torch._foreach_mul_(self._gradients(), gradient_factor)
        for group in self._adamw.param_groups:
            group["lr"] = learning_rate
        self._adamw.step()

    def drop_gradients(self) -> None:
        """Forget the collected gradients."""
        self._adamw.zero_grad(set_to_none=True)

    def _gradients(self) -> list[torch.Tensor]:
        return [cast(torch.Tensor, part.shard.grad) for part in self._parts]

    def moments(self) -> dict[str, DTensor]:
        """The moments as distributed tensors by name; writing into them writes the state."""
        return {
            f"{moment}.{part.name}": DTensor.from_local(
                self._adamw.state[part.shard][moment],
                part.weight.device_mesh,
                part.weight.placements,
                run_check=False,
                shape=part.weight.shape,
                stride=part.weight.stride(),
            )
            for part in self._parts
            for moment in MOMENTS
        }

    @property
    def updates(self) -> int:
        """Steps that were taken; skipped ones do not count."""
        return int(self._adamw.state[self._parts[0].shard]["step"].item())

    @updates.setter
    def updates(self, value: int) -> None:
        for part in self._parts:
            self._adamw.state[part.shard]["step"].fill_(value)


def _part(name: str, parameter: nn.Parameter, mesh: Mesh) -> _Part:
    weight = cast(DTensor, parameter)
    only_holder = mesh.tensor_rank == 0 or split_dim(name) is not None
    return _Part(
        name=name,
        weight=weight,
        shard=nn.Parameter(weight.to_local().detach()),
        counted=mesh.replicate_rank == 0 and only_holder,
    )

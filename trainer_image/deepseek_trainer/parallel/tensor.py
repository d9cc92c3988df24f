"""Tensor parallelism: which weights are split along which dimension, and the two collectives that a
split layer needs.

Activations stay plain tensors; only weights are distributed tensors. Dispatching every operation
through DTensor costs more than the mini model's arithmetic.
"""

from typing import Any, Final

import torch
import torch.distributed as dist
from torch import nn
from torch.autograd.function import FunctionCtx
from torch.distributed.tensor import DTensor, Replicate, Shard

from deepseek_trainer.parallel.mesh import TENSOR, Mesh

# Last part of a weight's name -> the dimension that holds heads or inner channels.
SPLIT_DIM: Final[dict[str, int]] = {
    "query_up": 0,
    "key_value_up": 0,
    "attention_out": 1,
    "gate": 0,
    "up": 0,
    "down": 1,
    "expert_gate": 2,
    "expert_up": 2,
    "expert_down": 1,
}


def split_dim(name: str) -> int | None:
    """Dimension of a weight that the tensor group splits; none where every rank holds it whole."""
    return SPLIT_DIM.get(name.rpartition(".")[2])


def distribute_over_tensor_group(model: nn.Module, mesh: Mesh) -> None:
    """Replace the (meta) weights of a model by their parts on the tensor group."""
    tensor = mesh.devices[TENSOR]
    for name, parameter in list(model.named_parameters()):
        owner, _, attribute = name.rpartition(".")
        dim = split_dim(name)
        local = parameter if dim is None else parameter.chunk(mesh.layout.tensor, dim)[0]
        whole = DTensor.from_local(
            local.detach().contiguous(),
            tensor,
            [Replicate() if dim is None else Shard(dim)],
            run_check=False,
            shape=parameter.shape,
            stride=parameter.stride(),
        )
        setattr(model.get_submodule(owner), attribute, nn.Parameter(whole))


def local(weight: torch.Tensor) -> torch.Tensor:
    """This rank's part of a weight, as a plain tensor."""
    return weight.to_local() if isinstance(weight, DTensor) else weight


class _Enter(torch.autograd.Function):
    """Identity; backward sums the gradients of all inputs over the group in one all-reduce."""

    @staticmethod
    def forward(ctx: FunctionCtx, group: dist.ProcessGroup, *xs: torch.Tensor) -> Any:
        ctx.group = group  # type: ignore[attr-defined]
        return tuple(x.view_as(x) for x in xs)

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: torch.Tensor) -> Any:
        flat = torch.cat([grad.reshape(-1) for grad in grads])
        dist.all_reduce(flat, group=ctx.group)  # type: ignore[attr-defined]
        parts = flat.split([grad.numel() for grad in grads])
        return None, *(part.view(grad.shape) for part, grad in zip(parts, grads, strict=True))


class _Leave(torch.autograd.Function):
    """Sum over the group; backward is the identity."""

    @staticmethod
    def forward(ctx: FunctionCtx, group: dist.ProcessGroup, x: torch.Tensor) -> Any:
        x = x.contiguous()
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx: FunctionCtx, grad: torch.Tensor) -> Any:
        return None, grad


def enter(group: dist.ProcessGroup | None, *xs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Whole activations go into split weights; their gradients come back as addends."""
    if group is None:
        return xs
    return tuple(_Enter.apply(group, *xs))  # type: ignore[no-untyped-call]


def leave(group: dist.ProcessGroup | None, x: torch.Tensor) -> torch.Tensor:
    """Parts of an activation come out of split weights and are summed."""
    if group is None:
        return x
    return _Leave.apply(group, x)  # type: ignore[no-any-return, no-untyped-call]

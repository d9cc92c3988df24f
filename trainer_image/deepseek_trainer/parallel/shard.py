"""Sharded data parallelism: FSDP2 around every block, in the precision of the training."""

from typing import Final, cast

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from deepseek_trainer.model.deepseek import DeepSeek
from deepseek_trainer.model.init import initialise
from deepseek_trainer.parallel.mesh import Mesh
from deepseek_trainer.parallel.tensor import distribute_over_tensor_group, split_dim

COMPUTE_DTYPE: Final = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def spread(model: DeepSeek, mesh: Mesh, *, compute: str, seed: int) -> None:
    """Turn a model made on the meta device into its part on this rank, with initial weights.

    Gradients are summed over the ranks, not averaged: the loss is divided by the tokens of the
    global batch.
    """
    if mesh.layout.tensor > 1:
        distribute_over_tensor_group(model, mesh)
    policy = MixedPrecisionPolicy(
        param_dtype=None if compute == "fp32" else COMPUTE_DTYPE[compute],
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,  # the rotary tables stay in fp32
    )
    data_parallel = mesh.data_parallel
    for layer, block in enumerate(model.blocks, start=1):
        # Backward begins with the last block: its weights would be gathered again at once.
        reshard = layer < len(model.blocks)
        fully_shard(block, mesh=data_parallel, mp_policy=policy, reshard_after_forward=reshard)
    fully_shard(model, mesh=data_parallel, mp_policy=policy)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            # gloo has no PREMUL_SUM, which a divide factor would use.
            module.set_force_sum_reduction_for_comms(True)
    model.to_empty(device=mesh.device)
    initialise(model, seed=seed, part=lambda name, whole: own_part(name, whole, mesh))


def own_part(name: str, whole: torch.Tensor, mesh: Mesh) -> torch.Tensor:
    """The part of a weight that this rank holds, from its whole value."""
    dim = split_dim(name)
    if dim is not None:
        whole = whole.chunk(mesh.layout.tensor, dim)[mesh.tensor_rank]
    # FSDP2 shards dimension 0 as torch.chunk does: the last ranks may hold nothing.
    shards = whole.chunk(mesh.layout.shard, 0)
    return shards[mesh.shard_rank] if mesh.shard_rank < len(shards) else whole[:0]


def sharded(model: nn.Module) -> FSDPModule:
    """The model as the root of its sharding."""
    return cast(FSDPModule, model)

"""Initial weights that do not depend on the mesh.

Random operations on distributed tensors give every CPU rank the same shard without an error (torch
2.13), so each weight is drawn whole from a generator of its own, seeded by the training's seed and
the weight's name, and every rank keeps its part.
"""

import hashlib
from collections.abc import Callable
from typing import cast

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from deepseek_trainer.model.deepseek import DeepSeek
from deepseek_trainer.parallel.mesh import Mesh
from deepseek_trainer.parallel.tensor import split_dim


@torch.no_grad()
def initialise(model: DeepSeek, *, seed: int, mesh: Mesh | None = None) -> None:
    """Write the initial weights of a model, or of this rank's part of one."""
    for name, parameter in model.named_parameters():
        keep: Callable[[torch.Tensor], torch.Tensor] = lambda whole: whole  # noqa: E731
        target: torch.Tensor = parameter
        if isinstance(parameter, DTensor):
            target = parameter.to_local()
            keep = _part_on(cast(Mesh, mesh), name)
        whole = torch.empty(parameter.shape, device=target.device)
        if parameter.ndim == 1:
            nn.init.ones_(whole)
        else:
            generator = torch.Generator(target.device).manual_seed(weight_seed(seed, name))
            nn.init.normal_(whole, std=model.architecture.init_std, generator=generator)
        target.copy_(keep(whole))
    for mixture in model.mixtures:
        mixture.expert_bias.zero_()


def weight_seed(seed: int, name: str) -> int:
    """Seed of one weight's generator."""
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=7).digest()
    return int.from_bytes(digest, "little")


def _part_on(mesh: Mesh, name: str) -> Callable[[torch.Tensor], torch.Tensor]:
    def part(whole: torch.Tensor) -> torch.Tensor:
        dim = split_dim(name)
        if dim is not None:
            whole = whole.chunk(mesh.layout.tensor, dim)[mesh.tensor_rank]
        # FSDP2 shards dimension 0 as torch.chunk does: the last ranks may hold nothing.
        pieces = whole.chunk(mesh.layout.shard, 0)
        return pieces[mesh.shard_rank] if mesh.shard_rank < len(pieces) else whole[:0]

    return part

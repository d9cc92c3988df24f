"""Initial weights that do not depend on the mesh.

Random operations on distributed tensors give every CPU rank the same shard without an error (torch
2.13), so each weight is drawn whole from a generator of its own, seeded by the training's seed and
the weight's name, and every rank keeps its part.
"""

import hashlib
from collections.abc import Callable

import torch
from torch import nn

from deepseek_trainer.model.deepseek import DeepSeek
from deepseek_trainer.parallel.tensor import local

Part = Callable[[str, torch.Tensor], torch.Tensor]  # of a weight's name and its whole value


def _whole(_name: str, value: torch.Tensor) -> torch.Tensor:
    return value


@torch.no_grad()
def initialise(model: DeepSeek, *, seed: int, part: Part = _whole) -> None:
    """Write the initial weights of a model, or of the part of it that this rank holds."""
    for name, weight in model.named_parameters():
        mine = local(weight)
        whole = torch.empty(weight.shape, device=mine.device)
        if weight.ndim == 1:
            nn.init.ones_(whole)
        else:
            generator = torch.Generator(mine.device).manual_seed(weight_seed(seed, name))
            nn.init.normal_(whole, std=model.architecture.init_std, generator=generator)
        mine.copy_(part(name, whole))
    for mixture in model.mixtures:
        mixture.expert_bias.zero_()


def weight_seed(seed: int, name: str) -> int:
    """Seed of one weight's generator."""
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=7).digest()
    return int.from_bytes(digest, "little")

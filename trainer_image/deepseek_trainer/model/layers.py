"""Small parts of a block.

Shapes: B batch, T sequence, D hidden width, F inner width, H heads, R rotary channels, _ any.
"""

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn
from torch.distributed import ProcessGroup

from deepseek_trainer.parallel.tensor import enter, leave, local


class RmsNorm(nn.Module):
    """Root-mean-square norm (Zhang and Sennrich, 2019)."""

    def __init__(self, width: int, *, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise the last dimension."""
        weight = local(self.weight)
        return F.rms_norm(x, weight.shape, weight, self.eps)


class FeedForward(nn.Module):
    """SwiGLU (Shazeer, 2020), split over the tensor group by inner channels."""

    def __init__(self, hidden: int, inner: int, group: ProcessGroup | None) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.empty(inner, hidden))
        self.up = nn.Parameter(torch.empty(inner, hidden))
        self.down = nn.Parameter(torch.empty(hidden, inner))
        self.group = group

    def part(self, x: torch.Tensor) -> torch.Tensor:
        """This rank's addend of the output, from a whole input; [..., D] to [..., D]."""
        inner = F.silu(F.linear(x, local(self.gate))) * F.linear(x, local(self.up))
        return F.linear(inner, local(self.down))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., D] to [..., D], whole on every rank."""
        (x,) = enter(self.group, x)
        return leave(self.group, self.part(x))


def rotary_table(length: int, channels: int, theta: float, device: torch.device) -> torch.Tensor:
    """Cosine and sine of positions times frequencies, fp32, [2, T, R / 2] (Su et al., 2021)."""
    steps = torch.arange(0, channels, 2, dtype=torch.float32, device=device)
    frequency_r = theta ** (-steps / channels)
    angle_tr = torch.outer(torch.arange(length, dtype=torch.float32, device=device), frequency_r)
    return torch.stack([angle_tr.cos(), angle_tr.sin()])


def rotate(x_bhtr: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Turn neighbouring channel pairs by their position's angles, as published weights expect."""
    cos_tr, sin_tr = table
    even, odd = x_bhtr.float().unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([even * cos_tr - odd * sin_tr, even * sin_tr + odd * cos_tr], dim=-1)
    return turned.flatten(-2).to(x_bhtr.dtype)

"""The language model: embedding, blocks, head.

Shapes: B batch, T sequence, D hidden width, V vocabulary.
"""

import torch
import torch.nn.functional as F  # noqa: N812
from dstrain_api.model import Architecture
from torch import nn
from torch.distributed import ProcessGroup

from deepseek_trainer.model.attention import LatentAttention
from deepseek_trainer.model.layers import FeedForward, RmsNorm, rotary_table
from deepseek_trainer.model.moe import MixtureOfExperts
from deepseek_trainer.parallel.tensor import local


class Block(nn.Module):
    """Attention and feed-forward, each behind a norm and beside a residual."""

    def __init__(self, a: Architecture, *, dense: bool, group: ProcessGroup | None) -> None:
        super().__init__()
        self.attention_norm = RmsNorm(a.hidden)
        self.attention = LatentAttention(a, group)
        self.ffn_norm = RmsNorm(a.hidden)
        self.ffn: FeedForward | MixtureOfExperts = (
            FeedForward(a.hidden, a.dense_ffn, group) if dense else MixtureOfExperts(a, group)
        )

    def forward(
        self, x_btd: torch.Tensor, rotary: torch.Tensor, balance_factor: float
    ) -> torch.Tensor:
        """[B, T, D] to [B, T, D]."""
        x_btd = torch.add(x_btd, self.attention(self.attention_norm(x_btd), rotary))
        y_btd = self.ffn_norm(x_btd)
        if isinstance(self.ffn, MixtureOfExperts):
            return torch.add(x_btd, self.ffn(y_btd, balance_factor))
        return torch.add(x_btd, self.ffn(y_btd))


class DeepSeek(nn.Module):
    """A DeepSeek-V3 language model. Make it under `torch.device("meta")` and give it weights
    afterwards.

    Args:
        architecture: all dimensions.
        group: ranks that split each layer with this one; none for a whole model.
    """

    def __init__(self, architecture: Architecture, group: ProcessGroup | None = None) -> None:
        super().__init__()
        a = architecture
        self.architecture = a
        self.embedding = nn.Parameter(torch.empty(a.vocabulary, a.hidden))
        self.blocks = nn.ModuleList(
            Block(a, dense=layer < a.dense_layers, group=group) for layer in range(a.layers)
        )
        self.norm = RmsNorm(a.hidden)
        self.head = nn.Parameter(torch.empty(a.vocabulary, a.hidden))

    def forward(
        self, token_bt: torch.Tensor, target_bt: torch.Tensor, balance_factor: float
    ) -> torch.Tensor:
        """Sum of the cross-entropy over all tokens, in nats, fp32 scalar."""
        a = self.architecture
        rotary = rotary_table(token_bt.shape[1], a.mla.rope_dim, a.rope_theta, token_bt.device)
        x_btd = F.embedding(token_bt, local(self.embedding))
        for block in self.blocks:
            x_btd = block(x_btd, rotary, balance_factor)
        logit_btv = F.linear(self.norm(x_btd), local(self.head))
        return F.cross_entropy(
            logit_btv.flatten(0, 1).float(), target_bt.flatten(), reduction="sum"
        )

    @property
    def mixtures(self) -> list[MixtureOfExperts]:
        """The mixture of experts of every layer that has one, in order."""
        return [part for part in self.modules() if isinstance(part, MixtureOfExperts)]

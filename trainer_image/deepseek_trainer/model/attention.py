"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1).

Shapes: B batch, T sequence, D hidden width, H heads of this rank, Q query rank, K key-value rank, N
channels without position, R rotary channels, V value channels.
"""

import torch
import torch.nn.functional as F  # noqa: N812
from dstrain_api.model import Architecture
from torch import nn
from torch.distributed import ProcessGroup

from deepseek_trainer.model.layers import RmsNorm, rotate
from deepseek_trainer.parallel.tensor import enter, leave, local


class LatentAttention(nn.Module):
    """Causal attention with compressed queries, keys and values; heads are split over the tensor
    group.

    The compressions are small and computed by every rank of the group; only they are summed in
    backward.
    """

    def __init__(self, a: Architecture, group: ProcessGroup | None) -> None:
        super().__init__()
        mla = a.mla
        self.mla = mla
        self.group = group
        if mla.q_rank:
            self.query_down = nn.Parameter(torch.empty(mla.q_rank, a.hidden))
            self.query_norm = RmsNorm(mla.q_rank)
        query_width = a.heads * (mla.nope_dim + mla.rope_dim)
        self.query_up = nn.Parameter(torch.empty(query_width, mla.q_rank or a.hidden))
        self.key_value_down = nn.Parameter(torch.empty(mla.kv_rank + mla.rope_dim, a.hidden))
        self.key_value_norm = RmsNorm(mla.kv_rank)
        self.key_value_up = nn.Parameter(
            torch.empty(a.heads * (mla.nope_dim + mla.v_dim), mla.kv_rank)
        )
        self.attention_out = nn.Parameter(torch.empty(a.hidden, a.heads * mla.v_dim))

    def forward(self, x_btd: torch.Tensor, rotary: torch.Tensor) -> torch.Tensor:
        """[B, T, D] to [B, T, D]; `rotary` is a table of `layers.rotary_table`."""
        mla = self.mla
        query_btq = x_btd
        if mla.q_rank:
            query_btq = self.query_norm(F.linear(x_btd, local(self.query_down)))
        latent_btk, key_rope_btr = F.linear(x_btd, local(self.key_value_down)).split(
            [mla.kv_rank, mla.rope_dim], dim=-1
        )
        latent_btk = self.key_value_norm(latent_btk)
        query_btq, latent_btk, key_rope_btr = enter(self.group, query_btq, latent_btk, key_rope_btr)

        query_bhtn, query_rope_bhtr = _heads(
            F.linear(query_btq, local(self.query_up)), mla.nope_dim, mla.rope_dim
        )
        key_bhtn, value_bhtv = _heads(
            F.linear(latent_btk, local(self.key_value_up)), mla.nope_dim, mla.v_dim
        )
        heads = query_bhtn.shape[1]
        key_rope_bhtr = rotate(key_rope_btr.unsqueeze(1), rotary).expand(-1, heads, -1, -1)
        out_bhtv = F.scaled_dot_product_attention(
            torch.cat([query_bhtn, rotate(query_rope_bhtr, rotary)], dim=-1),
            torch.cat([key_bhtn, key_rope_bhtr], dim=-1),
            value_bhtv,
            is_causal=True,
        )
        return leave(
            self.group, F.linear(out_bhtv.transpose(1, 2).flatten(2), local(self.attention_out))
        )


def _heads(x: torch.Tensor, first: int, second: int) -> tuple[torch.Tensor, torch.Tensor]:
    """[B, T, H * (first + second)] to [B, H, T, first] and [B, H, T, second]."""
    x_bhtc = x.unflatten(-1, (-1, first + second)).transpose(1, 2)
    one, other = x_bhtc.split([first, second], dim=-1)
    return one, other

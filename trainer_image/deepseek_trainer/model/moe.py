"""Mixture of experts with shared experts and bias-based balance (DeepSeek-V3, arXiv 2412.19437,
section 2.1.2).

Shapes: B batch, T sequence, N = B x T tokens, D hidden width, F inner width of this rank, E
experts, K experts per token, S = N x K token-expert pairs sorted by expert.
"""

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from dstrain_api.model import Architecture, MoeSpec
from torch import nn
from torch.autograd.function import FunctionCtx
from torch.distributed import ProcessGroup

from deepseek_trainer.model.layers import FeedForward
from deepseek_trainer.parallel.tensor import enter, leave, local


class MixtureOfExperts(nn.Module):
    """Routed and shared experts; the inner width of all of them is split over the tensor group. No
    token is dropped.

    `expert_bias` steers the choice of experts, never their weight; it is moved after an optimizer
    step by the load that `take_load` counted.
    """

    expert_bias: torch.Tensor

    def __init__(self, a: Architecture, group: ProcessGroup | None) -> None:
        super().__init__()
        moe = a.moe
        self.moe = moe
        self.group = group
        self.router = nn.Parameter(torch.empty(moe.experts, a.hidden))
        self.expert_gate = nn.Parameter(torch.empty(moe.experts, a.hidden, moe.ffn))
        self.expert_up = nn.Parameter(torch.empty(moe.experts, a.hidden, moe.ffn))
        self.expert_down = nn.Parameter(torch.empty(moe.experts, moe.ffn, a.hidden))
        self.shared = FeedForward(a.hidden, moe.shared * moe.ffn, group) if moe.shared else None
        self.register_buffer("expert_bias", torch.empty(moe.experts, dtype=torch.float32))
        self._load_e: torch.Tensor | None = None

    def forward(self, x_btd: torch.Tensor, balance_factor: float) -> torch.Tensor:
        """[B, T, D] to [B, T, D]; `balance_factor` scales the gradient of the sequence-wise balance
        loss.
        """
        moe = self.moe
        x_nd = x_btd.flatten(0, 1)
        score_ne = F.linear(x_nd.float(), local(self.router).float()).sigmoid()
        expert_nk, weight_nk = route(score_ne, self.expert_bias, moe)
        count_be = _count(expert_nk.unflatten(0, x_btd.shape[:2]).flatten(1), moe.experts)
        load_e = count_be.sum(0)
        self._load_e = load_e if self._load_e is None else self._load_e + load_e
        if moe.sequence_loss_weight and self.training:
            loss = sequence_balance_loss(score_ne.unflatten(0, x_btd.shape[:2]), count_be, moe)
            weight_nk = _InjectLoss.apply(  # type: ignore[no-untyped-call]
                weight_nk, loss, balance_factor * moe.sequence_loss_weight
            )
        x_nd, weight_nk = enter(self.group, x_nd, weight_nk)
        out_nd = self._experts(x_nd, expert_nk, weight_nk, load_e)
        if self.shared is not None:
            out_nd = out_nd + self.shared.part(x_nd)
        return leave(self.group, out_nd).view_as(x_btd)

    def take_load(self) -> torch.Tensor:
        """Tokens per expert since the last call, int64 [E]."""
        load_e, self._load_e = self._load_e, None
        return torch.zeros_like(self.expert_bias, dtype=torch.int64) if load_e is None else load_e

    def _experts(
        self,
        x_nd: torch.Tensor,
        expert_nk: torch.Tensor,
        weight_nk: torch.Tensor,
        load_e: torch.Tensor,
    ) -> torch.Tensor:
        order_s = expert_nk.flatten().argsort(stable=True)
        token_s = order_s // self.moe.top_k
        end_e = load_e.cumsum(0, dtype=torch.int32)
        x_sd = x_nd[token_s]
        gate_sf = _grouped(x_sd, local(self.expert_gate), end_e)
        up_sf = _grouped(x_sd, local(self.expert_up), end_e)
        y_sd = _grouped(F.silu(gate_sf) * up_sf, local(self.expert_down), end_e)
        weight_s1 = weight_nk.flatten()[order_s].unsqueeze(-1).to(y_sd.dtype)
        return torch.zeros_like(x_nd).index_add(0, token_s, y_sd * weight_s1)


def route(
    score_ne: torch.Tensor, bias_e: torch.Tensor, moe: MoeSpec
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which experts each token visits and with what weight: ([N, K] indices, [N, K] weights).

    The bias takes part in the choice only. With groups, a token chooses from the `limited_groups`
    groups whose two best experts have the largest sum.
    """
    choice_ne = score_ne.detach() + bias_e
    if moe.limited_groups < moe.groups:
        choice_nge = choice_ne.unflatten(-1, (moe.groups, -1))
        best = min(2, choice_nge.shape[-1])
        group_ng = choice_nge.topk(best, dim=-1).values.sum(-1)
        chosen_ng = group_ng.topk(moe.limited_groups, dim=-1).indices
        closed_ng = torch.ones_like(group_ng, dtype=torch.bool).scatter(1, chosen_ng, False)
        choice_ne = choice_nge.masked_fill(closed_ng.unsqueeze(-1), -torch.inf).flatten(1)
    expert_nk = choice_ne.topk(moe.top_k, dim=-1).indices
    weight_nk = score_ne.gather(1, expert_nk)
    weight_nk = weight_nk / (weight_nk.sum(-1, keepdim=True) + 1e-20)
    return expert_nk, weight_nk * moe.route_scale


def sequence_balance_loss(
    score_bte: torch.Tensor, count_be: torch.Tensor, moe: MoeSpec
) -> torch.Tensor:
    """Sum over sequences of the balance loss (equations 17 to 20), without its weight; scalar.

    1 for a sequence whose tokens and scores are spread evenly. The share of tokens counts the
    experts that were chosen.
    """
    tokens = score_bte.shape[1]
    share_be = count_be * (moe.experts / (moe.top_k * tokens))
    mean_be = (score_bte / (score_bte.sum(-1, keepdim=True) + 1e-20)).mean(1)
    return (share_be * mean_be).sum()


def moved_bias(bias_e: torch.Tensor, load_e: torch.Tensor, speed: float) -> torch.Tensor:
    """The bias after a step: up for experts below the mean load, down for those above."""
    return bias_e + speed * (load_e.mean() - load_e).sign().to(bias_e.dtype)


def _count(index: torch.Tensor, size: int) -> torch.Tensor:
    """How often each of `size` values occurs in every row, int64 (bincount has no rows, histc no
    int64 on CPU).
    """
    zeros = torch.zeros(index.shape[0], size, dtype=torch.int64, device=index.device)
    return zeros.scatter_add(1, index, torch.ones_like(index))


def _grouped(x_si: torch.Tensor, weight_eio: torch.Tensor, end_e: torch.Tensor) -> torch.Tensor:
    """Rows [end_e[e-1], end_e[e]) times weight e; [S, I] to [S, O]."""
    return torch._grouped_mm(x_si, weight_eio, offs=end_e)


class _InjectLoss(torch.autograd.Function):
    """Identity on `x`; backward adds `factor` x gradient of `loss`, so that the loss need not be
    carried to the end.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, x: torch.Tensor, loss: torch.Tensor, factor: float) -> Any:
        ctx.factor = factor  # type: ignore[attr-defined]
        ctx.dtype = loss.dtype  # type: ignore[attr-defined]
        return x.view_as(x)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: torch.Tensor) -> Any:
        factor = ctx.factor  # type: ignore[attr-defined]
        return grad, grad.new_full((), factor, dtype=ctx.dtype), None  # type: ignore[attr-defined]

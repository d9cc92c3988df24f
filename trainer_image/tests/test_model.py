"""The model's parts against straightforward arithmetic."""

import math

import pytest
import torch
from deepseek_trainer.flops import active_parameters, flops_per_token
from deepseek_trainer.model.attention import LatentAttention
from deepseek_trainer.model.deepseek import DeepSeek
from deepseek_trainer.model.init import initialise, weight_seed
from deepseek_trainer.model.layers import RmsNorm, rotary_table, rotate
from deepseek_trainer.model.moe import (
    MixtureOfExperts,
    moved_bias,
    route,
    sequence_balance_loss,
)
from dstrain_api.model import PRESETS, Architecture, MoeSpec
from torch import nn
from torch.nn.functional import linear, silu

from .examples import tiny


def random(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(std=0.3, generator=generator)
        for buffer in model.buffers():
            buffer.zero_()


def direct_attention(m: LatentAttention, x: torch.Tensor, a: Architecture) -> torch.Tensor:
    """One token and one head at a time."""
    mla, (batch, length, _) = a.mla, x.shape
    table = rotary_table(length, mla.rope_dim, a.rope_theta, x.device)
    out = torch.zeros(batch, length, a.heads * mla.v_dim)
    query_input = m.query_norm(linear(x, m.query_down)) if mla.q_rank else x
    query = linear(query_input, m.query_up).view(batch, length, a.heads, -1)
    latent, key_rope = linear(x, m.key_value_down).split([mla.kv_rank, mla.rope_dim], -1)
    key_value = linear(m.key_value_norm(latent), m.key_value_up).view(batch, length, a.heads, -1)
    key_rope = rotate(key_rope.unsqueeze(1), table).squeeze(1)
    for b in range(batch):
        for head in range(a.heads):
            q_nope, q_rope = query[b, :, head].split([mla.nope_dim, mla.rope_dim], -1)
            q_rope = rotate(q_rope, table)
            k_nope, v = key_value[b, :, head].split([mla.nope_dim, mla.v_dim], -1)
            for t in range(length):
                scores = k_nope[: t + 1] @ q_nope[t] + key_rope[b, : t + 1] @ q_rope[t]
                share = (scores / math.sqrt(mla.nope_dim + mla.rope_dim)).softmax(0)
                columns = slice(head * mla.v_dim, (head + 1) * mla.v_dim)
                out[b, t, columns] = share @ v[: t + 1]
    return linear(out, m.attention_out)


@pytest.mark.parametrize("q_rank", [0, 24])
def test_latent_attention_is_causal_attention_with_decoupled_positions(q_rank: int) -> None:
    base = tiny()
    a = base.model_copy(update={"mla": base.mla.model_copy(update={"q_rank": q_rank})})
    attention = LatentAttention(a, None)
    random(attention)
    x = torch.randn(2, 7, a.hidden, generator=torch.Generator().manual_seed(1))
    table = rotary_table(7, a.mla.rope_dim, a.rope_theta, x.device)
    with torch.no_grad():
        torch.testing.assert_close(attention(x, table), direct_attention(attention, x, a))


def test_rotated_products_depend_on_the_distance_only() -> None:
    table = rotary_table(50, 8, 10_000.0, torch.device("cpu"))
    q, k = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))
    rotated_q, rotated_k = (rotate(x.expand(50, 8), table) for x in (q, k))
    products = rotated_q @ rotated_k.T
    for distance in (0, 3, 17):
        torch.testing.assert_close(
            products.diagonal(distance), products[0, distance].expand(50 - distance)
        )


def direct_mixture(m: MixtureOfExperts, x: torch.Tensor) -> torch.Tensor:
    """One token at a time, every expert a loop."""
    out = torch.zeros_like(x)
    for b, row in enumerate(x):
        for t, token in enumerate(row):
            score = (m.router @ token).sigmoid().unsqueeze(0)
            experts, weights = route(score, m.expert_bias, m.moe)
            for expert, weight in zip(experts[0], weights[0], strict=True):
                gate, up = m.expert_gate[expert], m.expert_up[expert]
                inner = silu(token @ gate) * (token @ up)
                out[b, t] += weight * (inner @ m.expert_down[expert])
            out[b, t] += m.shared.part(token) if m.shared else 0
    return out


@pytest.mark.parametrize("shared", [0, 2])
def test_a_mixture_is_the_weighted_sum_of_its_chosen_experts(shared: int) -> None:
    a = tiny(shared=shared)
    mixture = MixtureOfExperts(a, None)
    random(mixture)
    x = torch.randn(2, 5, a.hidden, generator=torch.Generator().manual_seed(1))
    x_direct = x.clone().requires_grad_()
    x.requires_grad_()
    out, expected = mixture.eval()(x, 0.0), direct_mixture(mixture, x_direct)
    torch.testing.assert_close(out, expected)
    weights = list(mixture.parameters())
    found = torch.autograd.grad(out.square().sum(), [x, *weights])
    wanted = torch.autograd.grad(expected.square().sum(), [x_direct, *weights])
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * float(other.abs().max()))


def test_the_load_counts_every_choice_once() -> None:
    a = tiny()
    mixture = MixtureOfExperts(a, None)
    random(mixture)
    for _ in range(2):
        mixture(torch.randn(2, 5, a.hidden), 0.0)
    assert mixture.take_load().sum() == 2 * 2 * 5 * a.moe.top_k
    assert mixture.take_load().tolist() == [0] * a.moe.experts


def test_weights_are_scores_normalised_over_the_chosen_and_scaled() -> None:
    moe = MoeSpec(experts=4, top_k=2, route_scale=2.5)
    score = torch.tensor([[0.1, 0.6, 0.2, 0.4]])
    experts, weights = route(score, torch.zeros(4), moe)
    assert experts.tolist() == [[1, 3]]
    torch.testing.assert_close(weights, torch.tensor([[1.5, 1.0]]))


def test_the_bias_changes_the_choice_and_not_the_weight() -> None:
    moe = MoeSpec(experts=4, top_k=2)
    score = torch.tensor([[0.1, 0.6, 0.2, 0.4]])
    experts, weights = route(score, torch.tensor([0.9, 0.0, 0.0, 0.0]), moe)
    assert experts.tolist() == [[0, 1]]
    torch.testing.assert_close(weights, torch.tensor([[0.1, 0.6]]) / 0.7)


def test_a_token_stays_in_its_best_groups() -> None:
    moe = MoeSpec(experts=8, top_k=2, groups=4, limited_groups=1)
    # The best expert (0.9) is in a group whose two best sum to less than those of group 1.
    score = torch.tensor([[0.9, 0.0, 0.5, 0.6, 0.1, 0.1, 0.8, 0.1]])
    experts, _ = route(score, torch.zeros(8), moe)
    assert sorted(experts[0].tolist()) == [2, 3]


def test_the_bias_moves_towards_the_mean_load() -> None:
    moved = moved_bias(torch.zeros(4), torch.tensor([0.0, 4.0, 8.0, 4.0]).double(), 0.001)
    torch.testing.assert_close(moved, torch.tensor([0.001, 0.0, -0.001, 0.0]))
    assert moved.dtype == torch.float32


def test_even_spread_has_a_balance_loss_of_one_per_sequence() -> None:
    moe = MoeSpec(experts=4, top_k=2)
    score = torch.full((3, 8, 4), 0.5)
    even, lopsided = torch.full((3, 4), 4), torch.tensor([[8, 8, 0, 0]] * 3)
    torch.testing.assert_close(sequence_balance_loss(score, even, moe), torch.tensor(3.0))
    score = torch.tensor([0.9, 0.9, 0.1, 0.1]).expand(3, 8, 4)
    assert sequence_balance_loss(score, lopsided, moe) > 5


def test_the_injected_balance_gradient_is_that_of_the_added_loss() -> None:
    a = tiny(sequence_loss_weight=0.5)
    mixture = MixtureOfExperts(a, None)
    random(mixture)
    x = torch.randn(2, 5, a.hidden, generator=torch.Generator().manual_seed(1))
    (with_injection,) = torch.autograd.grad(mixture(x, 3.0).sum(), [mixture.router])
    (without,) = torch.autograd.grad(mixture.eval()(x, 3.0).sum(), [mixture.router])
    score = linear(x.flatten(0, 1), mixture.router).sigmoid()
    experts, _ = route(score, mixture.expert_bias, a.moe)
    counts = torch.stack([row.flatten().bincount(minlength=8) for row in experts.view(2, 5, 2)])
    loss = sequence_balance_loss(score.view(2, 5, -1), counts, a.moe)
    (of_loss,) = torch.autograd.grad(loss, [mixture.router])
    torch.testing.assert_close(with_injection - without, 3.0 * 0.5 * of_loss)


def test_initial_weights_have_the_wanted_spread_and_differ_by_name_and_seed() -> None:
    models = [DeepSeek(PRESETS["mini"]) for _ in range(3)]
    for model, seed in zip(models, (1, 1, 2), strict=True):
        initialise(model, seed=seed)
    first, again, other = (dict(model.named_parameters()) for model in models)
    assert first["embedding"].std().item() == pytest.approx(0.02, rel=0.02)
    assert torch.equal(first["embedding"], again["embedding"])
    assert not torch.equal(first["embedding"], other["embedding"])
    assert not torch.equal(first["embedding"], first["head"])
    assert all((w == 1).all() for w in first.values() if w.ndim == 1)
    assert weight_seed(1, "a") != weight_seed(1, "b")


def test_a_norm_has_unit_mean_square() -> None:
    norm = RmsNorm(64)
    nn.init.ones_(norm.weight)
    out = norm(torch.randn(3, 64) * 10)
    torch.testing.assert_close(out.square().mean(-1), torch.ones(3), rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    ("preset", "billions"),
    # "37B activated parameters" (arXiv 2412.19437) and "2.4B" (arXiv 2405.04434) count the
    # embedding too, which multiplies nothing.
    [("v3-671b", 37.0), ("v2-lite", 2.4)],
)
def test_active_parameters_are_those_that_were_published(preset: str, billions: float) -> None:
    a = PRESETS[preset]
    embedding = a.vocabulary * a.hidden
    assert active_parameters(a) + embedding == pytest.approx(billions * 1e9, rel=0.12)


def test_active_parameters_of_the_mini_model_are_its_matrices_without_idle_experts() -> None:
    a = PRESETS["mini"]
    model = DeepSeek(a)
    matrices = sum(w.numel() for w in model.parameters() if w.ndim > 1) - model.embedding.numel()
    idle = 3 * a.hidden * a.moe.ffn * (a.moe.experts - a.moe.top_k)
    assert active_parameters(a) == matrices - idle
    assert flops_per_token(a, 64) > 6 * active_parameters(a)

"""The architecture of a DeepSeek model: presets and what a training may override in them.

Dimensions are those of the published configurations of DeepSeek-V2-Lite and DeepSeek-V3 (arXiv 2405.04434, 2412.19437).
"""

from typing import Annotated, Final, Literal

from pydantic import Field

from dstrain_api.base import ApiModel

Size = Annotated[int, Field(ge=1, le=1_000_000)]


class MlaSpec(ApiModel):
    """Multi-head latent attention: what is compressed, and how wide a head is."""

    q_rank: int = Field(
        0, ge=0, le=1_000_000,
        description="Rank of the query compression, in channels; 0 projects queries directly. Example: 1536.",
    )  # fmt: skip
    kv_rank: Size = Field(512, description="Rank of the key-value latent, in channels. Example: 512.")
    nope_dim: Size = Field(128, description="Channels per head without position. Example: 128.")
    rope_dim: Size = Field(64, description="Channels per head that carry the rotary position; even. Example: 64.")
    v_dim: Size = Field(128, description="Value channels per head. Example: 128.")


class MoeSpec(ApiModel):
    """The mixture of experts of every layer after the dense ones."""

    experts: Size = Field(64, description="Routed experts per layer. Example: 256.")
    top_k: Size = Field(6, description="Routed experts that each token visits. Example: 8.")
    shared: int = Field(2, ge=0, le=64, description="Experts that every token visits. Example: 1.")
    ffn: Size = Field(1408, description="Inner width of one expert, in channels. Example: 2048.")
    route_scale: float = Field(1.0, gt=0, le=100, description="Factor on the routed output. Example: 2.5.")
    groups: Size = Field(1, description="Groups the experts are split into for limited routing; 1 turns it off. Example: 8.")
    limited_groups: Size = Field(1, description="Groups a token may visit. Example: 4.")
    bias_update_speed: float = Field(
        0.001, ge=0, le=1,
        description="Step of the balancing bias after each optimizer step; 0 turns it off. Example: 0.001.",
    )  # fmt: skip
    sequence_loss_weight: float = Field(
        0.0001, ge=0, le=1, description="Weight of the sequence-wise balance loss; 0 turns it off. Example: 0.0001."
    )


class Architecture(ApiModel):
    """All dimensions of one model, after preset and overrides are joined."""

    vocabulary: Size = Field(102_400, description="Entries of the embedding. Example: 129280.")
    layers: Size = Field(27, description="Transformer blocks. Example: 61.")
    dense_layers: int = Field(1, ge=0, le=1000, description="Leading blocks without experts. Example: 3.")
    hidden: Size = Field(2048, description="Residual width, in channels. Example: 7168.")
    heads: Size = Field(16, description="Attention heads. Example: 128.")
    dense_ffn: Size = Field(10_944, description="Inner width of a dense block, in channels. Example: 18432.")
    rope_theta: float = Field(10_000.0, gt=1, description="Base of the rotary frequencies. Example: 10000.")
    init_std: float = Field(0.006, gt=0, le=1, description="Standard deviation of the initial weights. Example: 0.006.")
    mla: MlaSpec = Field(default_factory=MlaSpec, description="Latent attention.")
    moe: MoeSpec = Field(default_factory=MoeSpec, description="Mixture of experts.")


PRESETS: Final[dict[str, Architecture]] = {
    # Learns real text on two CPU cores in a minute; every code path of the large presets, nothing of their size.
    "mini": Architecture(
        vocabulary=1024, layers=2, dense_layers=1, hidden=64, heads=4, dense_ffn=192, init_std=0.02,
        mla=MlaSpec(q_rank=32, kv_rank=32, nope_dim=16, rope_dim=8, v_dim=16),
        moe=MoeSpec(experts=4, top_k=2, shared=1, ffn=64),
    ),
    "v2-lite": Architecture(),
    "v3-671b": Architecture(
        vocabulary=129_280, layers=61, dense_layers=3, hidden=7168, heads=128, dense_ffn=18_432,
        mla=MlaSpec(q_rank=1536),
        moe=MoeSpec(experts=256, top_k=8, shared=1, ffn=2048, route_scale=2.5, groups=8, limited_groups=4),
    ),
}  # fmt: skip

Preset = Literal["mini", "v2-lite", "v3-671b"]


class MlaOverrides(ApiModel):
    """Changes of the preset's latent attention. Absent fields keep the preset's value."""

    q_rank: int | None = Field(None, ge=0, le=1_000_000, description="Rank of the query compression, in channels; 0 projects directly. Default: the preset's. Example: 32.")
    kv_rank: Size | None = Field(None, description="Rank of the key-value latent, in channels. Default: the preset's. Example: 32.")
    nope_dim: Size | None = Field(None, description="Channels per head without position. Default: the preset's. Example: 16.")
    rope_dim: Size | None = Field(None, description="Rotary channels per head; even. Default: the preset's. Example: 8.")
    v_dim: Size | None = Field(None, description="Value channels per head. Default: the preset's. Example: 16.")


class MoeOverrides(ApiModel):
    """Changes of the preset's mixture of experts. Absent fields keep the preset's value."""

    experts: Size | None = Field(None, description="Routed experts per layer. Default: the preset's. Example: 4.")
    top_k: Size | None = Field(None, description="Routed experts that each token visits; at most experts. Default: the preset's. Example: 2.")
    shared: int | None = Field(None, ge=0, le=64, description="Experts that every token visits. Default: the preset's. Example: 1.")
    ffn: Size | None = Field(None, description="Inner width of one expert, in channels. Default: the preset's. Example: 64.")
    route_scale: float | None = Field(None, gt=0, le=100, description="Factor on the routed output. Default: the preset's. Example: 2.5.")
    groups: Size | None = Field(None, description="Groups for limited routing; divides experts. Default: the preset's. Example: 8.")
    limited_groups: Size | None = Field(None, description="Groups a token may visit; at most groups. Default: the preset's. Example: 4.")
    bias_update_speed: float | None = Field(None, ge=0, le=1, description="Step of the balancing bias per optimizer step. Default: the preset's. Example: 0.001.")
    sequence_loss_weight: float | None = Field(None, ge=0, le=1, description="Weight of the sequence-wise balance loss. Default: the preset's. Example: 0.0001.")


class ModelOverrides(ApiModel):
    """Changes of a preset. Absent fields keep the preset's value."""

    vocabulary: Size | None = Field(None, description="Entries of the embedding; at least the tokenizer's. Default: the preset's. Example: 1024.")
    layers: Size | None = Field(None, description="Transformer blocks. Default: the preset's. Example: 2.")
    dense_layers: int | None = Field(None, ge=0, le=1000, description="Leading blocks without experts; at most layers. Default: the preset's. Example: 1.")
    hidden: Size | None = Field(None, description="Residual width, in channels. Default: the preset's. Example: 64.")
    heads: Size | None = Field(None, description="Attention heads; a multiple of parallelism.tensor. Default: the preset's. Example: 4.")
    dense_ffn: Size | None = Field(None, description="Inner width of a dense block, in channels. Default: the preset's. Example: 192.")
    rope_theta: float | None = Field(None, gt=1, description="Base of the rotary frequencies. Default: the preset's. Example: 10000.")
    init_std: float | None = Field(None, gt=0, le=1, description="Standard deviation of the initial weights. Default: the preset's. Example: 0.02.")
    mla: MlaOverrides = Field(default_factory=MlaOverrides, description="Changes of the latent attention. Default: none. Example: {kvRank: 32}.")
    moe: MoeOverrides = Field(default_factory=MoeOverrides, description="Changes of the mixture of experts. Default: none. Example: {experts: 4, topK: 2}.")


class ModelSpec(ApiModel):
    """Which model is trained: a preset and what differs from it."""

    preset: Preset = Field(description="Published architecture to start from: mini (CPU), v2-lite (16B) or v3-671b. Required. Example: v2-lite.")
    overrides: ModelOverrides = Field(default_factory=ModelOverrides, description="Dimensions that differ from the preset. Default: none. Example: {layers: 2}.")

    def resolve(self) -> Architecture:
        """The preset with the overrides applied. Whether its dimensions fit together is for `dstrain_api.rules`."""
        base = PRESETS[self.preset]
        changes = self.overrides.model_dump(exclude_none=True, by_alias=False)
        nested = {
            "mla": base.mla.model_copy(update=changes.pop("mla", {})),
            "moe": base.moe.model_copy(update=changes.pop("moe", {})),
        }
        return base.model_copy(update={**changes, **nested})

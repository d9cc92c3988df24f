"""Model FLOPs and what share of the hardware's peak they are.

Formula: 6 x matmul parameters that a token visits, plus causal attention, forward and backward.
Recomputation is not counted, nor the embedding, which multiplies nothing.
"""

from typing import Final

import torch
from dstrain_api.model import Architecture

# Dense bf16 and fp16 peak of one device in FLOP/s, from the vendors' data sheets, by a part of the
# device's name.
PEAK_FLOPS: Final = (
    ("B200", 2.25e15),
    ("GH200", 9.89e14),
    ("H200", 9.89e14),
    ("H100 PCIe", 7.56e14),
    ("H100 NVL", 8.35e14),
    ("H100", 9.89e14),
    ("H800", 9.89e14),
    ("H20", 1.48e14),
    ("A100", 3.12e14),
    ("A800", 3.12e14),
    ("L40S", 3.62e14),
    ("A10G", 7.0e13),
)


def active_parameters(a: Architecture) -> int:
    """Matmul parameters that one token visits."""
    mla = a.mla
    query = (mla.nope_dim + mla.rope_dim) * a.heads
    attention = (
        (a.hidden * mla.q_rank + mla.q_rank * query if mla.q_rank else a.hidden * query)
        + a.hidden * (mla.kv_rank + mla.rope_dim)
        + mla.kv_rank * a.heads * (mla.nope_dim + mla.v_dim)
        + a.heads * mla.v_dim * a.hidden
    )
    dense = 3 * a.hidden * a.dense_ffn
    mixture = 3 * a.hidden * a.moe.ffn * (a.moe.top_k + a.moe.shared) + a.hidden * a.moe.experts
    sparse_layers = a.layers - a.dense_layers
    return (
        a.layers * attention
        + a.dense_layers * dense
        + sparse_layers * mixture
        + a.vocabulary * a.hidden
    )


def flops_per_token(a: Architecture, sequence_length: int) -> float:
    """FLOPs of one token, forward and backward; it attends to half of the sequence on average."""
    width = a.heads * (a.mla.nope_dim + a.mla.rope_dim + a.mla.v_dim)
    return 6.0 * active_parameters(a) + 3.0 * a.layers * width * sequence_length


def peak_flops(device: torch.device, compute: str) -> float | None:
    """Peak of one device in FLOP/s; none where it is unknown (CPU, fp32, other devices)."""
    if device.type != "cuda" or compute == "fp32":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_FLOPS if part in name), None)

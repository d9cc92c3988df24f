"""The learning rate, by tokens: a resize does not shift it."""

import math

from dstrain_api.spec import OptimizerSpec


def learning_rate(spec: OptimizerSpec, tokens: int, total_tokens: int) -> float:
    """Rate of the step that ends at `tokens`: linear warm-up, then the decay down to its floor."""
    schedule = spec.schedule
    warmup_tokens = schedule.warmup.ratio * total_tokens
    if tokens < warmup_tokens:
        return spec.lr * tokens / warmup_tokens
    if schedule.decay == "constant":
        return spec.lr
    done = min(1.0, (tokens - warmup_tokens) / max(total_tokens - warmup_tokens, 1))
    cosine = 0.5 * (1.0 + math.cos(math.pi * done))
    return spec.lr * (schedule.min_ratio + (1.0 - schedule.min_ratio) * cosine)

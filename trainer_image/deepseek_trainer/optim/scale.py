"""Dynamic loss scale for fp16: large enough that small gradients survive, halved when one
overflows.
"""

from dataclasses import dataclass, replace
from typing import Final

GROWTH_STEPS: Final = 2000  # finite steps in a row before the scale is doubled
LARGEST: Final = 2.0**24


@dataclass(frozen=True)
class LossScale:
    """Factor on the loss, and finite steps since it last changed. fp32 and bf16 keep it at 1."""

    scale: float = 1.0
    finite_steps: int = 0

    @classmethod
    def start(cls, compute: str) -> "LossScale":
        """The scale of a new training."""
        return cls(2.0**16 if compute == "fp16" else 1.0)

    def after(self, *, finite: bool, compute: str) -> "LossScale":
        """The scale for the next step."""
        if compute != "fp16":
            return self
        if not finite:
            return LossScale(max(1.0, self.scale / 2))
        if self.finite_steps + 1 == GROWTH_STEPS:
            return LossScale(min(LARGEST, self.scale * 2))
        return replace(self, finite_steps=self.finite_steps + 1)

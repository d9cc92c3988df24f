"""Where a training is, apart from its tensors."""

from dataclasses import asdict, dataclass, field
from typing import Any

from deepseek_trainer.optim.scale import LossScale


@dataclass
class Progress:
    """Where a training is. `position` counts samples read since its beginning."""

    step: int = 0
    tokens: int = 0
    position: int = 0
    loss_scale: LossScale = field(default_factory=LossScale)
    rollbacks: int = 0

    def to_json(self) -> dict[str, Any]:
        """As a JSON record."""
        return asdict(self)

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> "Progress":
        """Inverse of `to_json`."""
        return cls(**record | {"loss_scale": LossScale(**record["loss_scale"])})

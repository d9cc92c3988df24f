"""Where a training is, apart from its tensors."""

from dataclasses import asdict, dataclass, field
from typing import Any

from deepseek_trainer.optim.scale import LossScale
from deepseek_trainer.optim.watch import Spans


@dataclass
class Progress:
    """Where a training is.

    `position` counts samples of the stream since its beginning, those that were left out included.
    `left_out` names these as [begin, end); `skipped_steps` had no finite gradient; `rollbacks` went
    back to a checkpoint.
    """

    step: int = 0
    tokens: int = 0
    position: int = 0
    loss_scale: LossScale = field(default_factory=LossScale)
    left_out: Spans = ()
    skipped_steps: int = 0
    rollbacks: int = 0

    def to_json(self) -> dict[str, Any]:
        """As a JSON record."""
        return asdict(self)

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> "Progress":
        """Inverse of `to_json`."""
        return cls(
            **record
            | {
                "loss_scale": LossScale(**record["loss_scale"]),
                "left_out": tuple((begin, end) for begin, end in record["left_out"]),
            }
        )

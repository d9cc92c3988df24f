"""Bad numbers: when a step is only skipped, and when training goes back to a checkpoint and leaves
out the batches that did the harm. Pure; every rank sees the same totals and decides alike.
"""

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Final, Literal

BAD_STEPS: Final = 10  # in a row without a finite gradient: the next will have none either
SPIKE_STEPS: Final = 5  # in a row with a loss far above normal: it does not come back by itself
WINDOW: Final = 128  # losses that say what is normal
LEAST: Final = 32  # of them, before a loss is judged
NEW_NORMAL: Final = 64  # spiking steps in a row after which the level is taken for normal
_SPREADS: Final = 8.0  # a spike is so many spreads above the median
_LEAST_SPREAD: Final = 0.02  # as a ratio of the median: a smooth curve makes no spike of a ripple
_MAD_TO_SIGMA: Final = 1.4826  # of a normal distribution

Spans = tuple[tuple[int, int], ...]


def is_spike(loss: float, normal: Sequence[float]) -> bool:
    """Whether a loss is far above those before it, by median and median absolute deviation: a spike
    among them moves neither.
    """
    if len(normal) < LEAST:
        return False
    middle = median(normal)
    deviation = median(abs(value - middle) for value in normal)
    return loss - middle > _SPREADS * max(_MAD_TO_SIGMA * deviation, _LEAST_SPREAD * middle)


@dataclass(frozen=True)
class Verdict:
    """What a step was: `fine`; `bad`, without a finite gradient; or a `spike` of the loss.

    `begins`: the step before was another. `leave_out`: positions [begin, end) of samples to leave
    out after a return to the last checkpoint; none: go on.
    """

    kind: Literal["fine", "bad", "spike"]
    begins: bool = False
    leave_out: tuple[int, int] | None = None


class Watch:
    """Judges steps in their order.

    Args:
        on_loss_spike: `training.onLossSpike`.
    """

    def __init__(self, on_loss_spike: Literal["warn", "rollback", "ignore"]) -> None:
        self._on_loss_spike = on_loss_spike
        self._normal: deque[float] = deque(maxlen=WINDOW)
        self._kind: Literal["fine", "bad", "spike"] = "fine"
        self._in_a_row = 0
        self._since = 0  # where the samples begin that are to blame
        self._last = 0  # where the samples of the last step began

    def after(self, *, bad: bool, loss: float, begin: int, end: int) -> Verdict:
        """Judge a step.

        Args:
            bad: it had no finite gradient, and the loss scale is not to blame.
            loss: in nats per token; not finite where only the loss scale is to blame.
            begin: position of its first sample.
            end: position of the next step's first sample.
        """
        kind = self._kind_of(bad=bad, loss=loss)
        begins = kind != "fine" and kind != self._kind
        if begins:
            self._in_a_row = 0
            # A spike shows in the step after the update that made it.
            self._since = self._last if kind == "spike" else begin
        self._kind, self._last = kind, begin
        self._in_a_row += 1
        if kind == "fine" and math.isfinite(loss):
            self._normal.append(loss)
        elif kind == "spike" and self._in_a_row == NEW_NORMAL:
            self._normal.clear()
        return Verdict(kind, begins, (self._since, end) if self._is_lasting() else None)

    def went_back(self) -> None:
        """Training goes on from a checkpoint."""
        self._kind, self._in_a_row = "fine", 0

    def _kind_of(self, *, bad: bool, loss: float) -> Literal["fine", "bad", "spike"]:
        if bad:
            return "bad"
        watched = self._on_loss_spike != "ignore"
        return "spike" if watched and is_spike(loss, self._normal) else "fine"

    def _is_lasting(self) -> bool:
        if self._kind == "bad":
            return self._in_a_row == BAD_STEPS
        rollback = self._on_loss_spike == "rollback"
        return self._kind == "spike" and rollback and self._in_a_row == SPIKE_STEPS


def next_batch(position: int, size: int, left_out: Spans) -> int:
    """The first position from here on at which `size` samples in a row are not left out."""
    for begin, end in sorted(left_out):
        if position < end and begin < position + size:
            position = end
    return position


def touches(span: tuple[int, int], left_out: Spans) -> bool:
    """Whether a span overlaps with, or directly follows, what was left out before: then it was not
    the samples.
    """
    return any(span[0] <= end and begin <= span[1] for begin, end in left_out)

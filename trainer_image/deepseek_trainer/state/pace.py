"""When a checkpoint and a local copy are due."""

import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Final, Literal

# GPU-hours between failures of a training where none is known: the pessimistic projection in Meta's
# account of its clusters (Kokolis et al., HPCA 2025), 29,500 hours, for each of its processes.
FAILURE_HOURS: Final = 29_500
LARGEST_SHARE: Final = 0.01  # of the time that saves, and that local copies, may cost
SHORTEST_COPY_S: Final = 0.25
FIRST_COST_S: Final = 1.0  # of a save, until one was measured
_REMEMBERED: Final = 5  # copies; one that a busy machine delayed says little about the next


def daly_s(cost_s: float, failure_interval_s: float) -> float:
    """Seconds of useful work between two saves that lose least to saves and repeated work (Daly,
    "A higher order estimate of the optimum checkpoint interval", 2006).

    Args:
        cost_s: by which one save holds up training.
        failure_interval_s: mean time between failures.
    """
    if cost_s >= 2 * failure_interval_s:
        return failure_interval_s
    x = math.sqrt(cost_s / (2 * failure_interval_s))
    root = math.sqrt(2 * cost_s * failure_interval_s)
    return root * (1 + x / 3 + x * x / 9) - cost_s


def save_interval_s(
    every_seconds: int | Literal["auto"],
    *,
    cost_s: float,
    durable_s: float,
    failure_interval_s: float,
    world: int,
) -> float:
    """Seconds between the starts of two saves.

    Args:
        every_seconds: of the spec; auto means Daly's optimum, but neither more than 1 % of the time
            nor a new save before the last one is on the storage.
        cost_s: by which one save holds up training.
        durable_s: from the start of a save to its commit.
        failure_interval_s: mean time between failures; 0: not known.
        world: number of processes.
    """
    if every_seconds != "auto":
        return float(every_seconds)
    failure_interval_s = failure_interval_s or FAILURE_HOURS * 3600 / world
    return max(daly_s(cost_s, failure_interval_s), cost_s / LARGEST_SHARE, durable_s)


def copy_interval_s(cost_s: float) -> float:
    """Seconds between the starts of two local copies of which one costs `cost_s`."""
    return max(SHORTEST_COPY_S, cost_s / LARGEST_SHARE)


@dataclass
class Pace:
    """Rank 0's sense of time; the others do as it says.

    Args:
        every_steps: multiples of this step are saved.
        every_seconds, failure_interval_s, world: see `save_interval_s`.
        now: seconds, monotonic.
    """

    every_steps: int
    every_seconds: int | Literal["auto"]
    failure_interval_s: float
    world: int
    now: Callable[[], float] = time.monotonic

    def __post_init__(self) -> None:
        self._saved_s = self.now()
        self._copied_s = -math.inf
        self._save_cost_s: float | None = None
        self._copy_costs_s: deque[float] = deque([0.0], maxlen=_REMEMBERED)
        self._durable_s = 0.0
        self._overdue = False

    def save_is_due(self, step: int) -> bool:
        """Whether the state after this step is to be saved; stays true until it is."""
        interval_s = save_interval_s(
            self.every_seconds,
            cost_s=FIRST_COST_S if self._save_cost_s is None else self._save_cost_s,
            durable_s=self._durable_s,
            failure_interval_s=self.failure_interval_s,
            world=self.world,
        )
        late = self.now() - self._saved_s >= interval_s
        self._overdue = self._overdue or late or step % self.every_steps == 0
        return self._overdue

    def copy_is_due(self) -> bool:
        """Whether the state after this step is to be copied."""
        return self.now() - self._copied_s >= copy_interval_s(median(self._copy_costs_s))

    def hurry(self) -> None:
        """Save as soon as possible."""
        self._overdue = True

    def copied(self) -> None:
        """A copy was begun now."""
        self._copied_s = self.now()

    def saved(self) -> None:
        """A save was begun now."""
        self._saved_s = self.now()
        self._overdue = False

    def copy_took(self, cost_s: float) -> None:
        """A local copy held up training for so long."""
        self._copy_costs_s.append(cost_s)

    def save_took(self, cost_s: float) -> None:
        """A save held up training for so long."""
        self._save_cost_s = cost_s

    def commit_took(self, durable_s: float) -> None:
        """A save was committed so long after its start."""
        self._durable_s = durable_s

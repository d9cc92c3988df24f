"""Ranks that keep the others waiting, step after step. Pure; no clock, no I/O.

A rank counts as slow in a round (10 s of steps, one step at least) whose own work took more than
1.5 times the median of all ranks. It is named after five such rounds in a row, and no more after
five others: what comes and goes within a minute is noise.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median, median_low
from typing import Final

ROUND_S: Final = 10.0
ROUNDS: Final = 5
SLOW: Final = 1.5  # times the median
NAMED: Final = 8  # at most


@dataclass(frozen=True, kw_only=True)
class Straggler:
    """A slow rank; `ratio` is its own work's time over the median of all ranks."""

    rank: int
    ratio: float


class Stragglers:
    """Judges the ranks of one generation."""

    def __init__(self) -> None:
        self._sums_s: list[float] = []
        self._since_s: float | None = None
        self._rounds: deque[list[float]] = deque(maxlen=ROUNDS)
        self._slow: set[int] = set()

    def step(self, ranks_s: Sequence[float], now_s: float) -> bool:
        """A step has ended.

        Args:
            ranks_s: seconds of own work by rank, of any step of late.
            now_s: of any clock.

        Returns:
            Whether this ends a round.
        """
        if self._since_s is None:
            self._since_s, self._sums_s = now_s, [0.0] * len(ranks_s)
            return False  # its work began before the round
        self._sums_s = [sum_s + s for sum_s, s in zip(self._sums_s, ranks_s, strict=True)]
        if now_s - self._since_s < ROUND_S:
            return False
        # Of two ranks the faster one is the measure.
        usual_s = median_low(self._sums_s)
        if usual_s > 0:
            self._rounds.append([sum_s / usual_s for sum_s in self._sums_s])
            self._judge()
        self._since_s, self._sums_s = now_s, [0.0] * len(ranks_s)
        return True

    @property
    def worst(self) -> list[Straggler]:
        """The slow ranks, the slowest first; few of them, if there are many."""
        found = [
            Straggler(rank=rank, ratio=round(median(r[rank] for r in self._rounds), 2))
            for rank in self._slow
        ]
        return sorted(found, key=lambda one: (-one.ratio, one.rank))[:NAMED]

    def _judge(self) -> None:
        if len(self._rounds) < ROUNDS:
            return
        for rank in range(len(self._rounds[-1])):
            slow = [ratios[rank] > SLOW for ratios in self._rounds]
            if all(slow):
                self._slow.add(rank)
            elif not any(slow):
                self._slow.discard(rank)

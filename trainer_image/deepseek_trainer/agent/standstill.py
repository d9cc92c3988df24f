"""How long each local rank takes for what it does, and when that is too long. No clock, no I/O.

A program says in which section it is (`deepseek_trainer.reporting.section`) and which step it has
finished. How long a section lasts is learned; five times the longest of late is too long, but
nothing is before a floor. A program that says nothing is never found to hang: unknown is not bad.
"""

from __future__ import annotations

import threading
from collections import defaultdict, deque
from dataclasses import dataclass

from deepseek_trainer.agent.reports import WorkerReport

START = "init"  # from a process's start to its first step
STEP = "step"
LEARNED = 20  # durations of a section that are remembered
FACTOR = 5.0
STEP_FLOOR_S = 60.0
# For other sections, which happen too seldom to learn from, and for the steps of a program that
# names no sections: what it does between two steps may be an evaluation.
FLOOR_S = 600.0


@dataclass(frozen=True, kw_only=True)
class Standstill:
    """A rank that has made no progress for too long."""

    local_rank: int
    section: str
    step: int
    seconds: float


@dataclass
class _Rank:
    section: str
    since_s: float
    step: int = 0
    done: bool = False


class RankProgress:
    """The ranks of one pod, over all its generations. Each method may be called from any thread.

    Args:
        hang_timeout_s: seconds without a step that are a hang, instead of what is learned.
    """

    def __init__(self, hang_timeout_s: float | None = None) -> None:
        self._hang_timeout_s = hang_timeout_s
        self._durations: defaultdict[str, deque[float]] = defaultdict(lambda: deque(maxlen=LEARNED))
        self._lock = threading.Lock()
        self._ranks: dict[int, _Rank] = {}
        self._speaks = False  # whether this program reports steps or sections at all
        self._names_sections = False

    def begin(self, processes: int, now_s: float) -> None:
        """The processes of the next generation are about to start."""
        with self._lock:
            self._ranks = {rank: _Rank(START, now_s) for rank in range(processes)}

    def heard(self, report: WorkerReport, now_s: float) -> None:
        """A rank has said something."""
        with self._lock:
            rank = self._ranks.get(report.local_rank)
            if rank is None:
                return
            rank.done = rank.done or report.done
            if report.section:
                self._speaks = self._names_sections = True
                self._enter(rank, report.section, now_s)
            elif report.rank_step is not None and report.rank_step != rank.step:
                self._speaks = True
                self._stepped(rank, report.rank_step, now_s)

    def standstills(self, now_s: float) -> list[Standstill]:
        """The ranks that have taken too long."""
        with self._lock:
            if not self._speaks:
                return []
            return [
                Standstill(
                    local_rank=number,
                    section=rank.section,
                    step=rank.step,
                    seconds=now_s - rank.since_s,
                )
                for number, rank in self._ranks.items()
                if not rank.done and now_s - rank.since_s > self.limit_s(rank.section)
            ]

    def step(self) -> int:
        """The last finished step of the ranks that run now; 0 before the first."""
        with self._lock:
            return max((rank.step for rank in self._ranks.values()), default=0)

    def limit_s(self, section: str) -> float:
        """Longest time in a section, in seconds."""
        learned_s = FACTOR * max(self._durations[section], default=0.0)
        if section != STEP:
            return max(FLOOR_S, learned_s, self._hang_timeout_s or 0.0)
        floor_s = STEP_FLOOR_S if self._names_sections else FLOOR_S
        return self._hang_timeout_s or max(floor_s, learned_s)

    def _stepped(self, rank: _Rank, step: int, now_s: float) -> None:
        if rank.section == STEP:
            steps = max(1, step - rank.step)
            self._durations[STEP].append((now_s - rank.since_s) / steps)
            rank.since_s = now_s
        else:
            self._enter(rank, STEP, now_s)
        rank.step = step

    def _enter(self, rank: _Rank, section: str, now_s: float) -> None:
        if rank.section != STEP:
            self._durations[rank.section].append(now_s - rank.since_s)
        rank.section, rank.since_s = section, now_s

"""What a failure costs: its place in the history, its budget, and when it is the last one."""

from __future__ import annotations

from dataclasses import dataclass

from dstrain_api.protocol import HANG
from dstrain_api.quantities import duration_s
from dstrain_api.spec import BudgetSpec
from dstrain_api.status import FREE_CLASSES, DeepSeekTrainingStatus, FailureClass, HistoryEntry

from deepseek_operator.core import nodes
from deepseek_operator.core.clock import rfc3339_ms, seconds
from deepseek_operator.core.evidence import Failure, from_outside
from deepseek_operator.core.situation import Situation

HISTORY_LIMIT = 10
MESSAGE_LIMIT = 2048  # characters of a failure that the status keeps; the end says most
NO_PROGRESS_LIMIT = 3  # generations that end by their own fault, none further than one before


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Why a failure is the last one."""

    reason: str
    message: str


def record(s: Situation, failure: Failure, *, generation: int) -> DeepSeekTrainingStatus:
    """The status with this failure in its history, counters and budget."""
    status = s.status
    entry = HistoryEntry(
        attempt=status.attempt,
        generation=generation,
        failure_class=failure.failure_class,
        reason=failure.reason,
        message=failure.message[-MESSAGE_LIMIT:],
        node=failure.node,
        pod=failure.pod,
        exit_code=failure.exit_code,
        fingerprint=failure.fingerprint,
        stacks=failure.stacks,
        from_step=_reached_step(s, failure, generation),
        committed_step=_committed_step(s),
        time=rfc3339_ms(s.now_s),
    )
    kind = failure.failure_class
    failures = {k: list(v) for k, v in status.failures.items()}
    budget = _budget(s, kind)
    if budget:
        window_s = duration_s(budget.window)
        recent = [t for t in failures.get(kind, []) if s.now_s - seconds(t) < window_s]
        # One more than the budget is enough to know that it is spent.
        failures[kind] = [*recent, entry.time][-(budget.max + 1) :]
    return status.model_copy(
        update={
            "history": [*status.history, entry][-HISTORY_LIMIT:],
            "restarts": status.restarts.plus(kind),
            "failures": failures,
            "nodes": nodes.blame(s, failure),
        }
    )


def verdict(s: Situation, failure: Failure, after: DeepSeekTrainingStatus) -> Verdict | None:
    """Why this failure, which is the newest of the history, is the last one; None to repair it."""
    entry = after.history[-1]
    if _repeated(s, after.history):
        text = f"the same error at step {entry.from_step} twice: {failure.message}"
        return Verdict(reason="RepeatedError", message=text)
    if _is_own_fault(entry) and _fruitless(s, after.history) >= NO_PROGRESS_LIMIT:
        highest = max(h.from_step for h in after.history)
        text = (
            f"{NO_PROGRESS_LIMIT} generations in a row ended without a step after step {highest} "
            f"and without a new checkpoint; the last one: {failure.message}"
        )
        return Verdict(reason="NoProgress", message=text)
    budget = _budget(s, failure.failure_class)
    times = after.failures.get(failure.failure_class, [])
    if budget is None or len(times) <= budget.max:
        return None
    text = failure.message
    if budget.max:
        text = (
            f"{len(times)} {failure.failure_class} failures within {budget.window}, more than the "
            f"budget of {budget.max} (recovery.budgets.{failure.failure_class}); the last one: "
            + text
        )
    return Verdict(reason=failure.reason, message=text)


def failure_interval_s(s: Situation) -> float:
    """Mean seconds between the failures of this training, free ones aside; 0 before the first."""
    count = s.status.restarts.counted
    if not count or s.status.start_time is None:
        return 0.0
    return max(0.0, s.now_s - seconds(s.status.start_time)) / count


def _budget(s: Situation, failure_class: FailureClass) -> BudgetSpec | None:
    budgets = s.spec.recovery.budgets
    match failure_class:
        case "infrastructure":
            return budgets.infrastructure
        case "application":
            return budgets.application
        case "outOfMemory":
            return budgets.out_of_memory
        case "configuration":
            return budgets.configuration
        case "numeric":
            return budgets.numeric
    return None


def _reached_step(s: Situation, failure: Failure, generation: int) -> int:
    """The last step of a generation that failed, as far as is known."""
    said = s.gathering.progress if s.gathering.progress_generation == generation else None
    if said or failure.step:
        return max(failure.step, said.step if said else 0)
    return _committed_step(s) if s.spec.model else s.status.progress.step


def _committed_step(s: Situation) -> int:
    known = s.status.checkpoint.step if s.status.checkpoint else 0
    return max(known, s.gathering.commit.step if s.gathering.commit else 0)


def _progress_is_known(s: Situation) -> bool:
    """Whether a step of 0 means none: a program of the user may report nothing."""
    return s.spec.model is not None or s.status.progress.step > 0 or bool(s.gathering.progress)


def _is_own_fault(entry: HistoryEntry) -> bool:
    """Whether a generation ended by what runs in it."""
    if entry.generation == 0 or entry.failure_class in (*FREE_CLASSES, "infrastructure"):
        return False
    if entry.failure_class != "application" or entry.fingerprint == HANG:
        return True
    return not from_outside(entry.exit_code)


def _repeated(s: Situation, history: list[HistoryEntry]) -> bool:
    """Whether the newest error came at the same step before, which nothing has passed since."""
    *before, last = history
    if not last.fingerprint or last.fingerprint == HANG:
        return False
    if not _is_own_fault(last) or not _progress_is_known(s):
        return False
    for entry in reversed(before):
        if entry.from_step > last.from_step:
            return False
        same = (entry.fingerprint, entry.from_step) == (last.fingerprint, last.from_step)
        if same and entry.generation != last.generation:
            return True
    return False


def _fruitless(s: Situation, history: list[HistoryEntry]) -> int:
    """How many generations ended by their own fault since one of them got further.

    What ended by another's fault says nothing, unless it got further.
    """
    if not _progress_is_known(s):
        return 0
    count = reached = committed = 0
    if len(history) == HISTORY_LIMIT:  # how far it was before that is forgotten
        reached, committed = history[0].from_step, history[0].committed_step
        history = history[1:]
    ended = 0
    for entry in history:
        if entry.from_step > reached or entry.committed_step > committed:
            count = 0
        elif _is_own_fault(entry) and entry.generation != ended:
            count += 1
        reached = max(reached, entry.from_step)
        committed = max(committed, entry.committed_step)
        ended = entry.generation
    return count

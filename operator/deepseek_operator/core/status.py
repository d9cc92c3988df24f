"""The status that a situation and a decision amount to: conditions, phase, progress, columns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dstrain_api.status import (
    CheckpointStatus,
    ConditionType,
    DeepSeekTrainingStatus,
    HistoryEntry,
    Phase,
    Progress,
    StragglerStatus,
    WorkersStatus,
)

from deepseek_operator.core import nodes
from deepseek_operator.core.clock import rfc3339, seconds
from deepseek_operator.core.conditions import (
    ConditionStatus,
    condition,
    holds,
    set_condition,
    with_condition,
)
from deepseek_operator.core.manifests import selector_labels
from deepseek_operator.core.membership import SHRUNK
from deepseek_operator.core.model import Membership, Plan, Training
from deepseek_operator.core.situation import ALIVE, Situation
from deepseek_operator.core.volumes import public_uri
from deepseek_operator.core.words import eta_s, pod_problem, shortened, summary, waiting_for

_ENDS: tuple[Literal["Complete", "Failed", "Suspended"], ...] = ("Complete", "Failed", "Suspended")


@dataclass(frozen=True)
class _Said:
    """One condition, before it is compared with the last one."""

    kind: ConditionType
    value: ConditionStatus
    reason: str
    message: str = ""


def report(s: Situation, decision: Plan) -> DeepSeekTrainingStatus:
    """The whole status after a decision."""
    current = _current(s, decision)
    after = decision.status or s.status
    ended = holds(after, "Finished")
    running = current is not None and not ended
    after = after.model_copy(
        update={
            "observed_generation": s.training.generation,
            "workers": _workers(s, current if running else None),
            "progress": _progress(s, running=running),
            "checkpoint": _checkpoint(s),
            "history": _recovered(s, after.history),
            "stragglers": _stragglers(s, current) if running and current else [],
            "excluded_nodes": [] if ended else nodes.excluded(s, after),
        }
    )
    message = _message(s, after, current)
    for said in _conditions(s, after, current, message):
        after = with_condition(s, after, said.kind, said.value, said.reason, said.message)
    return after.model_copy(update={"phase": phase(after), "summary": summary(s, after, message)})


def phase(status: DeepSeekTrainingStatus) -> Phase:
    """One word for the conditions."""
    for word in _ENDS:
        if holds(status, word):
            return word
    running = condition(status, "Running")
    if running and running.status == "True":
        return "Running"
    if running and running.reason == "Recovering":
        return "Recovering"
    return "Starting" if holds(status, "Scheduled") else "Pending"


def refused(training: Training, now_s: float) -> DeepSeekTrainingStatus:
    """The status of a training whose spec cannot be trained; nothing else is touched."""
    after = set_condition(
        training.status,
        "Accepted",
        "False",
        "InvalidSpec",
        training.spec_error,
        now_s=now_s,
        generation=training.generation,
    )
    message = shortened(f"the spec can't be trained: {training.spec_error}")
    return after.model_copy(
        update={
            "observed_generation": training.generation,
            "phase": phase(after),
            "summary": after.summary.model_copy(update={"message": message}),
        }
    )


def _current(s: Situation, decision: Plan) -> Membership | None:
    """The generation that runs once the decision is carried out."""
    if decision.membership:
        return decision.membership
    ends = decision.end_generation is not None or s.gathering.over
    return None if ends else s.membership


def _workers(s: Situation, current: Membership | None) -> WorkersStatus:
    alive = {slot.pod.uid for slot in s.slots if slot.pod and slot.state in ALIVE}
    ready = len(alive.intersection(current.pod_uids)) if current else 0
    labels = selector_labels(s.training.name)
    selector = ",".join(f"{k}={v}" for k, v in labels.items())
    return WorkersStatus(desired=s.desired, ready=ready, selector=selector)


def _progress(s: Situation, *, running: bool) -> Progress:
    said = s.gathering.progress
    known = s.status.progress
    if said is None:
        return known if running else _standing(known)
    made = Progress(
        step=said.step,
        total_steps=said.total_steps or known.total_steps,
        tokens=said.tokens,
        loss=said.loss if said.loss is not None else known.loss,
        tokens_per_second=said.tokens_per_second,
        mfu=said.mfu,
        skipped_steps=said.skipped_steps,
        rollbacks=said.rollbacks,
    )
    if not running:
        return _standing(made)
    return made.model_copy(update={"eta_seconds": eta_s(made, said.step_seconds)})


def _stragglers(s: Situation, current: Membership) -> list[StragglerStatus]:
    """Who they are, of the current generation."""
    said = s.gathering.progress
    if said is None or s.gathering.progress_generation != current.generation:
        return []
    pods = {pod.uid: pod for pod in s.observed.pods}
    found = []
    for slow in said.stragglers:
        group_rank = slow.rank // s.spec.workers.processes_per_worker
        uid = current.pod_uids[group_rank] if group_rank < len(current.pod_uids) else ""
        if pod := pods.get(uid):
            ratio = round(slow.ratio, 1)
            found.append(StragglerStatus(rank=slow.rank, pod=pod.name, node=pod.node, ratio=ratio))
    return found


def _standing(progress: Progress) -> Progress:
    return progress.model_copy(update={"tokens_per_second": 0.0, "mfu": None, "eta_seconds": None})


def _checkpoint(s: Situation) -> CheckpointStatus | None:
    commit = s.gathering.commit
    known = s.status.checkpoint
    if commit is None or (known and known.generation > commit.generation):
        return known
    return CheckpointStatus(
        step=commit.step,
        uri=public_uri(commit.uri),
        generation=commit.generation,
        time=rfc3339(commit.at_s),
    )


def _recovered(s: Situation, history: list[HistoryEntry]) -> list[HistoryEntry]:
    """History in which the first new step after a failure has ended it."""
    said = s.gathering.progress
    if said is None or said.step <= (said.resumed_step or 0):
        return history
    return [
        entry.model_copy(
            update={
                "seconds": round(max(0.0, s.gathering.progress_at_s - seconds(entry.time)), 3),
                "resumed_step": said.resumed_step or 0,
            }
        )
        if entry.seconds is None and s.gathering.progress_generation > entry.generation > 0
        else entry
        for entry in history
    ]


def _message(s: Situation, status: DeepSeekTrainingStatus, current: Membership | None) -> str:
    """What is going on, in one sentence."""
    for kind in _ENDS:
        found = condition(status, kind)
        if found and found.status == "True":
            return found.message
    if s.observed.refused:
        return f"the cluster refuses the worker pods: {s.observed.refused}"
    if current is None:
        last = status.history[-1] if status.history and status.generation else None
        after = f" (after {last.reason}: {last.message})" if last and last.seconds is None else ""
        return waiting_for(s) + after
    size = len(current.pod_uids)
    of = f" of {s.desired}" if size < s.desired else ""
    return f"training on {size}{of} worker{'s' if (s.desired if of else size) > 1 else ''}"


def _conditions(
    s: Situation, status: DeepSeekTrainingStatus, current: Membership | None, message: str
) -> list[_Said]:
    accepted = _Said("Accepted", "True", "Valid")
    if holds(status, "Finished"):
        return [accepted, _Said("Running", "False", "Finished"), _idle("Finished")]
    checkpoint = _checkpoint_condition(status)
    if holds(status, "Suspended"):
        return [
            accepted,
            _Said("Running", "False", "Suspended"),
            _Said("Scheduled", "False", "Suspended"),
            _idle("Suspended"),
            checkpoint,
        ]
    return [
        accepted,
        _scheduled(s),
        _running(status, current, message),
        _progressing(s, current),
        checkpoint,
        *_degraded(s, status, current),
    ]


def _idle(why: str) -> _Said:
    return _Said("Progressing", "False", why)


def _scheduled(s: Situation) -> _Said:
    if s.observed.refused:
        return _Said("Scheduled", "False", "Refused", s.observed.refused)
    pods = [slot.pod for slot in s.slots if slot.pod and slot.state != "vacant"]
    problems = [p for pod in pods if not pod.node and (p := pod_problem(s, pod))]
    if problems:
        return _Said("Scheduled", "False", *problems[0])
    placed = sum(1 for pod in pods if pod.node)
    if placed < s.desired:
        text = f"{placed} of {s.desired} workers have a node"
        return _Said("Scheduled", "False", "Scheduling", text)
    return _Said("Scheduled", "True", "AllPlaced")


def _running(status: DeepSeekTrainingStatus, current: Membership | None, message: str) -> _Said:
    if current:
        return _Said("Running", "True", "GenerationFormed", message)
    reason = "Recovering" if status.generation or status.history else "Starting"
    return _Said("Running", "False", reason, message)


def _progressing(s: Situation, current: Membership | None) -> _Said:
    if current is None:
        return _idle("NotRunning")
    if s.gathering.progress_generation == current.generation:
        return _Said("Progressing", "True", "StepsReported")
    return _Said("Progressing", "False", "WaitingForFirstStep")


def _checkpoint_condition(status: DeepSeekTrainingStatus) -> _Said:
    if status.checkpoint is None:
        return _Said("CheckpointCurrent", "False", "NoCheckpointYet")
    return _Said("CheckpointCurrent", "True", "Committed")


def _degraded(
    s: Situation, status: DeepSeekTrainingStatus, current: Membership | None
) -> list[_Said]:
    """Set by what keeps pods from starting; a smaller gang sets it itself when it is formed."""
    known = condition(status, "Degraded")
    whole = current is not None and len(current.pod_uids) >= s.desired
    if known and known.status == "True" and known.reason == SHRUNK and not whole:
        return []
    problems = [p for slot in s.slots if slot.pod and (p := pod_problem(s, slot.pod))]
    if problems:
        return [_Said("Degraded", "True", *problems[0])]
    return [_Said("Degraded", "False", "AllWorkers")]

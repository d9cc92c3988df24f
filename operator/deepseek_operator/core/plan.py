"""The decision: an ordered list of small rules; the first that has something to do wins.

`plan` is pure. What it decides is found again from what exists, so a crash after any write of a
plan is repaired by the next one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from dstrain_api.quantities import duration_s
from dstrain_api.status import Condition, DeepSeekTrainingStatus

from deepseek_operator.core import elastic, lifecycle, membership, nodes, replacement, status
from deepseek_operator.core.conditions import condition, holds
from deepseek_operator.core.model import Event, Observed, Plan, Settings, Training
from deepseek_operator.core.situation import NODE_LOST, Situation, survey

CREATED_LOOK_S = 1.0  # what was created shows by then, or was refused, which nobody tells

Rule = Callable[[Situation], Plan | None]

RULES: tuple[Rule, ...] = (
    lifecycle.finished,
    lifecycle.complete,
    lifecycle.suspend,
    lifecycle.begin,
    lifecycle.resume,
    replacement.account,
    replacement.stillborn,
    replacement.fill,
    replacement.respawn,
    replacement.unblock,
    replacement.tolerate,
    replacement.tidy,
    membership.worker_errors,
    replacement.evacuate,
    membership.end,
    membership.form,
    membership.grow,
    membership.give_up,
    replacement.supply,
    replacement.retry,
)


def plan(training: Training, observed: Observed, settings: Settings, now_s: float) -> Plan:
    """What to do about a training, given what is known of it."""
    if training.deleting:
        return Plan()  # its owner references clean up
    if training.spec is None:
        after = status.refused(training, now_s)
        return Plan() if after == training.status else _invalid(training, after, now_s)
    s = survey(training, training.spec, observed, settings, now_s)
    decision = next((d for rule in RULES if (d := rule(s))), None)
    if decision is None and (left_s := _still_listening_s(s)) > 0:
        return Plan(requeue_after_s=min(left_s, s.doubt_s or left_s))
    return _composed(s, decision or Plan())


def _still_listening_s(s: Situation) -> float:
    """Seconds left to members of a running generation to be heard by an operator that has just
    started. Until then the status of its predecessor is better than what is known.
    """
    if s.membership or s.gathering.over or not holds(s.status, "Running"):
        return 0.0
    return duration_s(s.spec.recovery.heartbeat_timeout) - s.gathering.listening_s


def _invalid(training: Training, after: DeepSeekTrainingStatus, now_s: float) -> Plan:
    return Plan(status=after, events=_events(training.status, after, now_s))


def _composed(s: Situation, decision: Plan) -> Plan:
    """The plan of a decision: with the status that says so, as often as it may be written."""
    before = s.status
    after = status.report(s, decision)
    durable = decision.status is not None or _lasting(after) != _lasting(before)
    wait_s = s.observed.status_written_at_s + s.settings.status_interval_s - s.now_s
    written = after != before and (durable or wait_s <= 0)
    later = [
        decision.requeue_after_s or (CREATED_LOOK_S if decision.creates else None),
        _progress_wait_s(s, wait_s, written),
        s.doubt_s,
        elastic.wait_s(s),
        replacement.wait_s(s),
        nodes.wait_s(s, after),
    ]
    return replace(
        decision,
        status=after if written else None,
        taints=nodes.newly_suspect(s, after) if written and s.settings.taint_nodes else (),
        events=(*decision.events, *(_events(before, after, s.now_s) if written else ())),
        requeue_after_s=min((w for w in later if w is not None), default=None),
    )


def _progress_wait_s(s: Situation, wait_s: float, written: bool) -> float | None:
    """When to look for progress again: it wakes nobody by itself."""
    if wait_s > 0 and not written:
        return wait_s
    return s.settings.status_interval_s if s.membership else None


def _lasting(status: DeepSeekTrainingStatus) -> object:
    """The part of a status whose change is written at once: all but numbers and wordings."""
    return (
        status.observed_generation,
        status.phase,
        status.attempt,
        status.generation,
        status.restarts,
        status.history,
        status.checkpoint,
        {(one.rank, one.pod) for one in status.stragglers},
        [(c.type, c.status, c.reason) for c in status.conditions],
    )


# Transitions that a person wants to read with `kubectl describe`, and how bad they are.
_TOLD = {
    ("Accepted", "False"): "Warning",
    ("Running", "True"): "Normal",
    ("Suspended", "True"): "Normal",
    ("Complete", "True"): "Normal",
    ("Failed", "True"): "Warning",
    ("Degraded", "True"): "Warning",
}
_TOLD_REASONS = {("Scheduled", "Unschedulable"), ("Scheduled", "Refused")}


def _events(
    before: DeepSeekTrainingStatus, after: DeepSeekTrainingStatus, now_s: float
) -> tuple[Event, ...]:
    """What changed between two statuses, for `kubectl describe`."""
    known = {h.time + h.reason for h in before.history}
    new = [entry for entry in after.history if entry.time + entry.reason not in known]
    found = [
        Event(
            type="Normal" if entry.failure_class == "voluntary" else "Warning",
            reason=entry.reason,
            message=entry.message or entry.reason,
            at_s=now_s,
        )
        for entry in new
    ]
    avoided = {n.name for n in before.excluded_nodes}
    lost = {entry.node for entry in new if entry.reason == NODE_LOST}  # their event says it
    found += [
        Event(
            type="Warning",
            reason="NodeExcluded",
            message=f"new worker pods avoid node {n.name}: {n.reason}",
            at_s=now_s,
        )
        for n in after.excluded_nodes
        if n.name not in avoided | lost
    ]
    slow = {(one.rank, one.pod) for one in before.stragglers}
    found += [
        Event(
            type="Warning",
            reason="Straggler",
            message=(
                f"all wait for rank {one.rank} in {one.pod} on node {one.node}: its own part of a "
                f"step takes {one.ratio:g} times as long as that of others"
            ),
            at_s=now_s,
        )
        for one in after.stragglers
        if (one.rank, one.pod) not in slow
    ]
    if after.progress.rollbacks > before.progress.rollbacks:
        text = f"bad numbers: training went back to a checkpoint before step {before.progress.step}"
        found.append(Event(type="Warning", reason="RolledBack", message=text, at_s=now_s))
    for said in after.conditions:
        event = _event(condition(before, said.type), said, now_s)
        if event:
            found.append(event)
    return tuple(found)


def _event(before: Condition | None, said: Condition, now_s: float) -> Event | None:
    if before and (before.status, before.reason) == (said.status, said.reason):
        # The scheduler's first words may be of a claim that is bound a moment later.
        retold = (said.type, said.reason) in _TOLD_REASONS and before.message != said.message
        if not retold:
            return None
    kind = _TOLD.get((said.type, said.status))
    if kind is None and (said.type, said.reason) in _TOLD_REASONS:
        kind = "Warning"
    if kind is None:
        return None
    reason = said.type if kind == "Normal" else said.reason
    return Event(
        type="Normal" if kind == "Normal" else "Warning",
        reason=reason,
        message=said.message or reason,
        at_s=now_s,
    )

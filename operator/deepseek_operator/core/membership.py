"""Rules of generations: when one ends, when the next is formed, when a smaller gang grows again."""

from __future__ import annotations

from typing import Literal

from dstrain_api.constants import EXIT_RESTART
from dstrain_api.status import DeepSeekTrainingStatus

from deepseek_operator.core import elastic, evidence, failures
from deepseek_operator.core.conditions import condition, holds, with_condition
from deepseek_operator.core.evidence import Failure
from deepseek_operator.core.lifecycle import finish
from deepseek_operator.core.model import Membership, MemberView, Plan, WorkerError
from deepseek_operator.core.situation import ALIVE, Situation, Slot

SHRUNK = "FewerWorkers"  # reason of Degraded while an elastic training goes on with fewer


def worker_errors(s: Situation) -> Plan | None:
    """A training process failed by itself: one application failure per generation."""
    errors = _unaccounted_errors(s)
    if not errors or _verdict(s, errors) != "count":
        return None
    failure = evidence.worker_error(s, evidence.root_cause(errors))
    after = failures.record(s, failure, generation=errors[0].generation)
    if last := failures.verdict(s, failure, after):
        return Plan(status=finish(s, after, "Failed", last.reason, last.message), stop=True)
    return Plan(status=after, end_generation=_ended_by(s, errors))


def end(s: Situation) -> Plan | None:
    """A generation is over when a member says so, or a member's pod is no more."""
    current = s.membership
    if current is None:
        return None
    there = {
        slot.pod.uid
        for slot in s.slots
        if slot.pod and (slot.state in ALIVE or slot.state in ("leaving", "succeeded"))
    }
    there |= {p.uid for p in s.surplus if p.uid not in s.lost_surplus and p.phase != "Failed"}
    missing = [uid for uid in current.pod_uids if uid not in there]
    if not missing and not s.gathering.over:
        return None
    return Plan(status=_voluntary(s, current), end_generation=current.generation)


def form(s: Situation) -> Plan | None:
    """All slots have joined, or an elastic training has waited long enough for those missing."""
    joined = s.in_state("joining")
    if s.membership or not joined or _adopting(s):
        return None
    size = len(joined) if len(joined) == s.desired else elastic.smaller_size(s, joined)
    if not size:
        return None
    chosen = joined[:size]
    generation = s.status.generation + 1
    after = s.status.model_copy(update={"generation": generation})
    if size < s.desired:
        text = f"training on {size} of {s.desired} workers until the others can be replaced"
        after = with_condition(s, after, "Degraded", "True", SHRUNK, text)
    elif _shrunk(s):
        after = with_condition(s, after, "Degraded", "False", "AllWorkers", "")
    members = [slot.member for slot in chosen if slot.member]
    return Plan(
        status=after,
        membership=Membership(
            generation=generation,
            pod_uids=tuple(m.pod_uid for m in members),
            master_address=members[0].address,
            master_port=members[0].port,
            failure_interval_s=round(failures.failure_interval_s(s), 3),
            preflight=_preflight(s, members),
        ),
    )


def grow(s: Situation) -> Plan | None:
    """A gang smaller than wanted takes in those who wait, right after a commit."""
    current = s.membership
    if current is None or len(current.pod_uids) >= s.desired:
        return None
    waiting = [slot for slot in s.in_state("joining") if not _is_member(s, slot)]
    inside = [slot for slot in s.slots if slot.state == "running" and _is_member(s, slot)]
    size = elastic.larger_size(s, len(current.pod_uids), waiting, len(inside))
    if not size:
        return None
    shrunk, commit = _shrunk(s), s.gathering.commit
    if shrunk or commit or s.status.checkpoint:  # else nothing is saved that could be waited for
        ready_at_s = s.now_s - min((w.member.waiting_s for w in waiting if w.member), default=0.0)
        if shrunk:
            ready_at_s = max(ready_at_s, elastic.snoozed_until_s(s))
        if commit is None or commit.generation != current.generation or commit.at_s < ready_at_s:
            return None
    failure = evidence.grown(size) if shrunk else evidence.missing_pod(s, None, scaled=True)
    after = None
    if not s.accounted:
        after = failures.record(s, failure, generation=s.status.generation)
    return Plan(status=after, end_generation=current.generation)


def give_up(s: Situation) -> Plan | None:
    """Those who still run a generation that can never be whole again are told to join the next."""
    if s.membership or not _runners(s) or _adopting(s):
        return None
    return Plan(end_generation=s.status.generation)


def _preflight(s: Situation, members: list[MemberView]) -> bool:
    """Whether somebody is new: those of an earlier generation were checked when they were.

    A node that is used for want of a better one may well be slow.
    """
    tolerated = {record.name for record in s.status.nodes if record.tolerated}
    if s.spec.recovery.preflight == "never" or tolerated.intersection(m.node for m in members):
        return False
    return any(m.generation == 0 for m in members)


def _runners(s: Situation) -> list[Slot]:
    """Slots that say they run the newest generation."""
    return [
        slot
        for slot in s.in_state("running", "done")
        if slot.member and slot.member.generation == s.status.generation
    ]


def _adopting(s: Situation) -> bool:
    """Whether a coordinator that has just started may still find the newest generation whole."""
    runners = _runners(s)
    world = max((r.member.group_world_size for r in runners if r.member), default=0)
    unheard = s.in_state("starting", "succeeded", "leaving")
    return bool(runners) and len(runners) + len(unheard) >= world


def _is_member(s: Situation, slot: Slot) -> bool:
    return bool(s.membership and slot.pod and slot.pod.uid in s.membership.pod_uids)


def _shrunk(s: Situation) -> bool:
    degraded = condition(s.status, "Degraded")
    return holds(s.status, "Degraded") and degraded is not None and degraded.reason == SHRUNK


def _voluntary(s: Situation, current: Membership) -> DeepSeekTrainingStatus | None:
    """Accounts for a generation that ended because pods of it were deleted."""
    if s.accounted or current.generation != s.status.generation:
        return None
    leaving = (*(slot.pod for slot in s.in_state("leaving") if slot.pod), *s.surplus)
    causes: list[Failure] = [
        evidence.missing_pod(s, pod, scaled=pod.slot >= s.desired)
        for pod in leaving
        if pod.deleting and pod.uid in current.pod_uids
    ]
    known = {p.uid for p in s.observed.pods}
    if not causes and any(uid not in known for uid in current.pod_uids):
        scaled = len(current.pod_uids) > s.desired
        causes.append(evidence.missing_pod(s, None, scaled=scaled))
    if not causes:
        return None
    cause = min(causes, key=lambda f: f.severity)
    return failures.record(s, cause, generation=current.generation)


def _unaccounted_errors(s: Situation) -> tuple[WorkerError, ...]:
    """Errors of the newest generation that has any, unless its end is in the history."""
    errors = [e for e in s.gathering.errors if e.exit_code != EXIT_RESTART]
    if not errors:
        return ()
    generation = max(e.generation for e in errors)
    if any(h.generation == generation for h in s.status.history):
        return ()
    return tuple(e for e in errors if e.generation == generation)


def _verdict(s: Situation, errors: tuple[WorkerError, ...]) -> Literal["count", "wait", "ignore"]:
    """Whether these errors are the cause, or follow from a member's end, as far as is known.

    Losing a peer breaks connections, and that is reported long before the loss itself is noticed.
    So errors count only when every member of their generation is known to have survived them.
    """
    generation = errors[0].generation
    if s.membership and s.membership.generation == generation:
        world = len(s.membership.pod_uids)
        survivors = [slot for slot in s.in_state(*ALIVE) if _is_member(s, slot)]
    else:
        known = [m for m in s.gathering.members if m.generation == generation]
        world = max((m.group_world_size for m in known), default=0)
        uids = {m.pod_uid for m in known}
        survivors = [slot for slot in s.in_state(*ALIVE) if slot.pod and slot.pod.uid in uids]
    if world == 0 or len(survivors) < world:
        return "wait" if s.in_state("starting") else "ignore"
    since_s = s.now_s - max(e.at_s for e in errors)
    heard = all(
        slot.state == "joining" or (slot.member and slot.member.silent_s <= since_s)
        for slot in survivors
    )
    return "count" if heard else "wait"


def _ended_by(s: Situation, errors: tuple[WorkerError, ...]) -> int | None:
    """The current generation, if it is the one that failed: over, even if nobody joins yet."""
    if s.membership and s.membership.generation == errors[0].generation:
        return s.membership.generation
    return None

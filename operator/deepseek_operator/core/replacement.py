"""Rules that keep one living pod in every slot."""

from __future__ import annotations

from dataclasses import replace

from dstrain_api.constants import TAINT_SUSPECT
from dstrain_api.status import DeepSeekTrainingStatus

from deepseek_operator.core import evidence, failures, nodes
from deepseek_operator.core.evidence import Failure
from deepseek_operator.core.lifecycle import finish
from deepseek_operator.core.manifests import gang, supporting
from deepseek_operator.core.model import Plan, PodDelete, PodView
from deepseek_operator.core.situation import Situation, Slot, SlotState
from deepseek_operator.core.words import pod_problem

REFUSED_RETRY_S = 15.0
TOLERATE_AFTER_S = 10.0  # what ends elsewhere may make room meanwhile
# The scheduler's words for nodes that a pod must not use.
KEPT_AWAY = ("affinity", TAINT_SUSPECT)
MOVABLE: tuple[SlotState, ...] = ("starting", "joining", "running")
START_GRACE_S = 600.0  # a registry may be away for a while; a name that is wrong stays so
SUPPLY_RETRY_S = 10.0


def account(s: Situation) -> Plan | None:
    """Failed and lost pods: count once, raise the attempt, fence and force-delete what is lost.

    Pods that fail together are one failure, named by the one closest to the cause. A lost pod is
    replaced when the cluster no longer shows it, so a slot never shows two living pods.
    """
    lost, failed = s.in_state("lost"), s.in_state("failed")
    news = [slot.pod for slot in (*lost, *failed) if slot.pod and s.is_news(slot.pod)]
    if news and s.in_state("vacant") and not s.observed.refused:
        # A cache that lags may hide a living pod of this attempt: no new attempt before it shows.
        return None
    if not news:
        return replace(_forget(s, lost), status=_avoiding(s, s.status, lost)) if lost else None
    failure = min((_classify(s, pod) for pod in news), key=lambda f: f.severity)
    if len(news) > 1:
        failure = _together(failure, len(news))
    after = failures.record(s, failure, generation=_ended_generation(s, news))
    after = after.model_copy(update={"attempt": after.attempt + 1})
    if last := failures.verdict(s, failure, after):
        return Plan(status=finish(s, after, "Failed", last.reason, last.message), stop=True)
    after = _avoiding(s, after, lost)
    forgotten = _forget(s, lost)
    return Plan(
        status=after,
        fence=forgotten.fence,
        end_generation=_end_if_member(s, news),
        creates=gang(s, [slot.index for slot in failed], after),
        deletes=forgotten.deletes,
    )


def stillborn(s: Situation) -> Plan | None:
    """Before the first generation, what cannot be started for long is described wrongly.

    Later it is an outage, and waited for.
    """
    if s.status.generation:
        return None
    waiting = [slot.pod for slot in s.in_state("starting") if slot.pod]
    overdue = [p for p in waiting if p.scheduled_at_s and s.now_s >= _given_up_at_s(p)]
    found = [(pod, problem) for pod in overdue if (problem := pod_problem(s, pod))]
    if not found:
        return None
    deletes = tuple(PodDelete(name=pod.name, uid=pod.uid) for pod, _ in found)
    if any(pod.name in s.told for pod, _ in found):
        return Plan(deletes=deletes)
    failure = evidence.stillborn_pod(found[0][0], *found[0][1])
    after = failures.record(s, failure, generation=0)
    after = after.model_copy(update={"attempt": after.attempt + 1})
    if last := failures.verdict(s, failure, after):
        return Plan(status=finish(s, after, "Failed", last.reason, last.message), stop=True)
    return Plan(status=after, deletes=deletes)


def evacuate(s: Situation) -> Plan | None:
    """Workers leave a node that is broken, is about to go, or has failed them repeatedly.

    They save and end as when they are deleted, and are made again elsewhere.
    """
    pods = [slot.pod for slot in s.in_state(*MOVABLE) if slot.pod]
    moved = [(pod, why) for pod in pods if (why := nodes.must_leave(s, pod))]
    if not moved:
        return None
    deletes = tuple(PodDelete(name=pod.name, uid=pod.uid) for pod, _ in moved)
    members = s.membership.pod_uids if s.membership else ()
    # What made a node one to avoid is counted already; what it says of itself is not.
    causes = [
        evidence.moved_pod(s, pod, why)
        for pod, why in moved
        if pod.uid in members and nodes.is_troubled(s, pod)
    ]
    if not causes or s.accounted:
        return Plan(deletes=deletes)
    failure = min(causes, key=lambda f: f.severity)
    after = failures.record(s, failure, generation=s.status.generation)
    if last := failures.verdict(s, failure, after):
        return Plan(status=finish(s, after, "Failed", last.reason, last.message), stop=True)
    return Plan(status=after, deletes=deletes)


def tolerate(s: Situation) -> Plan | None:
    """Where pods find no node because they avoid some, the mildest of those are used again."""
    waiting = [slot.pod for slot in s.in_state("starting") if slot.pod]
    affected = [
        pod
        for pod in waiting
        if _is_kept_away(pod)
        and s.now_s - pod.created_at_s >= TOLERATE_AFTER_S
        and not _avoids(s, pod)  # then it is made again, and may find one
    ]
    names = {name for pod in affected for name in pod.excluded_nodes}
    after = nodes.tolerating(s, names, count=len(affected))
    return Plan(status=after) if after else None


def wait_s(s: Situation) -> float | None:
    """Seconds until a pod that waits has waited for too long."""
    waiting = [slot.pod for slot in s.in_state("starting") if slot.pod]
    ends = [p.created_at_s + TOLERATE_AFTER_S for p in waiting if _is_kept_away(p)]
    if not s.status.generation:
        ends += [_given_up_at_s(p) for p in waiting if p.scheduled_at_s and pod_problem(s, p)]
    return min((at_s - s.now_s for at_s in ends if at_s > s.now_s), default=None)


def fill(s: Situation) -> Plan | None:
    """Slots without a pod get one, under the current attempt."""
    vacant = [slot.index for slot in s.in_state("vacant")]
    if not vacant or s.observed.refused:
        return None
    return Plan(creates=gang(s, vacant, s.status))


def retry(s: Situation) -> Plan | None:
    """What the cluster refused (a quota, a policy) is tried again when nothing else is to do."""
    vacant = [slot.index for slot in s.in_state("vacant")]
    if not vacant:
        return None
    return Plan(creates=gang(s, vacant, s.status), requeue_after_s=REFUSED_RETRY_S)


def respawn(s: Situation) -> Plan | None:
    """A pod that ended well while its gang goes on is needed again, under a new attempt."""
    ended = s.in_state("succeeded")
    rest = [slot for slot in s.slots if slot.state != "succeeded"]
    winding_down = all(slot.state in ("running", "done", "starting") for slot in rest)
    if not ended or winding_down or s.in_state("vacant", "failed", "lost"):
        return None
    after = s.status.model_copy(update={"attempt": s.status.attempt + 1})
    return Plan(status=after, creates=gang(s, [e.index for e in ended], after))


def unblock(s: Situation) -> Plan | None:
    """Pods of a deleted training of the same name may stay for long on a dead node."""
    blocked = [slot.index for slot in s.in_state("blocked")]
    if not blocked or s.in_state("vacant"):
        return None
    after = s.status.model_copy(update={"attempt": s.free_attempt})
    return Plan(status=after, creates=gang(s, blocked, after))


def supply(s: Situation) -> Plan | None:
    """What pods need and do not find is made again: somebody, or an earlier end, deleted it."""
    waiting = [slot.pod for slot in s.in_state("starting") if slot.pod]
    if not any(_misses_something(pod) for pod in waiting):
        return None
    return Plan(
        creates=supporting(s.training, s.spec, s.settings, s.observed.token),
        requeue_after_s=SUPPLY_RETRY_S,
    )


def _given_up_at_s(pod: PodView) -> float:
    return pod.scheduled_at_s + START_GRACE_S


def _is_kept_away(pod: PodView) -> bool:
    """Whether a pod finds no node because there are some that it must not use."""
    kept_away = any(word in pod.unschedulable for word in KEPT_AWAY)
    return not pod.node and kept_away and bool(pod.excluded_nodes)


def _misses_something(pod: PodView) -> bool:
    said = pod.unschedulable + pod.container.waiting_message
    return "not found" in said and ("persistentvolumeclaim" in said or "secret" in said)


def tidy(s: Situation) -> Plan | None:
    """Pods that hold no slot go: those above the target size, doubles, ended ones.

    Failed pods that the history names stay for their logs. No other may stay when the next
    generation is formed: nobody could tell later whether it had been part of that one.
    """
    lost = [p for p in s.surplus if p.uid in s.lost_surplus]
    others = [
        p
        for p in s.surplus
        if not p.deleting and p.uid not in s.lost_surplus and not (p.finished and p.name in s.told)
    ]
    stale = [slot.pod for slot in s.in_state("starting") if slot.pod and _avoids(s, slot.pod)]
    if not lost and not others and not stale:
        return None
    return Plan(
        fence=tuple(p.uid for p in lost),
        deletes=(
            *(PodDelete(name=p.name, uid=p.uid, grace_s=0) for p in lost),
            *(PodDelete(name=p.name, uid=p.uid) for p in (*others, *stale)),
        ),
    )


def _classify(s: Situation, pod: PodView) -> Failure:
    return evidence.failed_pod(s, pod) if pod.finished else evidence.lost_pod(pod)


def _together(failure: Failure, count: int) -> Failure:
    return replace(failure, message=f"{failure.message} ({count} pods together)")


def _forget(s: Situation, lost: tuple[Slot, ...]) -> Plan:
    pods = [slot.pod for slot in lost if slot.pod]
    return Plan(
        fence=tuple(p.uid for p in pods),
        end_generation=_end_if_member(s, pods),
        deletes=tuple(PodDelete(name=p.name, uid=p.uid, grace_s=0) for p in pods),
    )


def _avoiding(
    s: Situation, status: DeepSeekTrainingStatus, lost: tuple[Slot, ...]
) -> DeepSeekTrainingStatus:
    """The status in which new pods avoid the nodes of these lost ones.

    A cache that lags shows for a while what was lost, or had failed, before: that says nothing.
    """
    names = [slot.pod.node for slot in lost if slot.pod and slot.pod.name not in s.told]
    return nodes.losing(s, status, names)


def _end_if_member(s: Situation, pods: list[PodView]) -> int | None:
    if s.membership and any(p.uid in s.membership.pod_uids for p in pods):
        return s.membership.generation
    return None


def _ended_generation(s: Situation, news: list[PodView]) -> int:
    """The generation that these failures ended: none while a gang without them goes on."""
    if s.membership and not any(p.uid in s.membership.pod_uids for p in news):
        return 0
    return s.status.generation


def _avoids(s: Situation, pod: PodView) -> bool:
    """Whether a pod finds no node because it was made to avoid one that is good again."""
    if pod.node or not pod.unschedulable:
        return False
    return bool(set(pod.excluded_nodes) - {n.name for n in nodes.excluded(s, s.status)})

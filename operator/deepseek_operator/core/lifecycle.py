"""Rules of a training's life: complete, failed, suspended, begun."""

from __future__ import annotations

from typing import Literal

from dstrain_api.status import DeepSeekTrainingStatus

from deepseek_operator.core.clock import rfc3339, seconds
from deepseek_operator.core.conditions import holds, with_condition
from deepseek_operator.core.manifests import gang
from deepseek_operator.core.model import Plan, PodDelete, PodView
from deepseek_operator.core.situation import ALIVE, Situation

# How long the pods of a finished training may take to end by themselves, so that their logs stay.
LINGER_S = 30.0


def finished(s: Situation) -> Plan | None:
    """A finished training stays so. Pods that do not end are deleted; its TTL deletes it."""
    if not holds(s.status, "Finished"):
        return None
    age_s = s.now_s - seconds(s.status.finish_time or rfc3339(s.now_s))
    running = [p for p in _pods(s) if not p.finished and not p.deleting]
    stop = holds(s.status, "Failed")
    if running and age_s < LINGER_S:
        return Plan(stop=stop, requeue_after_s=LINGER_S - age_s)
    ttl_s = s.spec.ttl_seconds_after_finished
    if ttl_s and age_s >= ttl_s:
        return Plan(delete_training=True, stop=stop)
    return Plan(
        deletes=tuple(PodDelete(name=p.name, uid=p.uid) for p in running),
        stop=stop,
        requeue_after_s=ttl_s - age_s if ttl_s else None,
    )


def complete(s: Situation) -> Plan | None:
    """Rank 0 said that the program is through, or every pod of the gang ended well."""
    succeeded = {slot.pod.uid for slot in s.in_state("succeeded") if slot.pod}
    gang_uids = s.membership.pod_uids if s.membership else ()
    through = bool(gang_uids) and succeeded.issuperset(gang_uids)
    if not (s.gathering.done or through or len(succeeded) == s.desired):
        return None
    return Plan(status=finish(s, s.status, "Complete", "Complete", "training is complete"))


def finish(
    s: Situation,
    status: DeepSeekTrainingStatus,
    outcome: Literal["Complete", "Failed"],
    reason: str,
    message: str,
) -> DeepSeekTrainingStatus:
    """The status of a training that has come to its end."""
    after = with_condition(s, status, outcome, "True", reason, message)
    after = with_condition(s, after, "Finished", "True", reason, message)
    return after.model_copy(update={"finish_time": rfc3339(s.now_s)})


def suspend(s: Situation) -> Plan | None:
    """Pods are deleted with their grace: on SIGTERM the workers save at one step and exit.

    The pods after it belong to a new attempt, unless a cache that lags may still hide a living
    pod of this one: then the same names are asked for again, which cannot make a second pod.
    """
    if not s.spec.suspend:
        return None
    status = None
    if not holds(s.status, "Suspended"):
        text = "suspended; set suspend: false to go on from the last checkpoint"
        status = with_condition(s, s.status, "Suspended", "True", "Suspended", text)
        if s.status.attempt and not s.in_state("vacant"):
            status = status.model_copy(update={"attempt": s.status.attempt + 1})
    lost = [slot.pod for slot in s.in_state("lost") if slot.pod]
    lost += [p for p in s.surplus if p.uid in s.lost_surplus]
    gone = {p.uid for p in lost}
    # Pods that are ending belong to their generation until they have ended: they save meanwhile.
    left = {slot.pod.uid for slot in s.slots if slot.pod and slot.state in (*ALIVE, "leaving")}
    stays = s.membership and not s.gathering.over and left.issuperset(s.membership.pod_uids)
    end = s.membership.generation if s.membership and not stays else None
    return Plan(
        status=status,
        end_generation=end,
        fence=tuple(p.uid for p in lost),
        deletes=(
            *(PodDelete(name=p.name, uid=p.uid, grace_s=0) for p in lost),
            *(
                PodDelete(name=p.name, uid=p.uid)
                for p in _pods(s)
                if p.uid not in gone and not p.deleting
            ),
        ),
    )


def begin(s: Situation) -> Plan | None:
    """The first pods."""
    if s.status.attempt:
        return None
    after = s.status.model_copy(update={"attempt": s.free_attempt, "start_time": rfc3339(s.now_s)})
    after = _not_suspended(s, after)
    free = [slot.index for slot in s.in_state("vacant", "blocked")]
    return Plan(status=after, creates=gang(s, free, after))


def resume(s: Situation) -> Plan | None:
    """The first pods after a suspension, under the attempt that it raised."""
    if not holds(s.status, "Suspended"):
        return None
    after = _not_suspended(s, s.status)
    vacant = [slot.index for slot in s.in_state("vacant")]
    return Plan(status=after, creates=gang(s, vacant, after))


def _not_suspended(s: Situation, status: DeepSeekTrainingStatus) -> DeepSeekTrainingStatus:
    if not holds(status, "Suspended"):
        return status
    return with_condition(s, status, "Suspended", "False", "Resumed", "")


def _pods(s: Situation) -> tuple[PodView, ...]:
    return (*(slot.pod for slot in s.slots if slot.pod), *s.surplus)

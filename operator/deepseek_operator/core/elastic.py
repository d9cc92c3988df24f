"""How large a gang may be while some of it is missing, and how long the others wait for it.

To go on with fewer costs one more restart, the one that takes the missing in again. To wait costs
the time until they are there, which is not known. So where new pods have been quicker than
restarts, the others wait for as long as a restart takes, and otherwise not at all: whatever
happens, that is at most twice what the better choice would have cost (the ski rental problem).
"""

from __future__ import annotations

import math

from dstrain_api.quantities import duration_s

from deepseek_operator.core.clock import seconds
from deepseek_operator.core.evidence import GROWN
from deepseek_operator.core.situation import Situation, Slot

FIRST_WAIT_S = 45.0  # for pods that nothing is known of: those of the first generation
OVERDUE = 2.0  # a pod that takes so many times as long as another did may never join


def smaller_size(s: Situation, joined: tuple[Slot, ...]) -> int:
    """The largest allowed size with those who have joined; 0 to go on waiting."""
    if s.spec.elastic is None or _left_s(s, joined) > 0:
        return 0
    return _largest(s, at_least=s.min_replicas, at_most=len(joined))


def larger_size(s: Situation, current: int, waiting: list[Slot], inside: int) -> int:
    """The size to grow to with those who wait; 0 if it is not worth it yet.

    Not all who are missing may come back: after a while the gang grows without them.
    """
    there = len(waiting) + inside
    if there >= s.desired:
        return s.desired if s.allowed(s.desired) else 0
    if s.spec.elastic is None or _waited_s(waiting) < FIRST_WAIT_S:
        return 0
    return _largest(s, at_least=current + 1, at_most=there)


def snoozed_until_s(s: Situation) -> float:
    """When the gang may grow again after it last did."""
    grown = [seconds(h.time) for h in s.status.history if h.reason == GROWN]
    if s.spec.elastic is None or not grown:
        return 0.0
    return max(grown) + duration_s(s.spec.elastic.scale_up_snooze)


def wait_s(s: Situation) -> float | None:
    """Seconds until a smaller gang may be formed, if one is waited for."""
    joined = s.in_state("joining")
    if s.spec.elastic is None or s.membership or not s.min_replicas <= len(joined) < s.desired:
        return None
    return max(0.1, _left_s(s, joined))


def _largest(s: Situation, *, at_least: int, at_most: int) -> int:
    return next((n for n in range(at_most, at_least - 1, -1) if s.allowed(n)), 0)


def _waited_s(joined: tuple[Slot, ...] | list[Slot]) -> float:
    return min((slot.member.waiting_s for slot in joined if slot.member), default=0.0)


def _left_s(s: Situation, joined: tuple[Slot, ...]) -> float:
    """Seconds for which those who have joined still wait for the others."""
    return _patience_s(s, joined) - _waited_s(joined)


def _patience_s(s: Situation, joined: tuple[Slot, ...]) -> float:
    written = s.spec.elastic.replacement_wait if s.spec.elastic else "auto"
    survivors = [slot.member for slot in joined if slot.member and _comes_from_newest(s, slot)]
    late = any(_comes_from_newest(s, slot) for slot in s.in_state("running", "done"))
    if survivors and not late and len(joined) >= max(m.group_world_size for m in survivors):
        return 0.0  # nobody is missing who was there before
    if written != "auto":
        return duration_s(written)
    if late or not survivors:
        return FIRST_WAIT_S
    restart_s = _restart_s(s)
    return restart_s if _replacement_s(s) < restart_s else 0.0


def _comes_from_newest(s: Situation, slot: Slot) -> bool:
    """Whether a member was in the generation that is to be followed."""
    member = slot.member
    return member is not None and member.generation == s.status.generation > 0


def _restart_s(s: Situation) -> float:
    """What a restart costs: every recovery has had one, so the quickest says most. 0: not known."""
    return min((h.seconds for h in s.status.history if h.seconds is not None), default=0.0)


def _replacement_s(s: Situation) -> float:
    """When the last missing pod will have joined, if it is as quick as the quickest so far."""
    took_s = [
        slot.member.joined_at_s - slot.pod.created_at_s
        for slot in s.slots
        if slot.pod and slot.member and slot.member.joined_at_s
    ]
    if not took_s:
        return math.inf
    missing = [slot for slot in s.slots if slot.state not in ("joining", "running", "done")]
    return max((_remaining_s(s, slot, min(took_s)) for slot in missing), default=0.0)


def _remaining_s(s: Situation, slot: Slot, expected_s: float) -> float:
    if slot.state != "starting" or slot.pod is None:
        return expected_s
    age_s = s.now_s - slot.pod.created_at_s
    if slot.pod.unschedulable or age_s > OVERDUE * expected_s:
        return math.inf
    return expected_s - age_s

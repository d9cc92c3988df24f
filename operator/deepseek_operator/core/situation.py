"""What is going on, derived once per plan: which pod holds which slot, in which state.

Rules read a `Situation` and answer with a `Plan` whose status holds only the facts that must last;
nothing is in a situation that is not computed from the training, the caches and the coordinator's
table.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

from dstrain_api.quantities import duration_s
from dstrain_api.rules import allowed_replicas
from dstrain_api.spec import DeepSeekTrainingSpec
from dstrain_api.status import DeepSeekTrainingStatus

from deepseek_operator.core.model import (
    Gathering,
    Membership,
    MemberView,
    NodeView,
    Observed,
    PodView,
    Settings,
    Training,
)

NODE_LOST = "NodeLost"

# A listener that hears none of several nodes is more likely deaf than alone: wait this much longer.
DEAF_FACTOR = 6.0

# A node under load is late with its beats. One that is silent for twice as long as it lately was
# is silent for another reason.
GAPS_MISSED = 2.0
LOOK_AGAIN_S = 0.1

SlotState = Literal[
    "vacant",  # nothing there: make a pod under the current attempt
    "blocked",  # a pod of an earlier training still has the name
    "leaving",  # its pod is being deleted
    "failed",  # its pod ended badly and that is not accounted for yet
    "succeeded",  # its pod ended well
    "lost",  # its pod is on a node that cannot be reached
    "starting",  # its pod is alive, and has not been heard of
    "joining",
    "running",
    "done",
]
ALIVE: frozenset[SlotState] = frozenset({"starting", "joining", "running", "done"})


@dataclass(frozen=True)
class Slot:
    """A place in the gang and who holds it."""

    index: int
    state: SlotState
    pod: PodView | None = None
    member: MemberView | None = None


@dataclass(frozen=True)
class Situation:
    """A valid training, and what is observed of it."""

    training: Training
    spec: DeepSeekTrainingSpec
    observed: Observed
    settings: Settings
    now_s: float
    desired: int
    doubt_s: float | None  # when to look again whether somebody is lost, though nothing is heard
    slots: tuple[Slot, ...] = ()
    surplus: tuple[PodView, ...] = ()  # pods that hold no slot
    lost_surplus: frozenset[str] = frozenset()  # uids of those that cannot be reached

    @property
    def status(self) -> DeepSeekTrainingStatus:
        """The durable facts, as last written."""
        return self.training.status

    @property
    def gathering(self) -> Gathering:
        """What the coordinator knows."""
        return self.observed.gathering

    @property
    def membership(self) -> Membership | None:
        """The current generation, if one is formed."""
        return self.observed.gathering.membership

    @cached_property
    def min_replicas(self) -> int:
        """Fewest workers to train with."""
        elastic = self.spec.elastic
        return min(elastic.min_replicas, self.desired) if elastic else self.desired

    @cached_property
    def allowed(self) -> Callable[[int], bool]:
        """Whether that many workers can train together."""
        return allowed_replicas(self.spec)

    @cached_property
    def accounted(self) -> bool:
        """Whether the end of the newest generation is in the history already."""
        return _accounted(self.status)

    @cached_property
    def told(self) -> frozenset[str]:
        """Names of failed pods that the history tells of.

        An entry may also name a pod that lived on when a process of it had failed: only the end of
        a pod raises the attempt.
        """
        history = self.status.history
        attempts = [*(h.attempt for h in history[1:]), self.status.attempt]
        return frozenset(
            h.pod
            for h, next_attempt in zip(history, attempts, strict=False)
            if h.pod and h.failure_class != "voluntary" and h.attempt < next_attempt
        )

    @cached_property
    def free_attempt(self) -> int:
        """The next attempt under which no pod of an earlier training still has a name."""
        others = [p.attempt for p in self.observed.pods if p.training_uid != self.training.uid]
        return max([self.status.attempt, *others]) + 1

    @cached_property
    def troubled_nodes(self) -> tuple[NodeView, ...]:
        """Those that say that something is broken, or that they are about to go."""
        return tuple(n for n in self.observed.nodes.values() if n.fault or n.leaving)

    def in_state(self, *states: SlotState) -> tuple[Slot, ...]:
        """The slots in one of these states."""
        return tuple(s for s in self.slots if s.state in states)

    def is_news(self, pod: PodView) -> bool:
        """Whether the failure of this pod is not accounted for yet.

        Accounting raises the attempt, so a failed pod of the current attempt is always news. An
        older one is news if it took part in a generation whose end is not in the history.
        """
        if pod.attempt >= self.status.attempt:
            return True
        if pod.name in self.told:
            return False
        if self.membership and pod.uid not in self.membership.pod_uids:
            return False
        return not self.accounted


def _accounted(status: DeepSeekTrainingStatus) -> bool:
    return any(entry.generation == status.generation for entry in status.history)


def desired_replicas(spec: DeepSeekTrainingSpec) -> int:
    """Worker pods wanted, within the bounds of `elastic`."""
    elastic = spec.elastic
    if elastic is None:
        return spec.workers.replicas
    return max(elastic.min_replicas, min(elastic.max_replicas, spec.workers.replicas))


def survey(
    training: Training,
    spec: DeepSeekTrainingSpec,
    observed: Observed,
    settings: Settings,
    now_s: float,
) -> Situation:
    """Give every pod its place."""
    desired = desired_replicas(spec)
    own = [p for p in observed.pods if p.training_uid == training.uid]
    foreign = {p.name for p in observed.pods if p.training_uid != training.uid}
    reach = Reach(
        training.status, observed, duration_s(spec.recovery.heartbeat_timeout), own, now_s
    )
    doubts = [reach.doubt_s(p) for p in own if not reach.lost(p)]
    doubt_s = min((d for d in doubts if d is not None), default=None)
    bare = Situation(training, spec, observed, settings, now_s, desired, doubt_s)
    by_slot: dict[int, list[PodView]] = {}
    for pod in own:
        by_slot.setdefault(pod.slot, []).append(pod)
    slots = tuple(
        _slot(index, by_slot.get(index, []), bare, reach, foreign) for index in range(desired)
    )
    held = {slot.pod.uid for slot in slots if slot.pod}
    surplus = tuple(p for p in own if p.uid not in held)
    lost_surplus = frozenset(p.uid for p in surplus if reach.lost(p))
    return replace(bare, slots=slots, surplus=surplus, lost_surplus=lost_surplus)


class Reach:
    """Which pods cannot be reached. Unknown is not bad: it takes silence or a node down."""

    def __init__(
        self,
        status: DeepSeekTrainingStatus,
        observed: Observed,
        timeout_s: float,
        own: Iterable[PodView],
        now_s: float,
    ) -> None:
        self._nodes = observed.nodes
        self._timeout_s = timeout_s
        self._listening_s = observed.gathering.listening_s
        self._now_s = now_s
        self.members = {m.pod_uid: m for m in observed.gathering.members}
        self._condemned = {h.pod for h in status.history if h.reason == NODE_LOST}
        heard_of = [m for p in own if not p.finished and (m := self.members.get(p.uid)) is not None]
        several = len({m.node for m in heard_of}) > 1
        self._deaf = several and all(m.silent_s > timeout_s for m in heard_of)
        before = [p for p in own if p.created_at_s < now_s - self._listening_s]
        self._unheard = _unheard(status, before, self.members)

    def lost(self, pod: PodView) -> bool:
        """Whether to take the pod for dead although the cluster still shows it."""
        limit_s = self._limit_s(pod)
        return limit_s is not None and self._silent_s(pod) > limit_s

    def doubt_s(self, pod: PodView) -> float | None:
        """Seconds after which a pod may be lost without any further news of it."""
        limit_s, silent_s = self._limit_s(pod), self._silent_s(pod)
        if limit_s is None:
            return None
        heard = pod.uid in self.members
        if heard and silent_s <= self._timeout_s and not self._down(pod):
            return None  # the coordinator tells when that is over
        return max(LOOK_AGAIN_S, limit_s - silent_s)

    def _limit_s(self, pod: PodView) -> float | None:
        """Silence that makes a pod lost; None if none does."""
        if pod.finished or not pod.node:
            return None
        if self._down(pod):
            return self._timeout_s
        if pod.deleting:  # its kubelet is there and ends it
            return None
        if pod.uid in self._unheard:
            return self._timeout_s * GAPS_MISSED
        member = self.members.get(pod.uid)
        if member is None:
            # Decided before, and not finished: no more silence is waited for.
            return -math.inf if pod.name in self._condemned else None
        return None if member.state == "done" else self._patience_s(member)

    def _down(self, pod: PodView) -> bool:
        node = self._nodes.get(pod.node)
        return node is not None and not node.ready

    def _patience_s(self, member: MemberView) -> float:
        """Silence that makes a member lost: more for one whose beats are late at times."""
        longest_s = self._timeout_s * DEAF_FACTOR
        if self._deaf:
            return longest_s
        return min(longest_s, max(self._timeout_s, member.gap_s * GAPS_MISSED))

    def _silent_s(self, pod: PodView) -> float:
        member = self.members.get(pod.uid)
        if member:
            return member.silent_s
        return min(self._listening_s, self._now_s - pod.created_at_s)


def _unheard(
    status: DeepSeekTrainingStatus, before: Iterable[PodView], members: Mapping[str, MemberView]
) -> frozenset[str]:
    """Members of the generation that fell silent before this coordinator began to listen.

    The others say how many they are. If there were just as many pods by then, none of these is
    still to come; nor is one while no failure of the generation is known, for that makes new ones.
    """
    if _accounted(status):
        return frozenset()
    pods = [p for p in before if not p.finished and not p.deleting]
    heard = [m for p in pods if (m := members.get(p.uid)) and m.generation == status.generation]
    unheard = frozenset(p.uid for p in pods if p.uid not in members)
    world = max((m.group_world_size for m in heard), default=0)
    return unheard if len(heard) + len(unheard) == world else frozenset()


def _slot(index: int, pods: list[PodView], s: Situation, reach: Reach, foreign: set[str]) -> Slot:
    alive = [p for p in pods if not p.finished and not p.deleting]
    if alive:
        pod = max(alive, key=lambda p: (p.uid in reach.members, p.attempt))
        member = reach.members.get(pod.uid)
        return Slot(index, "lost" if reach.lost(pod) else _member_state(member), pod, member)
    leaving = [p for p in pods if not p.finished]
    if leaving:
        pod = max(leaving, key=lambda p: p.attempt)
        return Slot(
            index, "lost" if reach.lost(pod) else "leaving", pod, reach.members.get(pod.uid)
        )
    if pods:
        return _ended(index, max(pods, key=lambda p: (p.attempt, p.created_at_s)), s)
    name_is_taken = pod_name(s.training.name, index, max(s.status.attempt, 1)) in foreign
    return Slot(index, "blocked" if name_is_taken else "vacant")


def _member_state(member: MemberView | None) -> SlotState:
    if member is None or member.state == "leaving":
        return "starting"
    return member.state


def _ended(index: int, pod: PodView, s: Situation) -> Slot:
    if pod.deleting and pod.attempt >= s.status.attempt:
        return Slot(index, "leaving", pod)  # its name is free in a moment
    if pod.phase == "Succeeded" and not pod.deleting:
        return Slot(index, "succeeded", pod)
    if not pod.deleting and s.is_news(pod):
        return Slot(index, "failed", pod)
    return Slot(index, "vacant", pod)


def pod_name(training: str, slot: int, attempt: int) -> str:
    """Name of a worker pod: deterministic, so that making it twice makes it once."""
    return f"{training}-{slot}-{attempt}"

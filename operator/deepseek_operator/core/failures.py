"""What a failure is: its class, its words, its budget, its place in the history."""

from __future__ import annotations

from dataclasses import dataclass

from dstrain_api.protocol import PEER_LOST
from dstrain_api.quantities import duration_s
from dstrain_api.spec import BudgetSpec
from dstrain_api.status import DeepSeekTrainingStatus, FailureClass, HistoryEntry, Restarts

from deepseek_operator.core.clock import rfc3339_ms, seconds
from deepseek_operator.core.model import PodView, WorkerError
from deepseek_operator.core.situation import NODE_LOST, Situation

HISTORY_LIMIT = 10
MESSAGE_LIMIT = 2048  # characters of a failure that the status keeps; the end says most
EXCLUDED_AT_LEAST_S = 60.0  # a node that came back at once may go again

# Reasons of the DisruptionTarget condition that a person or the scheduler asked for; the others
# (DeletionByTaintManager, DeletionByPodGC, TerminationByKubelet) come from a bad node.
# https://kubernetes.io/docs/concepts/workloads/pods/disruptions/#pod-disruption-conditions
VOLUNTARY_DISRUPTIONS = {"EvictionByEvictionAPI": "Drained", "PreemptionByScheduler": "Preempted"}

# What the kubelet and containerd say of a container that was gone when they came back from a
# restart of the node.
LOST_CONTAINER = frozenset({"ContainerStatusUnknown", "Unknown"})

_ORDER: dict[FailureClass, int] = {
    "infrastructure": 0,
    "application": 1,
    "configuration": 2,
    "voluntary": 3,
}


@dataclass(frozen=True, kw_only=True)
class Failure:
    """Something that ended a pod or a generation."""

    failure_class: FailureClass
    reason: str
    message: str
    node: str = ""
    pod: str = ""
    exit_code: int | None = None

    @property
    def severity(self) -> int:
        """Smaller is closer to the cause: what is lost explains the errors of those who stay."""
        return _ORDER[self.failure_class]


def of_lost_pod(pod: PodView) -> Failure:
    """Its node does not answer."""
    return Failure(
        failure_class="infrastructure",
        reason=NODE_LOST,
        message=f"node {pod.node} cannot be reached: {pod.name} went silent",
        node=pod.node,
        pod=pod.name,
    )


def of_missing_pod(pod: PodView | None, *, scaled: bool) -> Failure:
    """A pod that is being deleted, or is gone, without having failed."""
    name = pod.name if pod else ""
    node = pod.node if pod else ""
    if pod and pod.disrupted and pod.disrupted not in VOLUNTARY_DISRUPTIONS:
        return Failure(
            failure_class="infrastructure",
            reason="Evicted",
            message=f"{name} was evicted from node {node} ({pod.disrupted})",
            node=node,
            pod=name,
        )
    reason = VOLUNTARY_DISRUPTIONS.get(pod.disrupted, "PodDeleted") if pod else "PodDeleted"
    return Failure(
        failure_class="voluntary",
        reason="Scaled" if scaled else reason,
        message="the number of workers was changed" if scaled else f"{name or 'a pod'} was deleted",
        node=node,
        pod=name,
    )


def of_failed_pod(pod: PodView) -> Failure:
    """A pod whose containers ended badly."""
    container = pod.container
    if pod.deleting or pod.disrupted:
        return of_missing_pod(pod, scaled=False)
    if pod.reason or container.exit_code is None or container.terminated_reason in LOST_CONTAINER:
        # The kubelet or the control plane ended it: Evicted, NodeShutdown, NodeLost, Preempting ...
        reason = pod.reason or container.terminated_reason or "PodFailed"
        return Failure(
            failure_class="infrastructure",
            reason=reason,
            message=f"{pod.name} was ended on node {pod.node}: {reason}",
            node=pod.node,
            pod=pod.name,
        )
    if container.terminated_reason == "OOMKilled":
        reason, text = (
            "OOMKilled",
            "it used more memory than its limit; raise workers.resources.limits.memory or lower "
            "training.microBatch",
        )
    else:
        reason = "PodFailed"
        text = container.terminated_message or f"the container ended with {container.exit_code}"
    return Failure(
        failure_class="application",
        reason=reason,
        message=f"{pod.name} failed: {text}",
        node=pod.node,
        pod=pod.name,
        exit_code=container.exit_code,
    )


def of_worker_error(error: WorkerError) -> Failure:
    """A training process that ended badly while its pod lives."""
    if error.fingerprint == PEER_LOST:
        return Failure(
            failure_class="infrastructure",
            reason="PeerLost",
            message=f"{error.pod} lost its connection to another worker: {error.message}",
            node=error.node,
            pod=error.pod,
            exit_code=error.exit_code,
        )
    if error.exit_code < 0:
        reason, said = "ProcessKilled", f"a process was killed by signal {-error.exit_code}"
    else:
        reason, said = "ProcessFailed", f"a process ended with exit code {error.exit_code}"
    return Failure(
        failure_class="application",
        reason=reason,
        message=f"{error.pod}: {said}" + (f": {error.message}" if error.message else ""),
        node=error.node,
        pod=error.pod,
        exit_code=error.exit_code,
    )


def root_cause(errors: tuple[WorkerError, ...]) -> WorkerError:
    """The error that came first: what breaks a connection explains those who report it broken."""
    return min(errors, key=lambda e: (e.exit_code >= 0, e.fingerprint == PEER_LOST, e.at_s))


def record(s: Situation, failure: Failure, *, generation: int) -> DeepSeekTrainingStatus:
    """The status with this failure in its history, counters and budget."""
    status = s.status
    said = s.gathering.progress
    entry = HistoryEntry(
        attempt=status.attempt,
        generation=generation,
        failure_class=failure.failure_class,
        reason=failure.reason,
        message=failure.message[-MESSAGE_LIMIT:],
        node=failure.node,
        pod=failure.pod,
        exit_code=failure.exit_code,
        from_step=max(status.progress.step, said.step if said else 0),
        time=rfc3339_ms(s.now_s),
    )
    kind = "application" if failure.failure_class == "configuration" else failure.failure_class
    counted = status.restarts.model_dump(by_alias=False)
    counted[kind] += 1
    failures = {k: list(v) for k, v in status.failures.items()}
    budget = _budget(s, failure)
    if budget:
        window_s = duration_s(budget.window)
        recent = [t for t in failures.get(kind, []) if s.now_s - seconds(t) < window_s]
        # One more than the budget is enough to know that it is spent.
        failures[kind] = [*recent, entry.time][-(budget.max + 1) :]
    return status.model_copy(
        update={
            "history": [*status.history, entry][-HISTORY_LIMIT:],
            "restarts": Restarts(**counted),
            "failures": failures,
        }
    )


def over_budget(s: Situation, failure: Failure, after: DeepSeekTrainingStatus) -> str:
    """Why this failure is the last one, in words; empty if it is repaired."""
    budget = _budget(s, failure)
    if budget is None:
        return ""
    times = after.failures.get(failure.failure_class, [])
    if len(times) <= budget.max:
        return ""
    count = f"{len(times)} {failure.failure_class} failures within {budget.window}"
    return (
        f"{count}, more than the budget of {budget.max} "
        f"(recovery.budgets.{failure.failure_class}); the last one: {failure.message}"
    )


def excluded_nodes(s: Situation, status: DeepSeekTrainingStatus) -> tuple[str, ...]:
    """Nodes that new pods avoid: lost ones, until they are Ready again and a while has passed."""
    found: list[str] = []
    for entry in status.history:
        if entry.reason != NODE_LOST or not entry.node or entry.node in found:
            continue
        node = s.observed.nodes.get(entry.node)
        recent = s.now_s - seconds(entry.time) < EXCLUDED_AT_LEAST_S
        if recent or (node is not None and not node.ready):
            found.append(entry.node)
    return tuple(sorted(found))


def exclusion_wait_s(s: Situation, status: DeepSeekTrainingStatus) -> float | None:
    """Seconds until the next node may be used again for the time alone; None if there is none."""
    ends = [
        seconds(entry.time) + EXCLUDED_AT_LEAST_S - s.now_s
        for entry in status.history
        if entry.reason == NODE_LOST
    ]
    return min((wait_s for wait_s in ends if wait_s > 0), default=None)


def _budget(s: Situation, failure: Failure) -> BudgetSpec | None:
    budgets = s.spec.recovery.budgets
    match failure.failure_class:
        case "infrastructure":
            return budgets.infrastructure
        case "application":
            return budgets.application
    return None

"""What happened, told from what is left of it: containers, pods, nodes and error reports.

A failure's class decides its budget, so it follows evidence only: what a node or the control plane
did to a worker is never counted against the program.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from dstrain_api.protocol import HANG, PEER_LOST, PREFLIGHT
from dstrain_api.status import FailureClass

from deepseek_operator.core.model import NodeView, PodView, WorkerError
from deepseek_operator.core.situation import NODE_LOST, Situation

# Reasons of the DisruptionTarget condition that are nobody's fault; DeletionByPodGC comes from a
# node that is gone, and the others depend on more.
# https://kubernetes.io/docs/concepts/workloads/pods/disruptions/#pod-disruption-conditions
_DISRUPTIONS: dict[str, tuple[FailureClass, str]] = {
    "EvictionByEvictionAPI": ("voluntary", "Drained"),
    "PreemptionByScheduler": ("preemption", "Preempted"),
}

# status.reason of a pod that the kubelet ended to make room, or because its node shuts down.
# https://kubernetes.io/docs/concepts/cluster-administration/node-shutdown
_GIVES_WAY = {
    "Preempting": "Preempted",
    "Terminated": "NodeShutdown",
    "NodeShutdown": "NodeShutdown",
    "Shutdown": "NodeShutdown",
}

# What the kubelet and containerd say of a container that was gone when they came back from a
# restart of the node.
_LOST_CONTAINER = frozenset({"ContainerStatusUnknown", "Unknown"})

# The runtime could not start what the spec names.
_NOT_STARTED = frozenset({"StartError", "ContainerCannotRun"})

# Signals that come from outside: they tell nothing of the program, nor of the hardware.
OUTSIDE_SIGNALS = frozenset({1, 2, 9, 15})

GROWN = "Grown"
NODE_FAULT = "NodeFault"

# Characters of a text from outside, whose end says most; the history has room for a sentence more.
TEXT_LIMIT = 1536

_ORDER: dict[FailureClass, int] = {
    "infrastructure": 0,
    "outOfMemory": 1,
    "numeric": 2,
    "application": 3,
    "configuration": 4,
    "preemption": 5,
    "voluntary": 6,
}

# Reason and words of what a worker process says of its own end.
_ENDS: dict[FailureClass, tuple[str, str]] = {
    "outOfMemory": ("OutOfMemory", "a process ran out of memory"),
    "configuration": ("InvalidConfiguration", "the program cannot run as it is described"),
    "numeric": ("BadNumbers", "the program gave up because of bad numbers"),
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
    fingerprint: str = ""
    step: int = 0  # last one that the failed process finished; 0: not said
    stacks: str = ""

    @property
    def severity(self) -> int:
        """Smaller is closer to the cause: what is lost explains the errors of those who stay."""
        return _ORDER[self.failure_class]


def from_outside(exit_code: int | None) -> bool:
    """Whether a process was ended by somebody else, as its exit code says."""
    if exit_code is None:
        return False
    return (exit_code - 128 if exit_code > 0 else -exit_code) in OUTSIDE_SIGNALS


def lost_pod(pod: PodView) -> Failure:
    """Its node does not answer."""
    return Failure(
        failure_class="infrastructure",
        reason=NODE_LOST,
        message=f"node {pod.node} cannot be reached: {pod.name} went silent",
        node=pod.node,
        pod=pod.name,
    )


def missing_pod(s: Situation, pod: PodView | None, *, scaled: bool) -> Failure:
    """A pod that is being deleted, or is gone, without having failed."""
    if scaled or pod is None:
        return Failure(
            failure_class="voluntary",
            reason="Scaled" if scaled else "PodDeleted",
            message="the number of workers was changed" if scaled else "a pod was deleted",
            node=pod.node if pod else "",
            pod=pod.name if pod else "",
        )
    failure_class, reason, why = _disruption(s, pod)
    return Failure(
        failure_class=failure_class,
        reason=reason,
        message=f"{pod.name} was {why}",
        node=pod.node,
        pod=pod.name,
    )


def moved_pod(s: Situation, pod: PodView, why: str) -> Failure:
    """A pod that leaves its node before that one fails it."""
    node = s.observed.nodes.get(pod.node)
    leaving = bool(node and node.leaving and not node.fault)
    return Failure(
        failure_class="preemption" if leaving else "infrastructure",
        reason="NodeLeaving" if leaving else NODE_FAULT,
        message=f"{pod.name} is moved from node {pod.node}: {why}",
        node=pod.node,  # no pod: it has not failed, and the next one may have its name
    )


def grown(size: int) -> Failure:
    """A gang that had to shrink takes in those who are back."""
    return Failure(
        failure_class="voluntary", reason=GROWN, message=f"{size} workers can go on together"
    )


def failed_pod(s: Situation, pod: PodView) -> Failure:
    """A pod whose containers ended badly."""
    container = pod.container
    if pod.deleting or pod.disrupted or pod.reason in _GIVES_WAY:
        return missing_pod(s, pod, scaled=False)
    if pod.reason or container.exit_code is None or container.terminated_reason in _LOST_CONTAINER:
        reason = pod.reason or container.terminated_reason or "PodFailed"
        said = f": {pod.message}" if pod.message else ""
        return Failure(
            failure_class="infrastructure",
            reason=reason,
            message=f"{pod.name} was ended on node {pod.node} ({reason}){said}",
            node=pod.node,
            pod=pod.name,
        )
    text = container.terminated_message[-TEXT_LIMIT:]
    text = text or f"the container ended with {container.exit_code}"
    failure = Failure(
        failure_class="application",
        reason="PodFailed",
        message=f"{pod.name} failed: {text}",
        node=pod.node,
        pod=pod.name,
        exit_code=container.exit_code,
    )
    if container.terminated_reason == "OOMKilled":
        text = f"{pod.name} was killed: {_memory_advice(s, pod)}"
        return replace(failure, failure_class="outOfMemory", reason="OOMKilled", message=text)
    if container.terminated_reason in _NOT_STARTED:
        reason = container.terminated_reason
        text = f"{pod.name} cannot be started; check workers.image and workers.template: {text}"
        return replace(failure, failure_class="configuration", reason=reason, message=text)
    return _blamed(failure, s.observed.nodes.get(pod.node))


def stillborn_pod(pod: PodView, reason: str, problem: str) -> Failure:
    """A pod that has a node, and whose image or container cannot be had."""
    return Failure(
        failure_class="configuration",
        reason=reason,
        message=problem,
        node=pod.node,
        pod=pod.name,
    )


def worker_error(s: Situation, error: WorkerError) -> Failure:
    """A training process that ended badly while its pod lives."""
    failure = Failure(
        failure_class=error.failure_class,
        reason="ProcessFailed",
        message="",
        node=error.node,
        pod=error.pod,
        exit_code=error.exit_code,
        fingerprint=error.fingerprint,
        step=error.step,
        stacks=error.stacks,
    )
    if error.fingerprint == PEER_LOST:
        text = f"{error.pod} lost its connection to another worker: {error.message}"
        return replace(
            failure, failure_class="infrastructure", reason="PeerLost", message=text, fingerprint=""
        )
    if error.fingerprint == PREFLIGHT:
        said = error.message.rpartition("PreflightFailed: ")[2]
        text = f"{error.pod}: node {error.node} failed the check before training: {said}"
        return replace(
            failure, failure_class="infrastructure", reason="PreflightFailed", message=text
        )
    failure = _worded(s, failure, error)
    return _blamed(failure, s.observed.nodes.get(error.node))


def root_cause(errors: tuple[WorkerError, ...]) -> WorkerError:
    """The error that came first: what breaks a connection explains those who report it broken.

    Of processes that hang together, the one that got least far keeps the others waiting.
    """
    first = min(errors, key=lambda e: (_rank(e), e.at_s))
    if first.fingerprint != HANG:
        return first
    return min((e for e in errors if e.fingerprint == HANG), key=lambda e: (e.step, e.at_s))


def _rank(error: WorkerError) -> int:
    if error.fingerprint == PEER_LOST:
        return 2
    return 0 if error.exit_code < 0 and error.fingerprint != HANG else 1


def _disruption(s: Situation, pod: PodView) -> tuple[FailureClass, str, str]:
    """Class, reason and words of a pod that did not end by itself."""
    node = s.observed.nodes.get(pod.node)
    if pod.disrupted in _DISRUPTIONS:
        failure_class, reason = _DISRUPTIONS[pod.disrupted]
        return failure_class, reason, f"moved from node {pod.node} ({pod.disrupted})"
    if pod.reason in _GIVES_WAY:
        reason = _GIVES_WAY[pod.reason]
        return "preemption", reason, f"ended by node {pod.node} ({pod.reason})"
    if pod.disrupted and node and node.leaving:
        return "preemption", "NodeLeaving", f"moved from node {pod.node} ({node.leaving})"
    if pod.disrupted:
        why = f"{pod.disrupted}: {pod.message}" if pod.message else pod.disrupted
        return "infrastructure", "Evicted", f"evicted from node {pod.node} ({why})"
    return "voluntary", "PodDeleted", "deleted"


def _worded(s: Situation, failure: Failure, error: WorkerError) -> Failure:
    """With its reason and a sentence."""
    if error.fingerprint == HANG:
        reason = "Hang"
        said = f"no step after step {error.step} on node {error.node}"
        said += f"; the stacks of all processes are in {error.stacks}" if error.stacks else ""
    elif error.failure_class in _ENDS:
        reason, said = _ENDS[error.failure_class]
    elif error.exit_code < 0:
        reason, said = "ProcessKilled", f"a process was killed by signal {-error.exit_code}"
    else:
        reason, said = "ProcessFailed", f"a process ended with exit code {error.exit_code}"
    if error.failure_class == "outOfMemory":
        pod = next((p for p in s.observed.pods if p.uid == error.pod_uid), None)
        said += f": {_memory_advice(s, pod if error.exit_code < 0 else None)}"
    text = f"{error.pod}: {said}" + (f": {error.message[-TEXT_LIMIT:]}" if error.message else "")
    return replace(failure, reason=reason, message=text)


def _memory_advice(s: Situation, pod: PodView | None) -> str:
    """What was too little, and what to change; without a pod it is the memory of a device."""
    smaller = "lower training.microBatch" if s.spec.training else "make the program smaller"
    if pod is None:
        return f"{smaller}, or spread the model over more workers"
    if pod.memory_limit:
        return (
            f"it used more memory than its limit of {pod.memory_limit}; raise "
            f"workers.resources.limits.memory or {smaller}"
        )
    return (
        f"node {pod.node} ran out of memory; set workers.resources.requests.memory to what a "
        f"worker needs, or {smaller}"
    )


def _blamed(failure: Failure, node: NodeView | None) -> Failure:
    """The same, blamed on the node where that one says that it is broken."""
    if node is None or not node.fault or failure.failure_class not in ("application", "numeric"):
        return failure
    return replace(
        failure,
        failure_class="infrastructure",
        reason=NODE_FAULT,
        message=f"node {node.name} is broken ({node.fault}): {failure.message}",
    )

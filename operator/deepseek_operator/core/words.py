"""Sentences and short texts for people: what is waited for, what is wrong with a pod, columns."""

from __future__ import annotations

from dstrain_api.status import DeepSeekTrainingStatus, Progress, Summary

from deepseek_operator.core.model import PodView
from deepseek_operator.core.situation import Situation, Slot

IMAGE_REASONS = frozenset(
    {"ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull"}
)
CONTAINER_REASONS = frozenset(
    {"CreateContainerConfigError", "CreateContainerError", "RunContainerError"}
)
COLUMN_LIMIT = 512  # characters of the MESSAGE column
NAMED_PODS = 3  # more than these are only counted


def pod_problem(s: Situation, pod: PodView) -> tuple[str, str] | None:
    """Reason and sentence of what keeps a pod from starting; None if nothing is known to."""
    waiting = pod.container.waiting_reason
    said = pod.container.waiting_message.strip()
    if waiting in IMAGE_REASONS:
        image = s.spec.workers.image or s.settings.trainer_image
        text = f"image {image} of {pod.name} can't be pulled on node {pod.node}; check "
        text += "workers.image, that it exists, and imagePullSecrets"
        return "ImageUnavailable", f"{text}: {said}" if said else text
    if waiting in CONTAINER_REASONS:
        text = f"the container of {pod.name} can't be made on node {pod.node} ({waiting})"
        return "ContainerNotCreated", f"{text}: {said}" if said else text
    if pod.unschedulable and not pod.node:
        return "Unschedulable", f"no node fits {pod.name}: {_scheduler_words(pod.unschedulable)}"
    return None


def _scheduler_words(message: str) -> str:
    """The scheduler's reasons without its notes on preemption, and what to do about them."""
    reasons = message.split(" preemption:")[0].rstrip(". ")
    if "nvidia.com/gpu" in reasons:
        advice = "free or add GPUs, or lower workers.gpusPerWorker or workers.replicas"
    elif "Insufficient" in reasons:
        advice = "free or add nodes, or lower workers.resources.requests or workers.replicas"
    elif "persistentvolumeclaim" in reasons.lower() or "PersistentVolumeClaim" in reasons:
        advice = "check the claims of data and checkpoint, and their storage class"
    else:
        advice = "check the nodes, their taints, and workers.template"
    return f"{reasons}; {advice}"


def waiting_for(s: Situation) -> str:
    """Which workers are missing, and why, as far as is known."""
    missing = [slot for slot in s.slots if slot.state not in ("joining", "running", "done")]
    if not missing:
        return f"all {s.desired} workers have joined"
    named = "; ".join(_why(s, slot) for slot in missing[:NAMED_PODS])
    more = f"; and {len(missing) - NAMED_PODS} more" if len(missing) > NAMED_PODS else ""
    return f"waiting for {len(missing)} of {s.desired} workers: {named}{more}"


def _why(s: Situation, slot: Slot) -> str:
    pod = slot.pod
    if pod is None or slot.state == "vacant":
        return f"worker {slot.index} is being created"
    problem = pod_problem(s, pod)
    if problem:
        return problem[1]
    match slot.state:
        case "leaving":
            return f"{pod.name} is ending"
        case "lost":
            return f"{pod.name} on node {pod.node} can't be reached"
        case "failed" | "succeeded":
            return f"{pod.name} has ended"
    if not pod.node:
        return f"{pod.name} waits for a node"
    if pod.container.running:
        return f"{pod.name} on node {pod.node} has not joined yet"
    return f"{pod.name} is starting on node {pod.node}"


def summary(s: Situation, status: DeepSeekTrainingStatus, message: str) -> Summary:
    """Texts for the printer columns."""
    p = status.progress
    share = f"{100 * p.step // p.total_steps}%" if p.total_steps else ""
    steps = f"{p.step}/{p.total_steps}" if p.total_steps else (str(p.step) if p.step else "")
    return Summary(
        progress=share,
        step=steps,
        tokens_per_second=short_number(p.tokens_per_second) if p.tokens_per_second else "",
        mfu=f"{100 * p.mfu:.0f}%" if p.mfu is not None else "",
        eta=short_duration(p.eta_seconds) if p.eta_seconds is not None else "",
        workers=f"{status.workers.ready}/{status.workers.desired}",
        restarts=str(status.restarts.counted),
        loss=f"{p.loss:.3f}" if p.loss is not None else "",
        checkpoint=str(status.checkpoint.step) if status.checkpoint else "",
        message=shortened(message),
    )


def shortened(message: str) -> str:
    """A message that fits into the column."""
    return message if len(message) <= COLUMN_LIMIT else message[: COLUMN_LIMIT - 1] + "…"


def eta_s(progress: Progress, step_seconds: float) -> float | None:
    """Seconds until the last step at the current pace; None while the pace is not known."""
    if not progress.total_steps or step_seconds <= 0:
        return None
    return round((progress.total_steps - progress.step) * step_seconds, 1)


def short_number(value: float) -> str:
    """Three digits or so: 950, 5.2k, 1.3M."""
    for factor, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            scaled = value / factor
            return f"{scaled:.1f}{unit}" if scaled < 100 else f"{scaled:.0f}{unit}"
    return f"{value:.0f}" if value >= 10 else f"{value:.1f}"


def short_duration(duration_s: float) -> str:
    """The two largest units: 42s, 3m10s, 3h12m, 2d4h."""
    whole = int(duration_s)
    for unit_s, unit, next_s, following in (
        (86_400, "d", 3600, "h"),
        (3600, "h", 60, "m"),
        (60, "m", 1, "s"),
    ):
        if whole >= unit_s:
            rest = whole % unit_s // next_s
            return f"{whole // unit_s}{unit}" + (f"{rest}{following}" if rest else "")
    return f"{whole}s"

"""Objects of the API as the frozen views of `core.model`: the only place that knows their JSON."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dstrain_api.constants import (
    ANNOTATION_EXCLUDED_NODES,
    KIND,
    LABEL_ATTEMPT,
    LABEL_SLOT,
    LABEL_TRAINING,
    TRAINER_CONTAINER,
)
from dstrain_api.rules import InvalidSpec, validate
from dstrain_api.spec import DeepSeekTrainingSpec
from dstrain_api.status import DeepSeekTrainingStatus
from pydantic import ValidationError

from deepseek_operator.core import hardware
from deepseek_operator.core.clock import seconds
from deepseek_operator.core.model import ContainerView, NodeView, PodView, Training

Object = Mapping[str, Any]


def training_view(stored: Object) -> Training:
    """A DeepSeekTraining.

    A spec that cannot be trained is told by `spec_error`. Fields of a later version are ignored.

    Raises:
        ValueError: the status cannot be read: whoever goes on without it repeats what was done.
    """
    meta = stored["metadata"]
    spec, spec_error = _spec(stored.get("spec") or {})
    try:
        status = DeepSeekTrainingStatus.model_validate(stored.get("status") or {}, extra="ignore")
    except ValidationError as error:
        raise ValueError(
            f"the status of {meta.get('namespace')}/{meta['name']} cannot be read: {error}; "
            "repair it with kubectl edit --subresource=status"
        ) from error
    return Training(
        namespace=meta.get("namespace", ""),
        name=meta["name"],
        uid=meta["uid"],
        resource_version=meta["resourceVersion"],
        generation=meta.get("generation", 0),
        created_at_s=seconds(meta["creationTimestamp"]),
        deleting="deletionTimestamp" in meta,
        spec=spec,
        spec_error=spec_error,
        status=status,
    )


def pod_view(stored: Object) -> PodView | None:
    """A worker pod; None for a pod that no training made."""
    meta = stored["metadata"]
    labels = meta.get("labels") or {}
    owner = next(
        (o for o in meta.get("ownerReferences") or () if o["kind"] == KIND and o.get("controller")),
        None,
    )
    slot, attempt = labels.get(LABEL_SLOT, ""), labels.get(LABEL_ATTEMPT, "")
    if owner is None or LABEL_TRAINING not in labels or not (slot.isdigit() and attempt.isdigit()):
        return None
    excluded = (meta.get("annotations") or {}).get(ANNOTATION_EXCLUDED_NODES, "")
    status = stored.get("status") or {}
    conditions = {c["type"]: c for c in status.get("conditions") or ()}
    disrupted = conditions.get("DisruptionTarget", {})
    scheduled = conditions.get("PodScheduled", {})
    return PodView(
        namespace=meta["namespace"],
        name=meta["name"],
        uid=meta["uid"],
        training=labels[LABEL_TRAINING],
        training_uid=owner["uid"],
        slot=int(slot),
        attempt=int(attempt),
        node=(stored.get("spec") or {}).get("nodeName", ""),
        phase=status.get("phase", "Pending"),
        deleting="deletionTimestamp" in meta,
        created_at_s=seconds(meta["creationTimestamp"]),
        scheduled_at_s=_since(scheduled) if scheduled.get("status") == "True" else 0.0,
        unschedulable=_unschedulable(scheduled),
        excluded_nodes=tuple(filter(None, excluded.split(","))),
        disrupted=disrupted.get("reason", "") if disrupted.get("status") == "True" else "",
        reason=status.get("reason", ""),
        message=status.get("message", ""),
        memory_limit=_memory_limit(stored.get("spec") or {}),
        container=_container(status),
    )


def node_view(stored: Object) -> NodeView:
    """A node; one without a Ready condition, as right after its start, is not ready."""
    conditions = (stored.get("status") or {}).get("conditions") or ()
    taints = (stored.get("spec") or {}).get("taints") or ()
    ready: Object = next((c for c in conditions if c["type"] == "Ready"), {})
    return NodeView(
        name=stored["metadata"]["name"],
        ready=ready.get("status") == "True" and not hardware.is_off(taints),
        ready_since_s=_since(ready),
        fault=hardware.fault(conditions, taints),
        leaving=hardware.leaving(taints),
    )


def _spec(stored: Object) -> tuple[DeepSeekTrainingSpec | None, str]:
    try:
        known = DeepSeekTrainingSpec.model_validate(stored, extra="ignore")
        stored = known.model_dump(mode="json", by_alias=True, exclude_unset=True)
    except ValidationError:
        pass  # what is wrong is told by validate, in words
    try:
        return validate(stored), ""
    except InvalidSpec as error:
        return None, str(error)


def _since(condition: Object) -> float:
    changed = condition.get("lastTransitionTime")
    return seconds(changed) if changed else 0.0


def _memory_limit(spec: Object) -> str:
    trainer: Object = next(
        (c for c in spec.get("containers") or () if c["name"] == TRAINER_CONTAINER), {}
    )
    limits = (trainer.get("resources") or {}).get("limits") or {}
    return str(limits.get("memory", ""))


def _unschedulable(condition: Object) -> str:
    if condition.get("status") != "False" or condition.get("reason") != "Unschedulable":
        return ""
    return str(condition.get("message") or "no reason given")


def _container(status: Object) -> ContainerView:
    reported: Object = next(
        (c for c in status.get("containerStatuses") or () if c["name"] == TRAINER_CONTAINER), {}
    )
    state = reported.get("state") or {}
    waiting = state.get("waiting") or {}
    ended = state.get("terminated") or {}
    return ContainerView(
        running="running" in state,
        waiting_reason=waiting.get("reason", ""),
        waiting_message=waiting.get("message", ""),
        exit_code=ended.get("exitCode"),
        terminated_reason=ended.get("reason", ""),
        terminated_message=ended.get("message", ""),
    )

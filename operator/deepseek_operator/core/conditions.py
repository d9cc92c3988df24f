"""Reading and setting the conditions of a status."""

from __future__ import annotations

from typing import Literal

from dstrain_api.status import Condition, ConditionType, DeepSeekTrainingStatus

from deepseek_operator.core.clock import rfc3339
from deepseek_operator.core.situation import Situation

ConditionStatus = Literal["True", "False", "Unknown"]
MESSAGE_LIMIT = 4096


def condition(status: DeepSeekTrainingStatus, kind: ConditionType) -> Condition | None:
    """The condition of that type, if it was ever set."""
    return next((c for c in status.conditions if c.type == kind), None)


def holds(status: DeepSeekTrainingStatus, kind: ConditionType) -> bool:
    """Whether the condition is True."""
    found = condition(status, kind)
    return found is not None and found.status == "True"


def set_condition(
    status: DeepSeekTrainingStatus,
    kind: ConditionType,
    value: ConditionStatus,
    reason: str,
    message: str,
    *,
    now_s: float,
    generation: int,
) -> DeepSeekTrainingStatus:
    """The status with this condition; its transition time moves only when its status does."""
    before = condition(status, kind)
    since = before.last_transition_time if before and before.status == value else rfc3339(now_s)
    after = Condition(
        type=kind,
        status=value,
        reason=reason,
        message=message[-MESSAGE_LIMIT:],
        last_transition_time=since,
        observed_generation=generation,
    )
    if after == before:
        return status
    kept = [after if c.type == kind else c for c in status.conditions]
    return status.model_copy(update={"conditions": kept if before else [*kept, after]})


def with_condition(
    s: Situation,
    status: DeepSeekTrainingStatus,
    kind: ConditionType,
    value: ConditionStatus,
    reason: str,
    message: str,
) -> DeepSeekTrainingStatus:
    """`set_condition` at the situation's time and metadata.generation."""
    return set_condition(
        status,
        kind,
        value,
        reason,
        message,
        now_s=s.now_s,
        generation=s.training.generation,
    )

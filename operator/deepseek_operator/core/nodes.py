"""Which nodes new pods avoid, and why."""

from __future__ import annotations

from dstrain_api.status import DeepSeekTrainingStatus

from deepseek_operator.core.clock import seconds
from deepseek_operator.core.situation import NODE_LOST, Situation

EXCLUDED_AT_LEAST_S = 60.0  # a node that came back at once may go again


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

"""Which nodes workers avoid: what failures point at, how long that is remembered, and exceptions.

A failure that points at a node (a crash by a signal, a hang) is an offence; two within an hour keep
new pods away from it. A node that says itself that it is broken or about to go is avoided while it
says so, and a lost one until it is Ready. A training never fails to find a node because of this: if
pods find none, the mildest of those nodes is tolerated.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from dstrain_api.protocol import HANG, PREFLIGHT
from dstrain_api.status import DeepSeekTrainingStatus, ExcludedNode, NodeRecord

from deepseek_operator.core.clock import rfc3339, seconds
from deepseek_operator.core.evidence import NODE_FAULT, Failure, from_outside
from deepseek_operator.core.model import NodeView, PodView, Taint
from deepseek_operator.core.situation import NODE_LOST, Situation

LOST_AT_LEAST_S = 60.0  # a node that came back at once may go again
HALF_LIFE_S = 3600.0
AVOIDED_FROM = 1.5  # two offences within a half-life
AVOIDED_TO = 0.75  # which is reached after an hour or a little more
FORGOTTEN = 0.1
RECORDS_LIMIT = 32
EXCLUDED_LIMIT = 32


def blame(s: Situation, failure: Failure) -> list[NodeRecord]:
    """The records of nodes after this failure."""
    records = [r for r in s.status.nodes if not _is_forgotten(s, r)]
    weight = _weight(failure)
    if not failure.node or not weight:
        return records
    known = _known(records, failure.node)
    offences = weight + (_offences(s, known) if known else 0.0)
    until_s = 0.0
    if offences >= AVOIDED_FROM:
        until_s = s.now_s + HALF_LIFE_S * math.log2(offences / AVOIDED_TO)
    record = NodeRecord(
        name=failure.node,
        reason=failure.reason,
        offences=round(offences, 3),
        time=rfc3339(s.now_s),
        avoid_until=rfc3339(until_s) if until_s else None,
        tolerated=bool(known and known.tolerated),
    )
    return _with(records, record)


def losing(
    s: Situation, status: DeepSeekTrainingStatus, names: Iterable[str]
) -> DeepSeekTrainingStatus:
    """The status in which these nodes are lost: the scheduler takes them for good for a while."""
    records = status.nodes
    for name in sorted(set(names)):
        known = _known(records, name)
        if known and known.reason == NODE_LOST and not known.tolerated and _is_avoided(s, known):
            continue
        record = NodeRecord(
            name=name,
            reason=NODE_LOST,
            offences=round(_offences(s, known), 3) if known else 0.0,
            time=rfc3339(s.now_s),
            avoid_until=rfc3339(s.now_s + LOST_AT_LEAST_S),
        )
        records = _with(records, record)
    return status.model_copy(update={"nodes": records})


def excluded(s: Situation, status: DeepSeekTrainingStatus) -> list[ExcludedNode]:
    """Nodes that new pods avoid, by name."""
    records = {r.name: r for r in status.nodes}
    found = [
        ExcludedNode(name=r.name, reason=_why(r), until=r.avoid_until)
        for r in records.values()
        if not r.tolerated and _is_avoided(s, r)
    ]
    named = {n.name for n in found}
    found += [
        ExcludedNode(name=node.name, reason=node.fault or node.leaving)
        for node in s.troubled_nodes
        if node.name not in named and not (node.name in records and records[node.name].tolerated)
    ]
    return sorted(found, key=lambda n: n.name)[:EXCLUDED_LIMIT]


def is_troubled(s: Situation, pod: PodView) -> bool:
    """Whether a pod's node says that it is broken, or about to go."""
    return any(node.name == pod.node for node in s.troubled_nodes)


def must_leave(s: Situation, pod: PodView) -> str:
    """Why a pod should leave its node; empty if it may stay. A lost node is another matter."""
    node = s.observed.nodes.get(pod.node)
    record = _known(s.status.nodes, pod.node)
    if node is None or (record and record.tolerated):
        return ""
    if is_troubled(s, pod):
        return node.fault or node.leaving
    avoided = record and record.offences >= AVOIDED_FROM and _is_avoided(s, record)
    return _why(record) if record and avoided else ""


def tolerating(s: Situation, names: Iterable[str], *, count: int) -> DeepSeekTrainingStatus | None:
    """The status in which the mildest of these nodes are used again; None if none may be.

    A lost node cannot be used before it has come back.
    """
    shunned = {n.name for n in excluded(s, s.status)}
    records = {r.name: r for r in s.status.nodes}
    usable = []
    for name in shunned.intersection(names):
        node, record = s.observed.nodes.get(name), records.get(name)
        if node and node.ready and not (record and _is_lost(s, record, node)):
            usable.append((_badness(node, record), name))
    mildest = [name for _, name in sorted(usable)[:count]]
    if not mildest:
        return None
    now = rfc3339(s.now_s)
    known = [
        records.get(name) or NodeRecord(name=name, reason=NODE_FAULT, time=now) for name in mildest
    ]
    kept = [r for r in s.status.nodes if r.name not in mildest]
    made = [r.model_copy(update={"tolerated": True}) for r in known]
    return s.status.model_copy(update={"nodes": [*kept, *made][-RECORDS_LIMIT:]})


def newly_suspect(s: Situation, after: DeepSeekTrainingStatus) -> tuple[Taint, ...]:
    """Nodes that this status avoids for what happened there, and the one before did not."""
    before = {n.name for n in s.status.excluded_nodes}
    names = {n.name for n in after.excluded_nodes} - before
    return tuple(
        Taint(node=r.name, reason=r.reason)
        for r in after.nodes
        if r.name in names and r.offences >= AVOIDED_FROM
    )


def wait_s(s: Situation, status: DeepSeekTrainingStatus) -> float | None:
    """Seconds until the next node may be used again for the time alone; None if there is none."""
    ends = [seconds(r.avoid_until) - s.now_s for r in status.nodes if r.avoid_until]
    return min((left_s for left_s in ends if left_s > 0), default=None)


def _known(records: list[NodeRecord], name: str) -> NodeRecord | None:
    return next((r for r in records if r.name == name), None)


def _with(records: list[NodeRecord], record: NodeRecord) -> list[NodeRecord]:
    return [*(r for r in records if r.name != record.name), record][-RECORDS_LIMIT:]


def _weight(failure: Failure) -> float:
    """How much a failure says against its node.

    A signal that the program cannot have caused, and one that comes from outside, say nothing.
    """
    if failure.reason == NODE_FAULT or failure.fingerprint == PREFLIGHT:
        return AVOIDED_FROM
    if failure.fingerprint == HANG:
        return 1.0
    code = failure.exit_code or 0
    crashed = (code < 0 or code > 128) and not from_outside(code)
    return 1.0 if crashed and failure.failure_class in ("application", "numeric") else 0.0


def _offences(s: Situation, record: NodeRecord) -> float:
    age_s = max(0.0, s.now_s - seconds(record.time))
    return float(record.offences * 0.5 ** (age_s / HALF_LIFE_S))


def _is_avoided(s: Situation, record: NodeRecord) -> bool:
    if record.avoid_until and seconds(record.avoid_until) > s.now_s:
        return True
    node = s.observed.nodes.get(record.name)
    return record.reason == NODE_LOST and node is not None and not node.ready


def _is_lost(s: Situation, record: NodeRecord, node: NodeView) -> bool:
    """Whether nothing says yet that a node has come back since it was lost.

    That it is Ready does not: Kubernetes goes on saying so for most of a minute after a loss.
    """
    is_back = node.ready and node.ready_since_s > seconds(record.time)
    return record.reason == NODE_LOST and _is_avoided(s, record) and not is_back


def _is_forgotten(s: Situation, record: NodeRecord) -> bool:
    node = s.observed.nodes.get(record.name)
    if node and (node.fault or node.leaving):
        return False
    return _offences(s, record) < FORGOTTEN and not _is_avoided(s, record)


def _why(record: NodeRecord) -> str:
    if record.reason == NODE_LOST:
        return NODE_LOST
    return f"{record.reason}, {record.offences:.1f} failures within an hour point at it"


def _badness(node: NodeView, record: NodeRecord | None) -> float:
    return (100.0 if node.fault or node.leaving else 0.0) + (record.offences if record else 0.0)

"""Carrying out a plan, in the one order that lets a crash happen between any two steps.

Status first: it holds the facts that the later steps rely on, and its resourceVersion proves that
they were decided on the newest training. Then the coordinator, creates, deletes, taints, events.
Objects of one kind are made, or deleted, many at once: what a large gang costs is mostly waiting.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Final, Protocol, TypeVar

from dstrain_api import constants as names

from deepseek_operator.core.clock import rfc3339
from deepseek_operator.core.model import (
    Event,
    Manifest,
    Membership,
    Plan,
    PodDelete,
    Taint,
    Training,
)
from deepseek_operator.kube.port import (
    NODES,
    PODS,
    TRAININGS,
    AlreadyExists,
    Cluster,
    ClusterError,
    Conflict,
    NotFound,
    Refused,
    Resource,
)

# The API server made 200 pods in 0.5 s with so many requests in flight, on two cores.
WRITES_AT_ONCE: Final = 32

T = TypeVar("T")

log = logging.getLogger(__name__)


class Members(Protocol):
    """What acting needs of the coordinator."""

    def publish(self, uid: str, membership: Membership) -> None:
        """Make a generation current."""

    def end(self, uid: str, generation: int) -> None:
        """Declare a generation over."""

    def fence(self, uid: str, pod_uids: tuple[str, ...]) -> None:
        """Refuse these pods for good."""

    def order_stop(self, uid: str, stop: bool) -> None:
        """Tell the members to save and exit, or take that back."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a plan."""

    resource_version: str  # of the training, after the status was written
    conflict: bool = False  # the training has changed meanwhile: nothing more was done
    refused: str = ""  # what the cluster said when it refused a create for good
    created: tuple[dict[str, Any], ...] = ()  # objects as stored, for caches that lag


async def act(
    plan: Plan,
    training: Training,
    cluster: Cluster,
    members: Members,
    *,
    at_once: int = WRITES_AT_ONCE,
) -> Outcome:
    """Carry out a plan, with at most so many requests at once.

    Raises:
        NotFound: the training is no more.
        ClusterError: the cluster fails: look again later.
    """
    version = training.resource_version
    if plan.status is not None:
        try:
            version = await cluster.replace_status(
                training.namespace,
                training.name,
                resource_version=version,
                status=plan.status.model_dump(mode="json", by_alias=True, exclude_none=True),
            )
        except Conflict:
            return Outcome(resource_version=version, conflict=True)
    _instruct(plan, training.uid, members)
    created, refused = await _create(plan, cluster, at_once)
    where = training.namespace

    async def delete(pod: PodDelete) -> None:
        await _delete(cluster, PODS, where, pod.name, uid=pod.uid, grace_s=pod.grace_s)

    await _each(delete, plan.deletes, at_once)
    if plan.delete_training:
        await _delete(cluster, TRAININGS, where, training.name, uid=training.uid)
    for taint in plan.taints:
        await _taint(taint, cluster)
    for event in plan.events:
        await _tell(event, training, cluster)
    return Outcome(resource_version=version, refused=refused, created=created)


def _instruct(plan: Plan, uid: str, members: Members) -> None:
    if plan.fence:
        members.fence(uid, plan.fence)
    if plan.end_generation is not None:
        members.end(uid, plan.end_generation)
    members.order_stop(uid, plan.stop)
    if plan.membership is not None:
        members.publish(uid, plan.membership)


async def _create(
    plan: Plan, cluster: Cluster, at_once: int
) -> tuple[tuple[dict[str, Any], ...], str]:
    """Make each object after those of the kinds before it."""
    created: list[dict[str, Any]] = []
    refused: list[str] = []

    async def create(manifest: Manifest) -> None:
        try:
            created.append(await cluster.create(manifest))
        except AlreadyExists:
            return
        except Refused as error:
            refused.append(f"{manifest['kind']} {manifest['metadata']['name']}: {error}")

    for _, manifests in groupby(plan.creates, key=lambda m: m["kind"]):
        await _each(create, manifests, at_once)
    return tuple(created), refused[0] if refused else ""


async def _each(do: Callable[[T], Awaitable[None]], items: Iterable[T], at_once: int) -> None:
    """Do it with every item, at most so many at once.

    After a failure no other is begun; it is raised when those under way are done.
    """
    waiting = deque(items)

    async def work() -> None:
        while waiting:
            item = waiting.popleft()
            try:
                await do(item)
            except BaseException:
                waiting.clear()
                raise

    workers = [work() for _ in range(min(at_once, len(waiting)))]
    if len(workers) <= 1:
        for worker in workers:
            await worker
        return
    for outcome in await asyncio.gather(*workers, return_exceptions=True):
        if outcome is not None:
            raise outcome


async def _delete(
    cluster: Cluster,
    resource: Resource,
    namespace: str,
    name: str,
    *,
    uid: str,
    grace_s: int | None = None,
) -> None:
    with suppress(NotFound):  # then it is gone already, which is all that is wanted
        await cluster.delete(resource, namespace, name, uid=uid, grace_s=grace_s)


async def _taint(taint: Taint, cluster: Cluster) -> None:
    """Keep all pods away from a node. It is for others: this training avoids the node anyway."""
    try:
        stored = await cluster.read(NODES, "", taint.node)
        taints = stored["spec"].setdefault("taints", [])
        if any(t["key"] == names.TAINT_SUSPECT for t in taints):
            return
        made = {"key": names.TAINT_SUSPECT, "value": taint.reason, "effect": "NoSchedule"}
        taints.append(made)
        await cluster.replace({"apiVersion": "v1", "kind": "Node", **stored})
    except ClusterError as error:
        log.warning("node %s was not tainted: %s", taint.node, error)


async def _tell(event: Event, training: Training, cluster: Cluster) -> None:
    """Post an event. Its name follows from what it says, so that saying it twice says it once."""
    try:
        await cluster.create(event_manifest(event, training))
    except AlreadyExists:
        return
    except ClusterError as error:
        log.warning("event %s of %s was not posted: %s", event.reason, training.key, error)


def event_manifest(event: Event, training: Training) -> Mapping[str, Any]:
    """A core/v1 Event about the training."""
    said = f"{training.uid}/{event.reason}/{event.message}/{int(event.at_s)}"
    digest = hashlib.sha256(said.encode()).hexdigest()[:16]
    at = rfc3339(event.at_s)
    return {
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {"name": f"{training.name}.{digest}", "namespace": training.namespace},
        "involvedObject": {
            "apiVersion": names.API_VERSION,
            "kind": names.KIND,
            "name": training.name,
            "namespace": training.namespace,
            "uid": training.uid,
            "resourceVersion": training.resource_version,
        },
        "type": event.type,
        "reason": event.reason,
        "message": event.message[:1024],  # the API's limit
        "source": {"component": names.MANAGER},
        "firstTimestamp": at,
        "lastTimestamp": at,
        "count": 1,
    }

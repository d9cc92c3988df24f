"""Carrying out a plan, in the one order that lets a crash happen between any two steps.

Status first: it holds the facts that the later steps rely on, and its resourceVersion proves that
they were decided on the newest training. Then the coordinator, then creates, deletes, events.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

from dstrain_api import constants as names

from deepseek_operator.core.clock import rfc3339
from deepseek_operator.core.model import Event, Membership, Plan, Training
from deepseek_operator.kube.port import (
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


async def act(plan: Plan, training: Training, cluster: Cluster, members: Members) -> Outcome:
    """Carry out a plan.

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
    created, refused = await _create(plan, cluster)
    where = training.namespace
    for pod in plan.deletes:
        await _delete(cluster, PODS, where, pod.name, uid=pod.uid, grace_s=pod.grace_s)
    if plan.delete_training:
        await _delete(cluster, TRAININGS, where, training.name, uid=training.uid)
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


async def _create(plan: Plan, cluster: Cluster) -> tuple[tuple[dict[str, Any], ...], str]:
    created, refused = [], ""
    for manifest in plan.creates:
        try:
            created.append(await cluster.create(manifest))
        except AlreadyExists:
            continue
        except Refused as error:
            refused = refused or f"{manifest['kind']} {manifest['metadata']['name']}: {error}"
    return tuple(created), refused


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

"""A cluster in memory: the API server's rules without a server.

It keeps what the operator relies on and nothing else: uids, resource versions, watches with a
history, preconditions, graceful deletion, owner references, the status subresource. There is no
scheduler and no kubelet: tests and the local cluster play them through `bind_pod`,
`set_pod_status` and `finish_deletion`, told of every change by `observe`.

One event loop owns an instance. `objects`, `get` and observers show the stored objects: read them,
do not change them.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

from deepseek_operator.core.clock import rfc3339
from deepseek_operator.kube.port import (
    BY_KIND,
    NODES,
    PODS,
    TRAININGS,
    AlreadyExists,
    Conflict,
    Gone,
    Manifest,
    NotFound,
    Page,
    Refused,
    Resource,
    WatchEvent,
)

Object = dict[str, Any]
Observer = Callable[[Resource, WatchEvent], None]

DEFAULT_GRACE_S = 30  # terminationGracePeriodSeconds of a pod that names none
TERMINAL_PHASES = ("Succeeded", "Failed")


@dataclass(frozen=True)
class _Change:
    version: int
    resource: Resource
    event: WatchEvent


class MemoryCluster:
    """`kube.port.Cluster` over dictionaries.

    Args:
        clock: seconds since the epoch, for timestamps.
        new_uid: makes the uid of a new object.
        history: changes that a watch can go back; an older resourceVersion is Gone.
        page_size: objects per page of a list.
    """

    def __init__(
        self,
        *,
        clock: Callable[[], float],
        new_uid: Callable[[], str] = lambda: str(uuid4()),
        history: int = 10_000,
        page_size: int = 500,
    ) -> None:
        self._clock = clock
        self._new_uid = new_uid
        self._page_size = page_size
        self._objects: dict[tuple[str, str, str], Object] = {}
        self._version = 0
        self._changes: deque[_Change] = deque(maxlen=history)
        self._forgotten = 0  # the newest version that has left the history
        self._observers: list[Observer] = []
        self._watchers: set[asyncio.Queue[_Change | None]] = set()

    # The port.

    async def create(self, manifest: Manifest) -> Object:
        """Store a new object. Raises AlreadyExists."""
        made = self._new(manifest)
        key = _key(_resource(made), made["metadata"]["namespace"], made["metadata"]["name"])
        if key in self._objects:
            raise AlreadyExists(f"{key[0]} {key[2]!r} already exists")
        self._store(key, made, "ADDED")
        self._collect_if_orphan(made)
        return _copied_object(made)

    async def read(self, resource: Resource, namespace: str, name: str) -> Object:
        """An object as stored now. Raises NotFound."""
        return _copied_object(self.get(resource, namespace, name))

    async def replace(self, manifest: Manifest) -> Object:
        """Store an object whole, at the resourceVersion it names. Raises Conflict, NotFound."""
        resource, meta = _resource(manifest), manifest["metadata"]
        stored = self.get(resource, meta["namespace"], meta["name"])
        if stored["metadata"]["resourceVersion"] != meta["resourceVersion"]:
            raise Conflict(f"{resource.plural} {meta['name']!r} has changed")
        after = _copied_object(manifest)
        self._store(_key(resource, meta["namespace"], meta["name"]), after, "MODIFIED")
        return _copied_object(after)

    async def delete(
        self, resource: Resource, namespace: str, name: str, *, uid: str, grace_s: int | None = None
    ) -> None:
        """Delete the object with that uid; a pod on a node only begins to end. Raises NotFound."""
        stored = self._objects.get(_key(resource, namespace, name))
        if stored is None or stored["metadata"]["uid"] != uid:
            raise NotFound(f"{resource.plural} {namespace}/{name} with uid {uid} not found")
        self._begin_deletion(resource, stored, grace_s)

    async def replace_status(
        self, namespace: str, name: str, *, resource_version: str, status: Mapping[str, Any]
    ) -> str:
        """Write a training's status whole. Raises Conflict, NotFound."""
        key = _key(TRAININGS, namespace, name)
        stored = self._objects.get(key)
        if stored is None:
            raise NotFound(f"training {namespace}/{name} not found")
        if stored["metadata"]["resourceVersion"] != resource_version:
            raise Conflict(f"training {namespace}/{name} has changed since {resource_version}")
        after = {**stored, "metadata": dict(stored["metadata"]), "status": copied(dict(status))}
        if after["status"] != stored.get("status"):  # a write without a change makes no version
            self._store(key, after, "MODIFIED")
        return str(after["metadata"]["resourceVersion"])

    async def list_pages(
        self, resource: Resource, *, namespace: str = "", label_selector: str = ""
    ) -> AsyncIterator[Page]:
        """All objects that match, by namespace and name."""
        version = str(self._version)
        found = [copied(o) for o in self.objects(resource, namespace, label_selector)]
        for start in range(0, max(len(found), 1), self._page_size):
            yield Page(found[start : start + self._page_size], version)

    async def watch(
        self,
        resource: Resource,
        *,
        resource_version: str,
        namespace: str = "",
        label_selector: str = "",
    ) -> AsyncIterator[WatchEvent]:
        """Changes since `resource_version`, until `disconnect`. Raises Gone."""
        since = int(resource_version)
        if since < self._forgotten:
            raise Gone(f"resourceVersion {since} is older than the history")
        queue: asyncio.Queue[_Change | None] = asyncio.Queue()
        for past in self._changes:
            if past.version > since:
                queue.put_nowait(past)
        self._watchers.add(queue)
        try:
            while (change := await queue.get()) is not None:
                if change.resource == resource and _matches(
                    change.event.object, namespace, label_selector
                ):
                    yield WatchEvent(change.event.type, copied(change.event.object))
        finally:
            self._watchers.discard(queue)

    # The user, the scheduler and the kubelet.

    def observe(self, observer: Observer) -> None:
        """Call `observer` at once after every change, in the order of changes."""
        self._observers.append(observer)

    def objects(
        self, resource: Resource, namespace: str = "", label_selector: str = ""
    ) -> list[Object]:
        """The stored objects that match, by namespace and name."""
        found = sorted(k for k in self._objects if k[0] == resource.plural)
        return [o for k in found if _matches(o := self._objects[k], namespace, label_selector)]

    def get(self, resource: Resource, namespace: str, name: str) -> Object:
        """The stored object. Raises NotFound."""
        stored = self._objects.get(_key(resource, namespace, name))
        if stored is None:
            raise NotFound(f"{resource.plural} {namespace}/{name} not found")
        return stored

    def edit(
        self, resource: Resource, namespace: str, name: str, change: Callable[[Object], None]
    ) -> None:
        """Store an object as `change` leaves a copy of it; a changed spec raises the generation."""
        before = self.get(resource, namespace, name)
        after = _copied_object(before)
        change(after)
        if after.get("spec") != before.get("spec") and "generation" in after["metadata"]:
            after["metadata"]["generation"] += 1
        self._store(_key(resource, namespace, name), after, "MODIFIED")

    def put_node(self, name: str, *, ready: bool = True, unschedulable: bool = False) -> None:
        """Add a node, or change it."""
        manifest: Object = {
            "apiVersion": "v1",
            "kind": "Node",
            "metadata": {"name": name},
            "spec": {"unschedulable": True} if unschedulable else {},
            "status": {"conditions": [{"type": "Ready", "status": "True" if ready else "Unknown"}]},
        }
        key = _key(NODES, "", name)
        if key in self._objects:
            self.edit(NODES, "", name, lambda node: node.update(copied(manifest, skip="metadata")))
        else:
            self._store(key, self._new(manifest), "ADDED")

    def bind_pod(self, namespace: str, name: str, node: str) -> None:
        """What the scheduler does: give a pod a node."""

        def change(pod: Object) -> None:
            pod["spec"]["nodeName"] = node
            pod["status"]["conditions"] = [{"type": "PodScheduled", "status": "True"}]

        self.edit(PODS, namespace, name, change)

    def set_pod_status(self, namespace: str, name: str, status: Mapping[str, Any]) -> None:
        """What the kubelet does: put these fields of the status in place of those it has."""
        self.edit(PODS, namespace, name, lambda pod: pod["status"].update(copied(dict(status))))

    def finish_deletion(self, namespace: str, name: str) -> None:
        """What the kubelet does when a deleted pod has ended. Raises NotFound."""
        self._remove(PODS, self.get(PODS, namespace, name))

    def disconnect(self) -> None:
        """End every running watch, as a server's timeout does."""
        for queue in self._watchers:
            queue.put_nowait(None)

    def forget_history(self) -> None:
        """Make every resourceVersion before the current one Gone."""
        self._changes.clear()
        self._forgotten = self._version

    # Inside.

    def _new(self, manifest: Manifest) -> Object:
        resource = _resource(manifest)
        made = _copied_object(manifest)
        meta = made["metadata"]
        meta.setdefault("namespace", "")
        meta["uid"] = self._new_uid()
        meta["creationTimestamp"] = self._now()
        if resource == TRAININGS:
            meta["generation"] = 1
            made.pop("status", None)  # a create does not write the status subresource
        elif resource == PODS:
            meta["generation"] = 1
            made["status"] = {"phase": "Pending"}
        return made

    def _begin_deletion(self, resource: Resource, stored: Object, grace_s: int | None) -> None:
        if resource != PODS:
            self._remove(resource, stored)
            return
        spec, meta = stored["spec"], stored["metadata"]
        wanted_s = (
            spec.get("terminationGracePeriodSeconds", DEFAULT_GRACE_S)
            if grace_s is None
            else grace_s
        )
        running = spec.get("nodeName") and stored["status"]["phase"] not in TERMINAL_PHASES
        if wanted_s == 0 or not running:
            self._remove(resource, stored)
        elif "deletionTimestamp" not in meta:
            after = _copied_object(stored)
            after["metadata"]["deletionTimestamp"] = self._now()
            after["metadata"]["deletionGracePeriodSeconds"] = wanted_s
            self._store(_key(PODS, meta["namespace"], meta["name"]), after, "MODIFIED")

    def _remove(self, resource: Resource, stored: Object) -> None:
        meta = stored["metadata"]
        gone = {**stored, "metadata": dict(meta)}
        self._store(_key(resource, meta["namespace"], meta["name"]), gone, "DELETED")
        for child in [o for o in self._objects.values() if meta["uid"] in _owners(o)]:
            self._begin_deletion(_resource(child), child, None)

    def _collect_if_orphan(self, made: Object) -> None:
        owners = _owners(made)
        if owners and not any(o["metadata"]["uid"] in owners for o in self._objects.values()):
            self._begin_deletion(_resource(made), made, None)

    def _store(self, key: tuple[str, str, str], after: Object, kind: Any) -> None:
        self._version += 1
        after["metadata"]["resourceVersion"] = str(self._version)
        if kind == "DELETED":
            del self._objects[key]
        else:
            self._objects[key] = after
        if len(self._changes) == self._changes.maxlen:
            self._forgotten = self._changes[0].version
        change = _Change(self._version, _resource(after), WatchEvent(kind, after))
        self._changes.append(change)
        for queue in self._watchers:
            queue.put_nowait(change)
        for observer in self._observers:
            observer(change.resource, change.event)

    def _now(self) -> str:
        return rfc3339(self._clock())


def copied(value: Any, *, skip: str = "") -> Any:
    """A deep copy of plain JSON data, without the top-level key `skip`; faster than `deepcopy`."""
    if isinstance(value, dict):
        return {k: copied(v) for k, v in value.items() if k != skip}
    if isinstance(value, list | tuple):
        return [copied(v) for v in value]
    return value


def _copied_object(stored: Mapping[str, Any]) -> Object:
    return {k: copied(v) for k, v in stored.items()}


def _resource(manifest: Manifest) -> Resource:
    kind = manifest.get("kind", "")
    if kind not in BY_KIND:
        raise Refused(f"this cluster has no kind {kind!r}")
    return BY_KIND[kind]


def _key(resource: Resource, namespace: str, name: str) -> tuple[str, str, str]:
    return (resource.plural, namespace, name)


def _owners(stored: Object) -> set[str]:
    return {o["uid"] for o in stored["metadata"].get("ownerReferences", ())}


def _matches(stored: Object, namespace: str, label_selector: str) -> bool:
    meta = stored["metadata"]
    if namespace and meta["namespace"] != namespace:
        return False
    labels = meta.get("labels", {})
    for term in label_selector.split(",") if label_selector else ():
        name, equals, value = term.partition("=")
        if name not in labels or (equals and labels[name] != value):
            return False
    return True

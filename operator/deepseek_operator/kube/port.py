"""What the operator needs of a cluster: seven verbs on plain dicts, and five ways to fail.

Three clusters stand behind this port: the real one (`kube.api`), one in memory for tests, and one
whose pods are process groups on this machine (`local.cluster`). Nothing above it knows which.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

Manifest = Mapping[str, Any]


class ClusterError(Exception):
    """Any refusal or failure of the cluster; this class itself means: try again later."""


class AlreadyExists(ClusterError):
    """A create found an object of that name."""


class NotFound(ClusterError):
    """The object is not there (any more), or not with the uid that was named."""


class Conflict(ClusterError):
    """The object has changed since the resourceVersion that was named: look again."""


class Gone(ClusterError):
    """The watch's resourceVersion is too old: list again."""


class Refused(ClusterError):
    """The cluster does not accept this as it is: invalid, forbidden, over quota."""


@dataclass(frozen=True)
class Resource:
    """A kind of object: `api_version` and plural name, as in its URL."""

    api_version: str  # "v1" or "group/version"
    plural: str
    kind: str


PODS = Resource("v1", "pods", "Pod")
NODES = Resource("v1", "nodes", "Node")
SERVICES = Resource("v1", "services", "Service")
SECRETS = Resource("v1", "secrets", "Secret")
CLAIMS = Resource("v1", "persistentvolumeclaims", "PersistentVolumeClaim")
EVENTS = Resource("v1", "events", "Event")
LEASES = Resource("coordination.k8s.io/v1", "leases", "Lease")
SLICES = Resource("discovery.k8s.io/v1", "endpointslices", "EndpointSlice")
TRAININGS = Resource("dstrain.dev/v1alpha1", "deepseektrainings", "DeepSeekTraining")
BY_KIND: Mapping[str, Resource] = {
    r.kind: r for r in (PODS, NODES, SERVICES, SECRETS, CLAIMS, EVENTS, LEASES, SLICES, TRAININGS)
}


@dataclass(frozen=True)
class Page:
    """Part of a list; the last page's `resource_version` is where a watch goes on."""

    items: list[dict[str, Any]]
    resource_version: str


@dataclass(frozen=True)
class WatchEvent:
    """One change. A bookmark only carries a resourceVersion."""

    type: Literal["ADDED", "MODIFIED", "DELETED", "BOOKMARK"]
    object: dict[str, Any]


class Cluster(Protocol):
    """The seven verbs. Namespaces are those of the manifests; `namespace` "" means all."""

    async def create(self, manifest: Manifest) -> dict[str, Any]:
        """Create an object as stored. Raises AlreadyExists, Refused, ClusterError."""

    async def read(self, resource: Resource, namespace: str, name: str) -> dict[str, Any]:
        """An object as stored now. Raises NotFound, ClusterError."""

    async def replace(self, manifest: Manifest) -> dict[str, Any]:
        """Store an object whole, if it is still at the resourceVersion that the manifest names.

        Raises Conflict, NotFound, Refused, ClusterError.
        """

    async def delete(
        self, resource: Resource, namespace: str, name: str, *, uid: str, grace_s: int | None = None
    ) -> None:
        """Delete the object with that uid. Raises NotFound (also for another uid), ClusterError."""

    async def replace_status(
        self, namespace: str, name: str, *, resource_version: str, status: Mapping[str, Any]
    ) -> str:
        """Write a training's status whole, if it is still at `resource_version`.

        Returns the new resourceVersion.

        Raises Conflict, NotFound, Refused, ClusterError.
        """

    def list_pages(
        self, resource: Resource, *, namespace: str = "", label_selector: str = ""
    ) -> AsyncIterator[Page]:
        """All objects, a page at a time. Raises ClusterError."""

    def watch(
        self,
        resource: Resource,
        *,
        resource_version: str,
        namespace: str = "",
        label_selector: str = "",
    ) -> AsyncIterator[WatchEvent]:
        """Changes since `resource_version`, until the stream ends. Raises Gone, ClusterError.

        A bookmark may come at once, to say that the server can be reached.
        """

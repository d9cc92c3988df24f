"""A local copy of the objects of one kind, kept by list and watch.

What kopf's watch does not do, it does: pages, a DELETED for what vanished while nobody watched,
and views instead of whole objects, made once at this border.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any, Final, Generic, TypeVar

from deepseek_operator.kube.port import Cluster, ClusterError, Gone, Resource, WatchEvent
from deepseek_operator.runtime.clock import backoff_s

FIRST_PAUSE_S: Final = 0.5
LAST_PAUSE_S: Final = 15.0
SHORTEST_WATCH_S: Final = 5.0  # a stream that ends sooner is a failure to be paused after
# After that long without contact all is listed again. A restarted API server accepts a watch from
# before, and says only then that it does not know so old a version.
LIST_AFTER_S: Final = 5.0

V = TypeVar("V")
Id = tuple[str, str]  # namespace and name

log = logging.getLogger(__name__)


class Informer(Generic[V]):
    """The objects of `resource` as views.

    `narrow` makes a view, or None for an object that is none of ours. `on_change(before, after)`
    is called when a view has changed, appeared (`before` None) or vanished (`after` None).
    `jitter` gives a number in [0, 1).
    """

    def __init__(
        self,
        cluster: Cluster,
        resource: Resource,
        *,
        narrow: Callable[[dict[str, Any]], V | None],
        on_change: Callable[[V | None, V | None], None],
        jitter: Callable[[], float],
        namespace: str = "",
        label_selector: str = "",
    ) -> None:
        self.items: dict[Id, V] = {}
        self.synced = False
        self._cluster = cluster
        self._resource = resource
        self._narrow = narrow
        self._on_change = on_change
        self._jitter = jitter
        self.namespace = namespace
        self._label_selector = label_selector
        self._version = ""  # up to which the changes are known; empty before the first list
        self._failures = 0
        self._lost_at_s: float | None = None  # loop time
        self._heard_at_s = 0.0
        self._listed_at_s = 0.0

    @property
    def name(self) -> str:
        """What it holds, for a person."""
        where = f" in {self.namespace}" if self.namespace else ""
        return self._resource.plural + where

    @property
    def lost_s(self) -> float:
        """How long it has known that it cannot reach the API server; 0 while it can."""
        now_s = _now_s()
        return 0.0 if self._lost_at_s is None else now_s - self._lost_at_s

    @property
    def quiet_s(self) -> float:
        """Since the last event, bookmark or page."""
        return _now_s() - self._heard_at_s

    def expect(self, stored: dict[str, Any]) -> None:
        """Take in an object that was just created, unless the watch has already come past it."""
        view = self._narrow(stored)
        if view is not None and newer(stored["metadata"]["resourceVersion"], self._version):
            self._set(_id(stored), view)

    async def run(self) -> None:
        """List and watch until cancelled."""
        self._heard()
        while True:
            try:
                if not self._version:
                    self._version = await self._list()
                await self._watch()
            except Gone as error:
                log.info("history of %s is gone, listing again: %s", self.name, error)
                self._version = ""
                if _now_s() - self._listed_at_s < SHORTEST_WATCH_S:
                    await self._pause()
            except ClusterError as error:
                if self._lost_at_s is None:
                    self._lost_at_s = _now_s()
                    log.warning("cannot watch %s, trying again: %s", self.name, error)
                elif self.lost_s > LIST_AFTER_S:
                    self._version = ""
                await self._pause()

    async def _list(self) -> str:
        found: dict[Id, V] = {}
        version = ""
        async for page in self._cluster.list_pages(
            self._resource, namespace=self.namespace, label_selector=self._label_selector
        ):
            self._heard_at_s = _now_s()
            version = page.resource_version
            for stored in page.items:
                view = self._narrow(stored)
                if view is not None:
                    found[_id(stored)] = view
        for vanished in self.items.keys() - found.keys():
            self._set(vanished, None)
        for key, view in found.items():
            self._set(key, view)
        self.synced = True
        self._heard()
        self._listed_at_s = self._heard_at_s
        return version

    async def _watch(self) -> None:
        """Follow changes until the stream ends."""
        began_s = _now_s()
        reached = False
        try:
            async for event in self._cluster.watch(
                self._resource,
                resource_version=self._version,
                namespace=self.namespace,
                label_selector=self._label_selector,
            ):
                reached = True
                self._heard()
                self._apply(event)
        except Gone:
            raise
        except ClusterError as error:
            if not reached:
                raise
            log.info("watch of %s broke, going on: %s", self.name, error)
        if _now_s() - began_s < SHORTEST_WATCH_S:
            await self._pause()
        else:
            self._failures = 0

    def _apply(self, event: WatchEvent) -> None:
        self._version = str(event.object["metadata"]["resourceVersion"])
        if event.type != "BOOKMARK":
            gone = event.type == "DELETED"
            self._set(_id(event.object), None if gone else self._narrow(event.object))

    def _set(self, key: Id, after: V | None) -> None:
        before = self.items.get(key)
        if before == after:
            return
        if after is None:
            del self.items[key]
        else:
            self.items[key] = after
        self._on_change(before, after)

    def _heard(self) -> None:
        self._heard_at_s = _now_s()
        if self._lost_at_s is not None:
            self._lost_at_s = None
            self._failures = 0

    async def _pause(self) -> None:
        self._failures += 1
        await asyncio.sleep(
            backoff_s(
                self._failures, first_s=FIRST_PAUSE_S, last_s=LAST_PAUSE_S, jitter=self._jitter()
            )
        )


def _now_s() -> float:
    """Loop time."""
    return asyncio.get_running_loop().time()


def _id(stored: dict[str, Any]) -> Id:
    meta = stored["metadata"]
    return meta.get("namespace", ""), meta["name"]


def newer(version: str, than: str) -> bool:
    """Whether a resourceVersion is later than another: they are comparable as whole numbers.

    https://kubernetes.io/docs/reference/using-api/api-concepts/#resource-versions
    """
    return int(version or 0) > int(than or 0)

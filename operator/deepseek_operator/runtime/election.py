"""The election among the operator's replicas: campaigns for a Lease, and sends worker pods to
whoever holds it.

The Service of the coordinator has no selector: its one EndpointSlice is written by the leader. So
a single write moves all worker pods to it, also away from a pod on a node that is lost, which a
label on that pod would not.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from deepseek_operator.core.lease import (
    Candidate,
    destination,
    lease_of,
    new_lease,
    released,
    renewed,
    route,
    taken,
)
from deepseek_operator.kube.port import (
    LEASES,
    SERVICES,
    SLICES,
    AlreadyExists,
    Cluster,
    ClusterError,
    Conflict,
    NotFound,
)

RENEW_S: Final = 1.5
LOOK_S: Final = 0.5  # how soon a Lease that is free is taken
CALL_S: Final = 2.0  # a request without an answer is made anew
ROUTE_CHECK_S: Final = 10.0
STANDSTILL_S: Final = 60.0

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Replica:
    """This operator, as one of several: a pod, and the Service, Lease and slice they share."""

    namespace: str
    pod: str
    address: str  # of the pod
    service: str  # name of all three


class Election:
    """Campaigns while `run` runs. `leads` may be asked from any thread.

    `elected` is set when the Lease is held for the first time. A leader that cannot reach the API
    server acts no more, and leads again as soon as it could renew: then nobody led in between.
    """

    def __init__(
        self,
        cluster: Cluster,
        replica: Replica,
        *,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self.elected = asyncio.Event()
        self._cluster = cluster
        self._replica = replica
        self._clock = clock
        self._monotonic = monotonic
        self._candidate = Candidate(replica.pod)
        self._looked = False
        self._began_s = monotonic()
        self._trouble = ""

    @property
    def leads(self) -> bool:
        """Whether this replica may act at this moment."""
        return self._candidate.leads(self._monotonic())

    @property
    def unready(self) -> tuple[str, ...]:
        """Why this replica could not take over; once it has seen the Lease it can."""
        return () if self._looked else ("the Lease has not been read yet",)

    @property
    def unhealthy(self) -> tuple[str, ...]:
        """What a restart may cure; an API server that is away is none of that."""
        still_s = self._monotonic() - self._began_s
        return (f"the election stands still for {still_s:.0f} s",) if still_s > STANDSTILL_S else ()

    async def run(self) -> None:
        """Campaign and renew. Returns when another one may have led: what is known may be old."""
        while True:
            self._began_s = self._monotonic()
            try:
                async with asyncio.timeout(CALL_S):
                    if not await self._campaign():
                        return
            except (ClusterError, TimeoutError) as error:
                self._candidate.looked_away()
                self._tell(_told(error))
            else:
                self._tell("")
            pause_s = RENEW_S if self.leads else LOOK_S
            await asyncio.sleep(pause_s * random.uniform(0.8, 1.0))  # noqa: S311

    async def release(self) -> None:
        """Give the Lease back, so that the next one need not wait. Call it when `run` has ended."""
        if not self.leads:
            return
        self._candidate.yielded()
        try:
            async with asyncio.timeout(CALL_S):
                stored = await self._read()
                if stored and lease_of(stored).holder == self._replica.pod:
                    await self._cluster.replace(released(stored))
                    log.info("the Lease is given back")
        except (ClusterError, TimeoutError) as error:
            log.warning("the Lease could not be given back, it will run out: %s", error)

    async def keep_routed(self, port: int) -> None:
        """Send worker pods here, and see to it that they keep coming, until cancelled."""
        while True:
            pause_s = ROUTE_CHECK_S
            try:
                async with asyncio.timeout(CALL_S):
                    await self._route(port)
            except (ClusterError, TimeoutError) as error:
                if self.leads:
                    log.warning("worker pods cannot be sent here: %s", _told(error))
                pause_s = LOOK_S
            await asyncio.sleep(pause_s)

    async def _campaign(self) -> bool:
        """One look at the Lease; False when it is lost."""
        sent_at_s = self._monotonic()
        stored = await self._read()
        self._looked = True
        holder = lease_of(stored).holder if stored else ""
        if self.elected.is_set() and holder != self._replica.pod:
            self._candidate.yielded()
            log.error("the Lease is held by %s now", holder or "nobody")
            return False
        if stored is None:
            await self._create(sent_at_s)
        elif self._candidate.may_take(lease_of(stored), sent_at_s):
            await self._take(stored, sent_at_s)
        return True

    async def _create(self, sent_at_s: float) -> None:
        replica = self._replica
        owner = await self._owner()
        made = new_lease(replica.namespace, replica.service, replica.pod, owner, self._clock())
        try:
            await self._cluster.create(made)
        except AlreadyExists:
            return  # another one was faster
        self._won(sent_at_s)

    async def _take(self, stored: dict[str, Any], sent_at_s: float) -> None:
        holder = self._replica.pod
        if lease_of(stored).holder == holder:
            after = renewed(stored, holder, self._clock())
        else:
            after = taken(stored, holder, await self._owner(), self._clock())
        try:
            await self._cluster.replace(after)
        except (Conflict, NotFound):
            return  # another one was faster
        self._won(sent_at_s)

    def _won(self, sent_at_s: float) -> None:
        self._candidate.took(sent_at_s)
        if not self.elected.is_set():
            log.info("this replica leads")
            self.elected.set()

    async def _read(self) -> dict[str, Any] | None:
        try:
            return await self._cluster.read(LEASES, self._replica.namespace, self._replica.service)
        except NotFound:
            return None

    async def _route(self, port: int) -> None:
        r = self._replica
        wanted = route(r.namespace, r.service, r.address, port, r.pod, await self._owner())
        try:
            stored = await self._cluster.read(SLICES, r.namespace, r.service)
        except NotFound:
            stored = None
        # Asked after the read: whoever has led since then has made that version old.
        if not self.leads or (stored and destination(stored) == destination(wanted)):
            return
        if stored is None:
            await self._cluster.create(wanted)
        else:
            wanted["metadata"]["resourceVersion"] = stored["metadata"]["resourceVersion"]
            await self._cluster.replace(wanted)
        log.info("worker pods are sent to %s", r.address)

    async def _owner(self) -> dict[str, Any]:
        """The Service: what this election makes goes with it."""
        r = self._replica
        service = await self._cluster.read(SERVICES, r.namespace, r.service)
        uid = service["metadata"]["uid"]
        return {"apiVersion": "v1", "kind": "Service", "name": r.service, "uid": uid}

    def _tell(self, trouble: str) -> None:
        if trouble and not self._trouble:
            log.warning("the Lease cannot be reached, trying again: %s", trouble)
        elif self._trouble and not trouble:
            log.info("the Lease can be reached again")
        self._trouble = trouble


def _told(error: Exception) -> str:
    return str(error) or "no answer in time"

"""Who leads: the rules of a `coordination.k8s.io` Lease, without a clock and without a cluster.

Each replica judges by its own monotonic clock, so that no clocks have to agree. A Lease that was
not written to for as long as its holder asked for is free. A holder that could not renew it for
`DEADLINE_S` acts no more; that is shorter, and counts from before the request was sent, so it ends
before anybody else may begin.

The times in the Lease are for people: nothing is decided by them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

DURATION_S: Final = 7  # a Lease that nobody renewed for so long may be taken
DEADLINE_S: Final = 5.0

Object = dict[str, Any]


@dataclass(frozen=True)
class Lease:
    """What a stored Lease says. `holder` is empty when it was released."""

    version: str
    holder: str
    duration_s: float


class Candidate:
    """One replica in the election. Times are those of a monotonic clock."""

    def __init__(self, identity: str) -> None:
        self.identity = identity
        self._version = ""
        self._unchanged_since_s = 0.0
        self._leads_until_s = 0.0

    def may_take(self, lease: Lease, now_s: float) -> bool:
        """Whether to write its name into the Lease as just read, or to renew it.

        Its own name may be there from before a restart: then nobody led in between.
        """
        if lease.version != self._version:
            self._version, self._unchanged_since_s = lease.version, now_s
        if lease.holder in ("", self.identity):
            return True
        return now_s - self._unchanged_since_s > lease.duration_s

    def looked_away(self) -> None:
        """The Lease could not be read, so it may have been impossible to renew too: watch anew."""
        self._version = ""

    def took(self, sent_at_s: float) -> None:
        """The Lease has its name, by a request that was sent at `sent_at_s`."""
        self._leads_until_s = sent_at_s + DEADLINE_S

    def yielded(self) -> None:
        """It gives the Lease back: from now on it acts no more."""
        self._leads_until_s = 0.0

    def leads(self, now_s: float) -> bool:
        """Whether it may act."""
        return now_s < self._leads_until_s


def lease_of(stored: Mapping[str, Any]) -> Lease:
    """The view of a stored Lease."""
    spec = stored.get("spec") or {}
    return Lease(
        version=str(stored["metadata"]["resourceVersion"]),
        holder=spec.get("holderIdentity") or "",
        duration_s=float(spec.get("leaseDurationSeconds") or 0),
    )


def new_lease(namespace: str, name: str, holder: str, owner: Object, now_s: float) -> Object:
    """A Lease that is held from its creation on; `now_s` is in seconds since the epoch."""
    at = _micro_time(now_s)
    return {
        "apiVersion": "coordination.k8s.io/v1",
        "kind": "Lease",
        "metadata": {"namespace": namespace, "name": name, "ownerReferences": [owner]},
        "spec": {
            "holderIdentity": holder,
            "leaseDurationSeconds": DURATION_S,
            "acquireTime": at,
            "renewTime": at,
            "leaseTransitions": 0,
        },
    }


def taken(stored: Mapping[str, Any], holder: str, owner: Object, now_s: float) -> Object:
    """The Lease with another holder; `now_s` is in seconds since the epoch.

    Its owner may be the Service of an installation before this one, which it must not go with.
    """
    spec = dict(stored.get("spec") or {})
    spec["acquireTime"] = _micro_time(now_s)
    spec["leaseTransitions"] = spec.get("leaseTransitions", 0) + 1
    metadata = {**stored["metadata"], "ownerReferences": [owner]}
    return renewed({**stored, "metadata": metadata, "spec": spec}, holder, now_s)


def renewed(stored: Mapping[str, Any], holder: str, now_s: float) -> Object:
    """The Lease, renewed by its holder; `now_s` is in seconds since the epoch."""
    now = {"leaseDurationSeconds": DURATION_S, "renewTime": _micro_time(now_s)}
    return {**stored, "spec": {**(stored.get("spec") or {}), "holderIdentity": holder, **now}}


def released(stored: Mapping[str, Any]) -> Object:
    """The Lease, free for anybody at once."""
    return {**stored, "spec": {**stored["spec"], "holderIdentity": ""}}


def route(namespace: str, service: str, address: str, port: int, pod: str, owner: Object) -> Object:
    """The EndpointSlice that sends all that comes to a Service without a selector to one pod."""
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {
            "namespace": namespace,
            "name": service,
            "labels": {
                "kubernetes.io/service-name": service,
                "endpointslice.kubernetes.io/managed-by": "dstrain.dev",
            },
            "ownerReferences": [owner],
        },
        "addressType": "IPv6" if ":" in address else "IPv4",
        "ports": [{"name": "http", "port": port, "protocol": "TCP"}],
        "endpoints": [
            {
                "addresses": [address],
                "conditions": {"ready": True},
                "targetRef": {"kind": "Pod", "namespace": namespace, "name": pod},
            }
        ],
    }


def destination(stored: Mapping[str, Any]) -> tuple[list[str], list[int], list[str]]:
    """Addresses and ports that an EndpointSlice sends to, and the uids of its owners."""
    addresses = [a for endpoint in stored.get("endpoints") or () for a in endpoint["addresses"]]
    ports = [port["port"] for port in stored.get("ports") or ()]
    return addresses, ports, [o["uid"] for o in stored["metadata"].get("ownerReferences") or ()]


def _micro_time(at_s: float) -> str:
    """As the API reads a MicroTime: exactly six digits after the point."""
    return datetime.fromtimestamp(at_s, UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")

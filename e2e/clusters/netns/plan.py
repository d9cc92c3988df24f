"""Which names and addresses a cluster uses on this machine: decided once, pure, no I/O.

Everything that all clusters of a machine share a space for (networks, links, namespaces, cgroups)
is named after one number, the second octet of the cluster's network 172.<octet>.0.0/16. Whoever
owns the network owns the names, so clusters stand side by side, also from several checkouts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from ipaddress import IPv4Network

# Private (RFC 1918), above the 172.17 to 172.19 that a Docker engine takes first.
OCTETS = range(20, 32)
MAX_NODES = 50


@dataclass(frozen=True)
class Plan:
    """Names and addresses of one cluster; nodes are numbered from 1."""

    name: str
    octet: int
    size: int

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,30}[a-z0-9])?", self.name):
            raise ValueError(
                f"cluster name {self.name!r}: use at most 32 of a-z, 0-9 and '-', "
                "with a letter or digit at both ends"
            )
        if not 1 <= self.size <= MAX_NODES:
            raise ValueError(f"{self.size} nodes: a cluster has 1 to {MAX_NODES}")

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Plan:
        return cls(**json.loads(text))

    @property
    def prefix(self) -> str:
        """Begins the name of every link, namespace and cgroup; a link's name has 15 bytes."""
        return f"ds{self.octet}"

    @property
    def bridge(self) -> str:
        return self.prefix

    @property
    def network(self) -> str:
        """Holds the three networks below and nothing else."""
        return network(self.octet)

    @property
    def node_network(self) -> str:
        return f"172.{self.octet}.0.0/24"

    @property
    def pod_network(self) -> str:
        return f"172.{self.octet}.64.0/18"

    @property
    def service_network(self) -> str:
        return f"172.{self.octet}.128.0/18"

    @property
    def gateway(self) -> str:
        """The machine's own address on the bridge: control plane and DNS."""
        return f"172.{self.octet}.0.1"

    @property
    def loopback(self) -> str:
        """For control plane ports that no node may reach: same port numbers in every cluster."""
        return f"127.0.{self.octet}.1"

    @property
    def nodes(self) -> list[str]:
        return [f"node{i}" for i in range(1, self.size + 1)]

    def place(self, node: str) -> str:
        """Name of a node's network namespace, of its link on the bridge and of its root cgroup."""
        self.index(node)
        return f"{self.prefix}-{node}"

    def address(self, node: str) -> str:
        return f"172.{self.octet}.0.{10 + self.index(node)}"

    def pods_of(self, node: str) -> str:
        return f"172.{self.octet}.{64 + self.index(node)}.0/24"

    def index(self, node: str) -> int:
        if node not in self.nodes:
            raise ValueError(f"no node {node!r} in cluster {self.name}: {', '.join(self.nodes)}")
        return int(node.removeprefix("node"))


def network(octet: int) -> str:
    return f"172.{octet}.0.0/16"


def free_octets(used: Iterable[IPv4Network]) -> list[int]:
    """Octets whose network overlaps none of the `used` ones (the default route is not a use)."""
    taken = [u for u in used if u.prefixlen > 0]
    return [o for o in OCTETS if not any(IPv4Network(network(o)).overlaps(u) for u in taken)]

from __future__ import annotations

import itertools
from ipaddress import IPv4Address, IPv4Network

import pytest

from e2e.clusters.netns.plan import MAX_NODES, OCTETS, Plan, free_octets, network

LARGEST = Plan(name="largest", octet=20, size=MAX_NODES)


def test_the_three_networks_of_a_cluster_lie_in_its_own_and_overlap_nowhere() -> None:
    parts = [LARGEST.node_network, LARGEST.pod_network, LARGEST.service_network]
    networks = [IPv4Network(p) for p in parts]
    assert all(n.subnet_of(IPv4Network(LARGEST.network)) for n in networks)
    assert not any(a.overlaps(b) for a, b in itertools.combinations(networks, 2))


def test_every_node_has_an_address_and_a_pod_range_of_its_own() -> None:
    nodes = LARGEST.nodes
    addresses = {LARGEST.address(n) for n in nodes}
    assert len(addresses | {LARGEST.gateway}) == MAX_NODES + 1
    assert all(IPv4Address(a) in IPv4Network(LARGEST.node_network) for a in addresses)
    ranges = [IPv4Network(LARGEST.pods_of(n)) for n in nodes]
    assert all(r.subnet_of(IPv4Network(LARGEST.pod_network)) for r in ranges)
    assert len(set(ranges)) == MAX_NODES


def test_all_networks_are_private_and_none_is_one_that_docker_takes_first() -> None:
    for octet in OCTETS:
        assert IPv4Network(network(octet)).is_private
        assert octet not in (17, 18, 19)


def test_names_that_the_kernel_shares_between_clusters_differ_and_fit_a_link() -> None:
    plans = [Plan(name="same", octet=octet, size=MAX_NODES) for octet in OCTETS]
    names = [n for p in plans for n in (p.bridge, *(p.place(node) for node in p.nodes))]
    assert len(set(names)) == len(names)
    assert max(len(n) for n in names) <= 15


def test_a_used_network_is_avoided_and_the_default_route_is_no_use() -> None:
    used = ["0.0.0.0/0", "172.20.5.0/24", "172.24.0.0/14", "10.0.0.0/8"]
    assert free_octets(map(IPv4Network, used)) == [21, 22, 23, 28, 29, 30, 31]


def test_no_network_is_free_where_all_of_the_range_is_routed_elsewhere() -> None:
    assert free_octets([IPv4Network("172.16.0.0/12")]) == []


def test_a_plan_survives_being_written() -> None:
    assert Plan.from_json(LARGEST.to_json()) == LARGEST


@pytest.mark.parametrize("name", ["", "-a", "a-", "A", "a_b", "x" * 33, "../up"])
def test_a_name_that_cannot_name_a_folder_and_a_context_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="cluster name"):
        Plan(name=name, octet=20, size=1)


@pytest.mark.parametrize("size", [0, MAX_NODES + 1])
def test_too_few_or_too_many_nodes_are_refused(size: int) -> None:
    with pytest.raises(ValueError, match="a cluster has 1 to"):
        Plan(name="a", octet=20, size=size)


def test_an_unknown_node_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="node1, node2"):
        Plan(name="a", octet=20, size=2).address("node3")

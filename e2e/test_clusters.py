"""The test cluster itself keeps its promises: side by side, cut and healed, and gone without trace.

For the provider that makes its nodes out of this machine; Docker keeps kind's promises.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from e2e.clusters.home import home
from e2e.clusters.netns import NetnsCluster
from e2e.clusters.netns.cgroups import hierarchies
from e2e.clusters.netns.plan import Plan
from e2e.clusters.netns.processes import find, in_cgroup, is_daemon, kill_all
from e2e.clusters.providers import choose
from e2e.clusters.shell import run, wait_until

pytestmark = pytest.mark.skipif(
    not isinstance(choose("probe"), NetnsCluster), reason="the netns provider is not used here"
)


def plan_of(name: str) -> Plan:
    return Plan.from_json((home() / "clusters" / name / "plan.json").read_text())


def traces(name: str, plan: Plan) -> list[str]:
    """What of a cluster is on this machine."""
    folder = home() / "clusters" / name
    mine = f"{plan.prefix}-"
    links = [link["ifname"] for link in json.loads(run("ip", "-json", "link"))]
    namespaces = [n["name"] for n in json.loads(run("ip", "-json", "netns", "list") or "[]")]
    routes = [r["dst"] for r in json.loads(run("ip", "-json", "route"))]
    rules = [r.get("iif", "") for r in json.loads(run("ip", "-json", "rule"))]
    mounts = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()]
    cgroups = [child.name for h in hierarchies() for child in h.iterdir()]
    owned = [x for x in (*links, *namespaces, *rules, *cgroups) if f"{x}-".startswith(mine)]
    owned += [r for r in routes if r.startswith(f"172.{plan.octet}.")]
    owned += [m for m in mounts if m.startswith(f"{folder}/")]
    places = [plan.place(node) for node in plan.nodes]
    processes = find(
        lambda pid: is_daemon(pid, folder) or any(in_cgroup(pid, place) for place in places)
    )
    owned += [f"process {pid}" for pid in processes]
    return owned + ([str(folder)] if folder.exists() else [])


@pytest.fixture(scope="module")
def pair() -> Iterator[tuple[NetnsCluster, NetnsCluster]]:
    one, other = NetnsCluster("pair-one"), NetnsCluster("pair-other")
    try:
        one.up(2)
        other.up(1)
        yield one, other
    finally:
        one.down()
        other.down()


def test_two_clusters_stand_side_by_side(pair: tuple[NetnsCluster, NetnsCluster]) -> None:
    listed = [c.kubectl("get", "nodes", "--output=name").split() for c in pair]
    assert [len(nodes) for nodes in listed] == [2, 1]
    assert len({plan_of(c.name).network for c in pair}) == 2


def test_a_partitioned_node_is_noticed_goes_on_and_comes_back(
    pair: tuple[NetnsCluster, NetnsCluster],
) -> None:
    cluster, _ = pair
    node = "node2"
    place = plan_of(cluster.name).place(node)
    folder = home() / "clusters" / cluster.name / node
    before = find(lambda pid: is_daemon(pid, folder) or in_cgroup(pid, place))
    cluster.partition(node)
    cluster.kubectl("wait", f"node/{node}", "--for=condition=Ready=Unknown", "--timeout=40s")
    assert set(before) <= set(find(lambda pid: is_daemon(pid, folder) or in_cgroup(pid, place)))
    cluster.heal(node)
    cluster.kubectl("wait", f"node/{node}", "--for=condition=Ready", "--timeout=40s")


def test_taking_one_down_leaves_the_other_up_and_nothing_of_itself(
    pair: tuple[NetnsCluster, NetnsCluster],
) -> None:
    one, other = pair
    plan = plan_of(other.name)
    assert traces(other.name, plan)
    other.down()
    assert traces(other.name, plan) == []
    assert len(one.kubectl("get", "nodes", "--output=name").split()) == 2


def test_a_cluster_whose_processes_are_gone_is_not_up_and_can_be_made_again(
    pair: tuple[NetnsCluster, NetnsCluster],
) -> None:
    cluster, _ = pair
    kill_all(lambda pid: is_daemon(pid, home() / "clusters" / cluster.name))
    assert not cluster.is_up()
    cluster.up(1)
    assert cluster.kubectl("get", "nodes", "--output=name").split() == ["node/node1"]


def test_down_leaves_nothing_when_up_was_killed_half_way() -> None:
    name = "cut-short"
    folder = home() / "clusters" / name
    starting = subprocess.Popen(
        [sys.executable, "-m", "e2e.clusters", "up", "--provider=netns", "--name", name],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_until(
            lambda: bool(find(lambda pid: is_daemon(pid, folder / "node3", "containerd"))),
            "the last node's containerd",
            timeout_s=120,
        )
        os.kill(starting.pid, signal.SIGKILL)
        starting.wait()
        plan = plan_of(name)
        assert traces(name, plan)
    finally:
        starting.kill()
        starting.wait()
        NetnsCluster(name).down()
    assert traces(name, plan) == []

"""Links, namespaces, addresses and routes of a cluster, by `ip`.

The machine holds a bridge with the gateway address; each node is a namespace on a veth pair whose
other end is a port of that bridge. Pods are reached through the address of their node.
"""

from __future__ import annotations

import json
from ipaddress import IPv4Network
from pathlib import Path

from e2e.clusters.netns.plan import Plan, free_octets, network
from e2e.clusters.shell import ClusterError, run


def claim(name: str, size: int) -> Plan:
    """Plan a cluster on a free network and claim that network for it.

    The claim is a blackhole route, which the kernel grants once, whoever asks at the same moment.
    It also keeps packets to addresses that no pod, node or service has from leaving the machine
    by the default route.
    """
    refusals = []
    for octet in free_octets(_used_networks()):
        plan = Plan(name=name, octet=octet, size=size)
        try:
            run("ip", "route", "add", "blackhole", network(octet))
        except ClusterError as e:
            refusals.append(str(e))
        else:
            return plan
    raise ClusterError(
        "no free network for another cluster: 172.20.0.0/16 to 172.31.0.0/16 are all in use "
        f"(`ip route`). Take a cluster down. {' '.join(refusals)}"
    )


def release(plan: Plan) -> None:
    """Give the network back; the last step of removing a cluster."""
    if json.loads(run("ip", "-json", "route", "show", "type", "blackhole", plan.network)):
        run("ip", "route", "del", "blackhole", plan.network)


def make_bridge(plan: Plan) -> None:
    """The bridge, forwarding, and a rule that keeps what pods send from leaving the machine."""
    run("ip", "link", "add", plan.bridge, "type", "bridge")
    run("ip", "address", "add", f"{plan.gateway}/24", "dev", plan.bridge)
    run("ip", "link", "set", plan.bridge, "up")
    Path("/proc/sys/net/ipv4/ip_forward").write_text("1")
    within, beyond = (str(20000 + 2 * plan.octet + i) for i in (0, 1))
    arriving = ("ip", "rule", "add", "iif", plan.bridge)
    run(*arriving, "priority", within, "to", plan.network, "lookup", "main")
    run(*arriving, "priority", beyond, "unreachable")


def make_node(plan: Plan, node: str) -> None:
    """The node's namespace, plugged in."""
    place = plan.place(node)
    run("ip", "netns", "add", place)
    run("ip", "link", "add", place, "type", "veth", "peer", "name", "eth0", "netns", place)
    run("ip", "link", "set", place, "master", plan.bridge, "up")
    run("ip", "-n", place, "address", "add", f"{plan.address(node)}/24", "dev", "eth0")
    run("ip", "-n", place, "link", "set", "eth0", "up")
    run("ip", "-n", place, "link", "set", "lo", "up")
    run("ip", "-n", place, "route", "add", "default", "via", plan.gateway)
    run("nsenter", f"--net=/run/netns/{place}", "sysctl", "-qw", "net.ipv4.ip_forward=1")
    run("ip", "route", "replace", plan.pods_of(node), "via", plan.address(node))


def unplug(plan: Plan, node: str) -> None:
    run("ip", "link", "set", plan.place(node), "down")


def plug_in(plan: Plan, node: str) -> None:
    run("ip", "link", "set", plan.place(node), "up")
    # The kernel drops no route here, but it would if the bridge itself had gone down.
    run("ip", "route", "replace", plan.pods_of(node), "via", plan.address(node))


def remove_node(plan: Plan, node: str) -> None:
    """Remove what `make_node` made, as far as it is there."""
    place = plan.place(node)
    if Path(f"/sys/class/net/{place}").exists():
        run("ip", "link", "del", place)
    if Path(f"/run/netns/{place}").exists():
        run("ip", "netns", "del", place)


def remove_all(plan: Plan) -> None:
    """Remove what `make_bridge` and `make_node` made, as far as it is there."""
    for node in plan.nodes:
        remove_node(plan, node)
    for rule in json.loads(run("ip", "-json", "rule")):
        if rule.get("iif") == plan.bridge:
            run("ip", "rule", "del", "priority", str(rule["priority"]), "iif", plan.bridge)
    if Path(f"/sys/class/net/{plan.bridge}").exists():
        run("ip", "link", "del", plan.bridge)


def _used_networks() -> list[IPv4Network]:
    routes = json.loads(run("ip", "-json", "-4", "route", "show", "table", "all"))
    return [IPv4Network(r["dst"]) for r in routes if r["dst"] != "default"]

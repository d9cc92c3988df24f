"""The cluster as a whole: the order in which its parts come and go."""

from __future__ import annotations

import json
import logging
import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from e2e.clusters import packages, programs
from e2e.clusters.home import home
from e2e.clusters.interface import Cluster
from e2e.clusters.netns import (
    cgroups,
    control_plane,
    imagestore,
    machine,
    network,
    remains,
    storage,
)
from e2e.clusters.netns.plan import Plan
from e2e.clusters.netns.processes import find, is_daemon, kill_all
from e2e.clusters.netns.state import State
from e2e.clusters.shell import ClusterError, wait_until

log = logging.getLogger(__name__)


class NetnsCluster(Cluster):
    """Nodes as network namespaces; see the package's docstring."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self._state = State(home() / "clusters" / name)

    @property
    def kubeconfig(self) -> Path:
        return self._state.kubeconfig(control_plane.ADMIN)

    @property
    def programs(self) -> Path:
        return programs.folder()

    @property
    def host(self) -> str:
        return self._plan().gateway

    def is_up(self) -> bool:
        # The mark alone outlives a reboot, which takes the processes.
        return self._state.complete.exists() and bool(self._api_server())

    def up(self, nodes: int) -> None:
        if self.is_up():
            raise ClusterError(f"cluster {self.name} is up already; take it down first")
        if os.geteuid() != 0:
            raise ClusterError("network namespaces need root: run this with sudo")
        Plan(name=self.name, octet=0, size=nodes)  # Refuse a bad name before anything is made.
        packages.ensure()
        programs.ensure()
        self.down()
        began = time.monotonic()
        self._state.folder.mkdir(parents=True)
        plan = network.claim(self.name, nodes)
        self._state.plan.write_text(plan.to_json())
        self._start(plan)
        self._state.complete.touch()
        log.info("cluster %s is up after %.1f s", self.name, time.monotonic() - began)

    def _start(self, plan: Plan) -> None:
        state, bin_ = self._state, programs.folder()
        state.log("").parent.mkdir()
        network.make_bridge(plan)
        control_plane.make_credentials(plan, state)
        control_plane.start_api_server(plan, state, bin_)

        def start_node(node: str) -> None:
            machine.prepare(plan, state, node)
            network.make_node(plan, node)
            machine.start_containerd(plan, state, node)

        _for_each(plan.nodes, start_node)
        control_plane.wait_for_api_server(plan, state)
        control_plane.start_controllers(plan, state, bin_)
        _for_each(plan.nodes, lambda node: machine.start_kubelet(plan, state, bin_, node))
        storage.make_folders(state.volumes)
        self.kubectl("create", "-f", "-", stdin=storage.manifests(state.volumes))
        control_plane.wait_for_dns(plan, state)
        wait_until(self._usable, f"all nodes of {self.name} to be Ready", timeout_s=60)

    def _usable(self) -> bool:
        listed = json.loads(self.kubectl("get", "nodes", "--output=json"))["items"]
        ready = [
            n
            for n in listed
            for c in n["status"].get("conditions", [])
            if c["type"] == "Ready" and c["status"] == "True"
        ]
        if len(ready) < len(self.nodes()):
            return False
        # Without it the API server refuses every pod.
        accounts = self.kubectl("get", "serviceaccounts", "--output=name")
        return "serviceaccount/default" in accounts

    def down(self) -> None:
        state = self._state
        state.complete.unlink(missing_ok=True)
        if not state.folder.exists():
            return
        kill_all(lambda pid: is_daemon(pid, state.folder))
        if state.plan.exists():
            self._remove(Plan.from_json(state.plan.read_text()))
        remains.unmount_below(state.folder)
        remains.remove_below(state.folder)

    def _remove(self, plan: Plan) -> None:
        state = self._state
        for node in plan.nodes:
            machine.kill(plan, state, node)
            remains.remove_shim_sockets(state.node(node) / "containerd-state")
        remains.unmount_below(state.folder)
        _for_each(plan.nodes, lambda node: remains.remove_below(state.node(node)))
        network.remove_all(plan)
        cgroups.remove(f"{plan.prefix}-")
        remains.remove_cni_results(state.folder)
        remains.remove_kubelet_socket()
        remains.remove_log_links(state.folder)
        # The claim of the network goes last, and only once this folder no longer names it: else
        # a second `down` could remove the cluster that claims it next.
        state.plan.unlink()
        network.release(plan)

    def load_image(self, image: str | Path) -> None:
        state, plan = self._state, self._plan()
        name = imagestore.take(image)

        def give(node: str) -> None:
            socket = state.socket(node)
            if imagestore.lacks_much(name, socket) and machine.is_empty(state, node):
                machine.begin_with_seed(plan, state, node)
            else:
                imagestore.send(name, socket)

        _for_each([n for n in plan.nodes if self._on(state.socket(n))], give)

    def _on(self, socket: Path) -> bool:
        return imagestore.containerd_answers(socket)

    def nodes(self) -> list[str]:
        return self._plan().nodes

    def power_off(self, node: str) -> None:
        plan = self._plan()
        # The link first: no FIN, RST or last status of a dying process may reach its peers.
        network.unplug(plan, node)
        machine.kill(plan, self._state, node)

    def power_on(self, node: str) -> None:
        plan, state = self._plan(), self._state
        if self._on(state.socket(node)):
            raise ClusterError(f"{node} is on already")
        self._forget_boot(plan, node)
        network.make_node(plan, node)
        machine.start_containerd(plan, state, node)
        machine.start_kubelet(plan, state, programs.folder(), node)

    def _forget_boot(self, plan: Plan, node: str) -> None:
        """Remove what does not outlive a boot: mounts, sockets, the namespace and its addresses."""
        folder = self._state.node(node)
        remains.remove_shim_sockets(folder / "containerd-state")
        remains.unmount_below(folder)
        remains.remove_below(folder / "containerd-state")
        remains.remove_below(folder / "runc")
        remains.remove_below(folder / "ipam")
        network.remove_node(plan, node)

    def partition(self, node: str) -> None:
        network.unplug(self._plan(), node)

    def heal(self, node: str) -> None:
        network.plug_in(self._plan(), node)

    def pause_api_server(self) -> None:
        self._signal_api_server(signal.SIGSTOP)

    def resume_api_server(self) -> None:
        self._signal_api_server(signal.SIGCONT)
        control_plane.wait_for_api_server(self._plan(), self._state)

    def _signal_api_server(self, number: signal.Signals) -> None:
        for process in self._api_server():
            os.kill(process, number)

    def _api_server(self) -> list[int]:
        return find(lambda pid: is_daemon(pid, self._state.folder, "kube-apiserver"))

    def _plan(self) -> Plan:
        if not self._state.plan.exists():
            raise ClusterError(f"no cluster {self.name}: start it with `up`")
        return Plan.from_json(self._state.plan.read_text())


def _for_each(nodes: list[str], act: Callable[[str], None]) -> None:
    with ThreadPoolExecutor() as pool:
        list(pool.map(act, nodes))

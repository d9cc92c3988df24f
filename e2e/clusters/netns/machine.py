"""One node: a network namespace with its own containerd, kubelet and kube-proxy."""

from __future__ import annotations

import json
from pathlib import Path

from e2e.clusters.netns import cgroups, imagestore, remains
from e2e.clusters.netns.plan import Plan
from e2e.clusters.netns.processes import in_cgroup, is_daemon, kill_all, start, wait_ready
from e2e.clusters.netns.state import State
from e2e.clusters.shell import run


def prepare(plan: Plan, state: State, node: str) -> None:
    """Make a new node's disk: its configuration and the images known so far."""
    folder = state.node(node)
    (folder / "cni").mkdir(parents=True)
    imagestore.copy_seed(folder / "containerd")
    (folder / "cni" / "10-pods.conflist").write_text(_cni(plan, state, node))
    (folder / "containerd.toml").write_text(_containerd(state, node))
    (folder / "resolv.conf").write_text(f"nameserver {plan.gateway}\n")
    (folder / "kubelet.json").write_text(_kubelet(plan, state, node))
    (folder / "proxy.json").write_text(_proxy(plan, state, node))


def start_containerd(plan: Plan, state: State, node: str) -> None:
    """Start containerd and wait until a kubelet can use it; needs no API server."""
    cgroups.make(plan.place(node))
    log = state.log(f"{node}-containerd")
    before = log.stat().st_size if log.exists() else 0
    start(
        "containerd",
        "--config",
        state.node(node) / "containerd.toml",
        log=log,
        namespace=plan.place(node),
    )

    def ready() -> bool:
        # It answers before it has looked through its images, which may take ten seconds, and a
        # kubelet that comes in that time ends. The last thing it then does is told in its log only.
        return b"Start streaming server" in log.read_bytes()[before:]

    wait_ready("containerd", state.node(node), log, ready)


def start_kubelet(plan: Plan, state: State, programs: Path, node: str) -> None:
    """Start kubelet and kube-proxy; the API server says when the node is Ready."""
    folder = state.node(node)
    start(
        programs / "kubelet",
        f"--config={folder}/kubelet.json",
        f"--kubeconfig={state.kubeconfig(node)}",
        f"--root-dir={folder}/kubelet",
        f"--cert-dir={folder}/kubelet-keys",
        f"--hostname-override={node}",
        f"--node-ip={plan.address(node)}",
        log=state.log(f"{node}-kubelet"),
        namespace=plan.place(node),
    )
    start(
        programs / "kube-proxy",
        f"--config={folder}/proxy.json",
        log=state.log(f"{node}-kube-proxy"),
        namespace=plan.place(node),
    )


def is_empty(state: State, node: str) -> bool:
    """Whether no container was made on the node yet."""
    ctr = ("ctr", "--address", state.socket(node), "--namespace", "k8s.io")
    return not run(*ctr, "containers", "ls", "--quiet").strip()


def begin_with_seed(plan: Plan, state: State, node: str) -> None:
    """Replace all images of an empty node by those of the seed."""
    folder = state.node(node)
    kill_all(lambda pid: is_daemon(pid, folder, "containerd"))
    remains.unmount_below(folder / "containerd")
    remains.remove_below(folder / "containerd")
    imagestore.copy_seed(folder / "containerd")
    start_containerd(plan, state, node)


def kill(plan: Plan, state: State, node: str) -> None:
    """Kill all that runs on a node: its daemons, shims and containers."""
    folder, cgroup = state.node(node), plan.place(node)
    kill_all(lambda pid: is_daemon(pid, folder) or in_cgroup(pid, cgroup))


def _cni(plan: Plan, state: State, node: str) -> str:
    # ptp and not bridge: packets between two pods of one node then pass the node's routing, so a
    # service address works between them even where the kernel has no br_netfilter.
    ipam = {
        "type": "host-local",
        "dataDir": f"{state.node(node)}/ipam",
        "ranges": [[{"subnet": plan.pods_of(node)}]],
        "routes": [{"dst": "0.0.0.0/0"}],
    }
    plugin = {"type": "ptp", "ipMasq": False, "ipam": ipam}
    return json.dumps({"cniVersion": "0.4.0", "name": plan.prefix, "plugins": [plugin]})


def _containerd(state: State, node: str) -> str:
    # restrict_oom_score_adj: where the machine lacks CAP_SYS_RESOURCE, runc dies without it
    # ("can't get final child's PID").
    # opt and runc's Root: else in /opt/containerd and /run/containerd, where they would remain.
    folder = state.node(node)
    return f"""\
version = 2
root = "{folder}/containerd"
state = "{folder}/containerd-state"
[grpc]
address = "{state.socket(node)}"
[plugins."io.containerd.internal.v1.opt"]
path = "{folder}/opt"
[plugins."io.containerd.grpc.v1.cri"]
sandbox_image = "{imagestore.PAUSE_IMAGE}"
netns_mounts_under_state_dir = true
restrict_oom_score_adj = true
[plugins."io.containerd.grpc.v1.cri".cni]
bin_dir = "/usr/lib/cni"
conf_dir = "{folder}/cni"
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
Root = "{folder}/runc"
SystemdCgroup = false
"""


def _kubelet(plan: Plan, state: State, node: str) -> str:
    folder = state.node(node)
    client = {"clientCAFile": f"{state.keys}/kubelet-client.crt"}
    return json.dumps(
        {
            "apiVersion": "kubelet.config.k8s.io/v1beta1",
            "kind": "KubeletConfiguration",
            "authentication": {
                "anonymous": {"enabled": False},
                "webhook": {"enabled": True},
                "x509": client,
            },
            "authorization": {"mode": "Webhook"},
            # Debian 12's containerd 1.6 cannot name its driver to the kubelet.
            "cgroupDriver": "cgroupfs",
            "cgroupRoot": f"/{plan.place(node)}",
            "failCgroupV1": False,
            "failSwapOn": False,
            "enforceNodeAllocatable": [],
            "localStorageCapacityIsolation": False,
            "containerRuntimeEndpoint": f"unix://{state.socket(node)}",
            "clusterDNS": [plan.gateway],
            "clusterDomain": "cluster.local",
            "resolvConf": f"{folder}/resolv.conf",
            "podLogsDir": f"{folder}/pod-logs",
            "volumePluginDir": f"{folder}/volume-plugins",
            "nodeStatusUpdateFrequency": "4s",
            "nodeLeaseDurationSeconds": 10,
            # The nodes share the machine's disk: a full one must not empty the image stores or
            # evict the pods of all nodes at once.
            "imageGCHighThresholdPercent": 100,
            "evictionHard": {},
        }
    )


def _proxy(plan: Plan, state: State, node: str) -> str:
    return json.dumps(
        {
            "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
            "kind": "KubeProxyConfiguration",
            "clientConnection": {"kubeconfig": str(state.kubeconfig("proxy"))},
            "clusterCIDR": plan.pod_network,
            "hostnameOverride": node,
            "mode": "iptables",
            # These are the machine's, which a namespace may not set.
            "conntrack": {"maxPerCore": 0, "min": 0},
        }
    )

"""How worker pods reach each other: what each network needs in a pod.

A profile is a starting point; every field of `spec.fabric` replaces its part of it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from dstrain_api.spec import FabricSpec, RdmaSpec


@dataclass(frozen=True, kw_only=True)
class Fabric:
    """Environment, devices and rights of a pod for its network."""

    env: dict[str, str] = field(default_factory=dict)
    rdma: RdmaSpec | None = None
    ipc_lock: bool = False  # RDMA pins memory beyond RLIMIT_MEMLOCK
    host_network: bool = False
    networks: str = ""


# An asynchronous error of a peer ends a collective instead of blocking it until its timeout: the
# agent can then join the next generation at once (torch.distributed, ProcessGroupNCCL).
_ALWAYS = {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "1"}

PROFILES: dict[str, Fabric] = {
    # Sockets only. NCCL's own choice of interface leaves out lo and docker*, which suits a pod;
    # NCCL_IB_DISABLE keeps it from RDMA devices that it sees but may not use.
    # https://docs.nvidia.com/deeplearning/nccl/user-guide/docs/env.html
    "tcp": Fabric(env={**_ALWAYS, "NCCL_IB_DISABLE": "1"}),
    # The resource is the shared device plugin's example name; a site's own goes into fabric.rdma.
    # NCCL_NET=IB makes a missing device an error instead of a silent fall back to sockets.
    # https://github.com/Mellanox/k8s-rdma-shared-dev-plugin
    "infiniband": Fabric(
        env={**_ALWAYS, "NCCL_NET": "IB"},
        rdma=RdmaSpec(resource="rdma/hca_shared_devices_a"),
        ipc_lock=True,
    ),
    # RoCE v2: since NCCL 2.21 the GID index is found by itself (NCCL_IB_GID_INDEX is -1) from the
    # address family and NCCL_IB_ROCE_VERSION_NUM, whose default is 2. The traffic class is the
    # site's own lossless queue: fabric.env {NCCL_IB_TC: "106"} is a usual value, not a default.
    "roce": Fabric(
        env={**_ALWAYS, "NCCL_NET": "IB", "NCCL_SOCKET_FAMILY": "AF_INET"},
        rdma=RdmaSpec(resource="rdma/hca_shared_devices_a"),
        ipc_lock=True,
    ),
    # NCCL loads aws-ofi-nccl by NCCL_NET_PLUGIN=ofi; FI_PROVIDER chooses EFA where the plugin is
    # old. Huge pages off: forked data loaders otherwise fail with ENOMEM. FI_EFA_USE_DEVICE_RDMA
    # and FI_EFA_FORK_SAFE are not needed any more.
    # https://github.com/aws/aws-ofi-nccl doc/efa-env-var.md and src/Makefile.am; the resource is
    # that of the EFA device plugin (docs.aws.amazon.com/eks, node-efa).
    "efa": Fabric(
        env={
            **_ALWAYS,
            "FI_EFA_USE_HUGE_PAGE": "0",
            "FI_PROVIDER": "efa",
            "NCCL_NET_PLUGIN": "ofi",
        },
        rdma=RdmaSpec(resource="vpc.amazonaws.com/efa"),
        ipc_lock=True,
    ),
    "custom": Fabric(),
}


def resolve(spec: FabricSpec) -> Fabric:
    """The profile with the user's own settings in place of its parts."""
    base = PROFILES[spec.profile]
    return Fabric(
        env={**base.env, **spec.env},
        rdma=spec.rdma or base.rdma,
        ipc_lock=base.ipc_lock if spec.ipc_lock is None else spec.ipc_lock,
        host_network=base.host_network if spec.host_network is None else spec.host_network,
        networks=spec.networks or base.networks,
    )

"""What a node says of itself: which conditions and taints mean that its workers should go.

Conditions that are True while something is broken, by who sets them:

- NVSentinel sets one per health check, and only for fatal errors, with the codes in brackets in
  its message: https://docs.nvidia.com/nvsentinel/getting-started/integrations
- AKS' node problem detector on GPU nodes:
  https://learn.microsoft.com/azure/aks/gpu-health-monitoring
- node-problem-detector: https://github.com/kubernetes/node-problem-detector
- GpuUnhealthy is for whoever brings a check of its own.

EKS' node monitoring agent sets AcceleratedHardwareReady to False instead:
https://docs.aws.amazon.com/eks/latest/userguide/node-health.html
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

BROKEN_WHILE_TRUE = frozenset(
    {
        "GpuUnhealthy",
        *(f"Gpu{part}Watch" for part in ("Mem", "Pcie", "Power", "Inforom", "Sm", "Nvlink")),
        *(f"Gpu{part}Watch" for part in ("Mcu", "Pmu", "Driver", "Thermal")),
        *("GpuXidError", "SysLogsXIDError", "SysLogsSXIDError", "SysLogsGPUFallenOff"),
        *("NVSwitchFatalError", "NVSwitchDown"),
        *("GPUMissing", "NVLinkStatusInactive", "XIDErrors", "IBLinkFlapping"),
        *("KernelDeadlock", "ReadonlyFilesystem"),
    }
)
BROKEN_WHILE_FALSE = frozenset({"AcceleratedHardwareReady"})

# As NVSentinel's documentation suggests them.
BROKEN_TAINTS = frozenset(
    f"nvidia.com/{part}"
    for part in ("gpu-xid-error", "gpu-nvlink-error", "gpu-error", "syslog-xid-error")
)

# XID errors that a program causes: a restart of its process is all that is needed. The same that
# NVIDIA's device plugin ignores: internal/rm/health.go of https://github.com/NVIDIA/k8s-device-plugin
APPLICATION_XIDS = frozenset({8, 13, 31, 43, 45, 68, 109})

# The node is about to be taken away: spot instances, autoscalers, maintenance.
# https://github.com/aws/aws-node-termination-handler
# https://cloud.google.com/kubernetes-engine/docs/concepts/spot-vms
# https://karpenter.sh/docs/concepts/disruption
LEAVING_TAINTS = frozenset(
    {
        "aws-node-termination-handler/spot-itn",
        "aws-node-termination-handler/asg-lifecycle-termination",
        "aws-node-termination-handler/scheduled-maintenance",
        "cloud.google.com/impending-node-termination",
        "karpenter.sh/disrupted",
        "ToBeDeletedByClusterAutoscaler",
    }
)

# Somebody vouches that the node is off.
# https://kubernetes.io/docs/reference/labels-annotations-taints
OFF_TAINTS = frozenset(
    {"node.kubernetes.io/out-of-service", "node.cloudprovider.kubernetes.io/shutdown"}
)

TEXT_LIMIT = 256
XID_CONDITIONS = frozenset({"GpuXidError", "SysLogsXIDError", "XIDErrors"})
_CODES = re.compile(r"^\[([\d, ]+)\]")  # NVSentinel
_LOGGED = re.compile(r"xid(?: \(PCI:[^)]*\))?\D{0,12}(\d+)", re.IGNORECASE)  # the driver

Stored = Mapping[str, object]


def is_off(taints: Iterable[Stored]) -> bool:
    """Whether a taint says that the node does not run."""
    return any(t.get("key") in OFF_TAINTS for t in taints)


def leaving(taints: Iterable[Stored]) -> str:
    """The taint that says that the node is about to be taken away; empty if there is none."""
    return next((str(t["key"]) for t in taints if t.get("key") in LEAVING_TAINTS), "")


def fault(conditions: Iterable[Stored], taints: Iterable[Stored]) -> str:
    """What is broken on a node, in its own words; empty if it says of nothing that it is."""
    for said in conditions:
        kind, status = str(said.get("type")), said.get("status")
        bad = (kind in BROKEN_WHILE_TRUE and status == "True") or (
            kind in BROKEN_WHILE_FALSE and status == "False"
        )
        message = str(said.get("message") or "")
        if bad and not _by_program(kind, message):
            return f"{kind}: {message}"[:TEXT_LIMIT] if message else kind
    return next((str(t["key"]) for t in taints if t.get("key") in BROKEN_TAINTS), "")


def _by_program(kind: str, message: str) -> bool:
    if kind not in XID_CONDITIONS:
        return False
    codes = _CODES.match(message)
    found = codes[1].replace(",", " ").split() if codes else _LOGGED.findall(message)
    xids = {int(code) for code in found}
    return bool(xids) and xids <= APPLICATION_XIDS

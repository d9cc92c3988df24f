"""What a node's conditions and taints say of its hardware."""

import pytest
from deepseek_operator.core.hardware import fault, is_off, leaving


def said(kind, status="True", message=""):
    ready = {"type": "Ready", "status": "True"}
    return [ready, {"type": kind, "status": status, "message": message}]


@pytest.mark.parametrize(
    "conditions",
    [
        said("GpuUnhealthy"),
        said("GpuMemWatch", message="[DCGM_FR_FAULTY_MEMORY] GPU 0"),
        said("SysLogsXIDError", message="[79] GPU has fallen off the bus"),
        said("SysLogsXIDError", message="[45, 79] follows another"),
        said("XIDErrors", message="NVRM: Xid (PCI:0000:00:1e): 48, pid=1"),
        said("SysLogsXIDError", message="no code in here"),
        said("SysLogsSXIDError", message="[13] of an NVSwitch, which no program causes"),
        said("AcceleratedHardwareReady", "False"),
        said("ReadonlyFilesystem"),
    ],
)
def test_a_condition_that_says_what_is_broken_is_a_fault_in_its_own_words(conditions):
    kind, message = conditions[1]["type"], conditions[1]["message"]
    assert fault(conditions, ()) == (f"{kind}: {message}" if message else kind)


@pytest.mark.parametrize(
    "conditions",
    [
        said("GpuUnhealthy", "False"),
        said("GpuUnhealthy", "Unknown"),
        said("AcceleratedHardwareReady", "True"),
        said("AcceleratedHardwareReady", "Unknown"),
        said("MemoryPressure"),
        said("SysLogsXIDError", message="[13] graphics engine exception"),
        said("SysLogsXIDError", message="[13, 31] page fault"),
        said("XIDErrors", message="NVRM: Xid (PCI:0000:00:1e): 31, pid=1"),
    ],
)
def test_what_is_unknown_transient_or_caused_by_a_program_is_none(conditions):
    assert fault(conditions, ()) == ""


def test_a_taint_tells_of_a_fault_of_leaving_and_of_being_off():
    assert fault((), [{"key": "nvidia.com/gpu-xid-error"}]) == "nvidia.com/gpu-xid-error"
    assert leaving([{"key": "karpenter.sh/disrupted"}]) == "karpenter.sh/disrupted"
    assert is_off([{"key": "node.kubernetes.io/out-of-service", "effect": "NoExecute"}])


def test_other_taints_say_nothing():
    taints = [{"key": "nvidia.com/gpu"}, {"key": "node.kubernetes.io/unschedulable"}]
    assert (fault((), taints), leaving(taints), is_off(taints)) == ("", "", False)


def test_a_long_message_is_shortened():
    assert len(fault(said("GpuUnhealthy", message="x" * 5000), ())) == 256

"""What the plan takes for the cause of a failure: its class, its reason, its words."""

import pytest
from deepseek_operator.core.model import ContainerView, NodeView
from dstrain_api.protocol import HANG, PEER_LOST
from plan_case import Case


def ended(code, reason="Error", message=""):
    return {
        "container": ContainerView(
            exit_code=code, terminated_reason=reason, terminated_message=message
        )
    }


@pytest.mark.parametrize(
    ("pod", "failure_class", "reason"),
    [
        (ended(1), "application", "PodFailed"),
        (ended(139), "application", "PodFailed"),
        (ended(137, "OOMKilled"), "outOfMemory", "OOMKilled"),
        (ended(128, "StartError"), "configuration", "StartError"),
        (ended(137, "ContainerStatusUnknown"), "infrastructure", "ContainerStatusUnknown"),
        ({"reason": "Evicted"}, "infrastructure", "Evicted"),
        ({"reason": "Preempting"}, "preemption", "Preempted"),
        ({"reason": "Terminated"}, "preemption", "NodeShutdown"),
        ({"disrupted": "DeletionByTaintManager"}, "infrastructure", "Evicted"),
        ({"disrupted": "DeletionByPodGC"}, "infrastructure", "Evicted"),
        ({"disrupted": "TerminationByKubelet", "reason": "Evicted"}, "infrastructure", "Evicted"),
        (
            {"disrupted": "TerminationByKubelet", "reason": "Terminated"},
            "preemption",
            "NodeShutdown",
        ),
        ({"disrupted": "EvictionByEvictionAPI"}, "voluntary", "Drained"),
        ({"disrupted": "PreemptionByScheduler"}, "preemption", "Preempted"),
    ],
)
def test_how_a_pod_ended_decides_its_class(pod, failure_class, reason):
    case = Case().running(0, 1).change_pod(1, phase="Failed", **pod)
    after = case.plan().status
    [entry] = after.history
    assert (entry.failure_class, entry.reason) == (failure_class, reason)
    assert after.restarts.counted == (failure_class not in ("voluntary", "preemption"))


def test_a_pod_that_its_node_gives_up_because_it_leaves_is_nobodys_fault():
    case = Case().running(0, 1)
    case.nodes["n1"] = NodeView(name="n1", ready=True, leaving="karpenter.sh/disrupted")
    case.change_pod(1, phase="Failed", disrupted="DeletionByTaintManager")
    [entry] = case.plan().status.history
    assert (entry.failure_class, entry.reason) == ("preemption", "NodeLeaving")


def test_a_pod_that_was_killed_for_its_memory_names_the_limit_and_what_to_change():
    case = Case().running(0, 1).change_pod(1, phase="Failed", **ended(137, "OOMKilled"))
    [entry] = case.change_pod(1, memory_limit="2Gi").plan().status.history
    assert "its limit of 2Gi; raise workers.resources.limits.memory" in entry.message
    [entry] = case.change_pod(1, memory_limit="").plan().status.history
    assert "set workers.resources.requests.memory" in entry.message


def test_a_long_traceback_loses_its_beginning_and_not_who_failed_and_how():
    case = Case().running(0, 1).error(1, message="frame\n" * 340 + "KeyError: 'lr'")
    message = case.plan().status.history[-1].message
    assert message.startswith("mini-1-1: a process ended with exit code 1: ")
    assert message.endswith("KeyError: 'lr'")


def test_what_the_kubelet_says_of_an_eviction_is_kept():
    case = Case().running(0, 1)
    case.change_pod(1, phase="Failed", reason="Evicted", message="low on resource: memory")
    [entry] = case.plan().status.history
    assert "low on resource: memory" in entry.message


def test_a_failure_on_a_node_with_a_broken_gpu_is_the_nodes():
    case = Case().running(0, 1).error(1, message="CUDA error: unknown")
    case.nodes["n1"] = NodeView(name="n1", ready=True, fault="SysLogsXIDError: [79] gone")
    entry = case.plan().status.history[-1]
    assert (entry.failure_class, entry.reason) == ("infrastructure", "NodeFault")
    assert "[79] gone" in entry.message
    assert "CUDA error" in entry.message


@pytest.mark.parametrize(
    ("failure_class", "exit_code", "reason"),
    [
        ("application", 1, "ProcessFailed"),
        ("application", -11, "ProcessKilled"),
        ("outOfMemory", 1, "OutOfMemory"),
        ("configuration", 1, "InvalidConfiguration"),
        ("numeric", 1, "BadNumbers"),
    ],
)
def test_a_worker_says_of_which_class_its_error_is(failure_class, exit_code, reason):
    case = Case().running(0, 1).error(1, exit_code, failure_class=failure_class)
    entry = case.plan().status.history[-1]
    assert (entry.failure_class, entry.reason, entry.fingerprint) == (failure_class, reason, "f")


def test_a_process_that_the_kernel_killed_for_memory_names_the_limit_of_its_pod():
    case = Case().running(0, 1).change_pod(1, memory_limit="2Gi")
    case.error(1, -9, failure_class="outOfMemory", message="")
    assert "its limit of 2Gi" in case.plan().status.history[-1].message


def test_a_device_that_is_out_of_memory_asks_for_smaller_batches_and_not_for_a_limit():
    case = Case().running(0, 1).change_pod(1, memory_limit="2Gi")
    case.error(1, 1, failure_class="outOfMemory", message="CUDA out of memory")
    message = case.plan().status.history[-1].message
    assert "limit" not in message
    assert "spread the model over more workers" in message


def test_a_hang_names_the_pod_that_got_least_far_and_the_folder_of_its_stacks():
    case = Case().running(0, 1)
    case.error(0, -9, ago_s=2, fingerprint=HANG, step=40, stacks="/mnt/stacks/g1")
    case.error(1, -9, ago_s=1, fingerprint=HANG, step=39, stacks="/mnt/stacks/g1")
    entry = case.plan().status.history[-1]
    assert (entry.reason, entry.pod, entry.stacks) == ("Hang", "mini-1-1", "/mnt/stacks/g1")
    assert "no step after step 39 on node n1" in entry.message
    assert "/mnt/stacks/g1" in entry.message


def test_a_lost_connection_never_hides_the_error_that_broke_it():
    case = Case().running(0, 1)
    case.error(0, ago_s=3.0, message="Connection reset by peer", fingerprint=PEER_LOST)
    case.error(1, ago_s=1.0, message="ValueError: no")
    entry = case.knows(over=True).plan().status.history[-1]
    assert (entry.failure_class, entry.pod) == ("application", "mini-1-1")


def test_a_lost_connection_that_nothing_explains_is_no_fault_of_the_program():
    case = Case().running(0, 1)
    case.error(0, message="Connection reset by peer", fingerprint=PEER_LOST)
    entry = case.knows(over=True).plan().status.history[-1]
    assert (entry.failure_class, entry.reason) == ("infrastructure", "PeerLost")

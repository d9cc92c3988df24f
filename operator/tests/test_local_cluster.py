"""Pods as process trees of this machine: their ends, their logs, and that none survives."""

from __future__ import annotations

import asyncio
import base64
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from deepseek_operator.kube.port import PODS, NotFound
from deepseek_operator.local.cluster import LocalCluster
from deepseek_operator.local.pod import CannotStart, launch_of

PATIENCE_S = 20.0
# A pod that starts a process in a session of its own, as torchrun does, and tells both ids.
PARENT = """
    import os, subprocess, sys, time
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"],
                             start_new_session=True)
    print(os.getpid(), child.pid, flush=True)
"""


def pod(name: str, program: str = "", **spec: Any) -> dict[str, Any]:
    command = ["python", "-c", textwrap.dedent(program)]
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": "default", "labels": {"slot": "3"}},
        "spec": {"containers": [{"name": "trainer", "command": command}], **spec},
    }


@asynccontextmanager
async def cluster(folder: Path, **options: Any) -> AsyncIterator[LocalCluster]:
    made = LocalCluster(folder, **options)
    try:
        yield made
    finally:
        await made.aclose()


async def until(holds: Callable[[], object]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not holds():  # noqa: ASYNC110 - files and processes have no event to wait for
            await asyncio.sleep(0.01)


def phase(local: LocalCluster, name: str) -> str:
    return str(local.get(PODS, "default", name)["status"]["phase"])


def gone(local: LocalCluster, name: str) -> bool:
    try:
        local.get(PODS, "default", name)
    except NotFound:
        return True
    return False


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def told_pids(log: Path) -> list[int]:
    return [int(word) for word in log.read_text().split()] if log.exists() else []


def uid_of(local: LocalCluster, name: str) -> str:
    return str(local.get(PODS, "default", name)["metadata"]["uid"])


@pytest.mark.parametrize(
    ("program", "phase_then", "code"),
    [
        ("print('hello')", "Succeeded", 0),
        ("raise SystemExit(7)", "Failed", 7),
        ("import os; os.kill(os.getpid(), 11)", "Failed", 128 + 11),
    ],
)
def test_a_pod_ends_as_its_process_does(
    tmp_path: Path, program: str, phase_then: str, code: int
) -> None:
    async def scenario() -> None:
        async with cluster(tmp_path) as local:
            await local.create(pod("p", program))
            await until(lambda: phase(local, "p") in ("Succeeded", "Failed"))
            status = local.get(PODS, "default", "p")["status"]
            assert status["phase"] == phase_then
            assert status["containerStatuses"][0]["state"]["terminated"]["exitCode"] == code

    asyncio.run(scenario())


def test_what_a_pod_writes_is_in_its_log(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with cluster(tmp_path) as local:
            await local.create(pod("p", "import sys; print('out'); print('err', file=sys.stderr)"))
            await until(lambda: phase(local, "p") == "Succeeded")
            assert local.log("p").read_text() == "out\nerr\n"

    asyncio.run(scenario())


def test_a_pod_takes_its_other_processes_with_it(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with cluster(tmp_path) as local:
            await local.create(pod("p", PARENT))  # its first process ends, the child would go on
            await until(lambda: phase(local, "p") == "Succeeded")
            first, child = told_pids(local.log("p"))
            assert not alive(first)
            assert not alive(child)

    asyncio.run(scenario())


def test_a_deleted_pod_gets_sigterm_and_its_grace(tmp_path: Path) -> None:
    program = """
        import signal, sys, time
        def save(*_):
            print("saved")
            sys.exit(0)
        signal.signal(signal.SIGTERM, save)
        print("ready", flush=True)
        time.sleep(600)
    """

    async def scenario() -> None:
        async with cluster(tmp_path) as local:
            await local.create(pod("p", program))
            await until(lambda: local.log("p").exists() and "ready" in local.log("p").read_text())
            await local.delete(PODS, "default", "p", uid=uid_of(local, "p"))
            await until(lambda: gone(local, "p"))
            assert local.log("p").read_text() == "ready\nsaved\n"

    asyncio.run(scenario())


def test_a_pod_that_ignores_sigterm_is_killed_after_its_grace(tmp_path: Path) -> None:
    program = "import signal, time; signal.signal(15, signal.SIG_IGN); print(1); time.sleep(600)"

    async def scenario() -> None:
        async with cluster(tmp_path) as local:
            await local.create(pod("p", program))
            await until(lambda: told_pids(local.log("p")))
            running = local.processes("default", "p")
            await local.delete(PODS, "default", "p", uid=uid_of(local, "p"), grace_s=1)
            await until(lambda: gone(local, "p"))
            assert not any(map(alive, running))

    asyncio.run(scenario())


def test_a_node_without_power_says_nothing_and_its_pods_are_dead(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with cluster(tmp_path, nodes=("a", "b")) as local:
            for name in ("p", "q"):
                await local.create(pod(name, "import time; print(1); time.sleep(600)"))
            await until(lambda: all(told_pids(local.log(name)) for name in ("p", "q")))
            nodes = {n: local.get(PODS, "default", n)["spec"]["nodeName"] for n in ("p", "q")}
            assert set(nodes.values()) == {"a", "b"}
            lost = next(name for name, node in nodes.items() if node == "a")
            pids = local.processes("default", lost)
            local.power_off("a")
            await until(lambda: not any(map(alive, pids)))
            assert [phase(local, name) for name in ("p", "q")] == ["Running", "Running"]

    asyncio.run(scenario())


def test_a_pod_that_no_node_may_take_says_why(tmp_path: Path) -> None:
    rule = {"key": "kubernetes.io/hostname", "operator": "NotIn", "values": ["local"]}
    terms = {"nodeSelectorTerms": [{"matchExpressions": [rule]}]}
    affinity = {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": terms}}

    async def scenario() -> None:
        async with cluster(tmp_path) as local:
            await local.create(pod("p", affinity=affinity))
            await until(lambda: "conditions" in local.get(PODS, "default", "p")["status"])
            condition = local.get(PODS, "default", "p")["status"]["conditions"][0]
            assert (condition["reason"], phase(local, "p")) == ("Unschedulable", "Pending")
            assert "nodes are available" in condition["message"]

    asyncio.run(scenario())


def test_nothing_survives_a_runner_that_is_killed(tmp_path: Path) -> None:
    runner = """
        import asyncio, sys
        from pathlib import Path
        from deepseek_operator.local.cluster import LocalCluster

        async def main():
            local = LocalCluster(Path(sys.argv[1]))
            container = {"name": "trainer", "command": ["python", "-c", sys.argv[2]]}
            await local.create({"apiVersion": "v1", "kind": "Pod",
                                "metadata": {"name": "p", "namespace": "default"},
                                "spec": {"containers": [container]}})
            await asyncio.sleep(600)
        asyncio.run(main())
    """
    program = textwrap.dedent(PARENT) + "time.sleep(600)"
    log = tmp_path / "pods" / "p" / "log"
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(runner), str(tmp_path), program]
    ) as process:
        deadline_s = time.monotonic() + PATIENCE_S
        while not told_pids(log):
            assert time.monotonic() < deadline_s
            time.sleep(0.01)
        pids = told_pids(log)
        assert all(map(alive, pids))
        os.kill(process.pid, signal.SIGKILL)
        while any(map(alive, pids)):
            assert time.monotonic() < deadline_s
            time.sleep(0.01)


def test_variables_come_from_fields_secrets_and_each_other(tmp_path: Path) -> None:
    scheduled = pod("p", nodeName="a")
    scheduled["spec"]["containers"][0] = {
        "name": "trainer",
        "command": ["torchrun"],
        "args": ["--rdzv-id=$(NAME)", "$(UNKNOWN)", "/mnt/dstrain/data/x"],
        "env": [
            {"name": "NAME", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}},
            {"name": "NODE", "valueFrom": {"fieldRef": {"fieldPath": "spec.nodeName"}}},
            {"name": "SLOT", "valueFrom": {"fieldRef": {"fieldPath": "metadata.labels['slot']"}}},
            {"name": "IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}},
            {"name": "TOKEN", "valueFrom": {"secretKeyRef": {"name": "s", "key": "token"}}},
            {"name": "BOTH", "value": "$(NAME)-$(SLOT)"},
            {"name": "CONFIG", "value": '{"uri": "file:///mnt/dstrain/claim/path"}'},
            {"name": "DSTRAIN_METRICS_PORT", "value": "9400"},
            {"name": "HOME", "value": "/tmp"},
        ],
    }
    secret = {"data": {"token": base64.b64encode(b"word").decode()}}
    launch = launch_of(scheduled, volumes=tmp_path, secret={"s": secret}.__getitem__)
    assert launch.command == ("torchrun", "--rdzv-id=p", "$(UNKNOWN)", f"{tmp_path}/data/x")
    assert launch.environment == {
        "NAME": "p",
        "NODE": "a",
        "SLOT": "3",
        "IP": "127.0.0.1",
        "TOKEN": "word",
        "BOTH": "p-3",
        "CONFIG": f'{{"uri": "file://{tmp_path}/claim/path"}}',
        "DSTRAIN_METRICS_PORT": "0",
        "GLOO_SOCKET_IFNAME": "lo",
        "NCCL_SOCKET_IFNAME": "lo",
    }


def test_a_missing_secret_is_named(tmp_path: Path) -> None:
    scheduled = pod("p")
    reference = {"secretKeyRef": {"name": "s", "key": "token"}}
    scheduled["spec"]["containers"][0]["env"] = [{"name": "TOKEN", "valueFrom": reference}]
    with pytest.raises(CannotStart, match="secret 's' not found"):
        launch_of(scheduled, volumes=tmp_path, secret={}.__getitem__)

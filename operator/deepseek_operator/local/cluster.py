"""A cluster on this machine: a pod is a tree of processes with its own folder and log file.

`MemoryCluster` is the API server; here are the scheduler (least loaded node that the pod accepts)
and the kubelet (`podinit` above each pod's processes). Nodes are names: one by default, several so
that tests can power one off. Nothing survives the runner: every pod's `podinit` ends its processes
when the pipe to the runner closes, also when the runner was killed.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deepseek_operator.kube.port import NODES, PODS, SECRETS, NotFound, Resource, WatchEvent
from deepseek_operator.local import podinit
from deepseek_operator.local.memory import (
    DEFAULT_GRACE_S,
    TERMINAL_PHASES,
    MemoryCluster,
    Object,
)
from deepseek_operator.local.pod import (
    ADDRESS,
    CannotStart,
    excluded_nodes,
    gpus_of,
    launch_of,
    trainer_of,
)

LOG_NAME = "log"
_FOREIGN = ("DSTRAIN_", "TORCHELASTIC_", "PET_")  # another torchrun's settings are not the pod's
_RANKS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass
class _Running:
    """One pod's processes."""

    node: str
    gpus: tuple[int, ...]
    powered: bool = True
    process: asyncio.subprocess.Process | None = None
    grace: asyncio.TimerHandle | None = field(default=None, repr=False)


class LocalCluster(MemoryCluster):
    """`kube.port.Cluster` whose pods run on this machine.

    Args:
        folder: of the run: `pods/<name>/log`, `volumes/<claim>/...`.
        nodes: their names.
        environment: variables of every pod, below those of its manifest.
        clock: seconds since the epoch, for timestamps.
    """

    def __init__(
        self,
        folder: Path,
        *,
        nodes: Iterable[str] = ("local",),
        environment: Mapping[str, str] | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        super().__init__(clock=clock)
        self.folder = folder.absolute()
        self._environment = dict(environment or {})
        self._pods: dict[str, _Running] = {}  # by uid
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False
        for node in nodes:
            self.put_node(node)
        self.observe(self._changed)

    # What a person and the tests see.

    def log(self, name: str) -> Path:
        """The counterpart of `kubectl logs`: everything that the pod has written."""
        return self.folder / "pods" / name / LOG_NAME

    @property
    def volumes(self) -> Path:
        """`pvc://claim/path` is `volumes/claim/path`."""
        return self.folder / "volumes"

    def processes(self, namespace: str, name: str) -> list[int]:
        """Process ids of a running pod, its first process (torchrun) in front."""
        running = self._pods.get(self.get(PODS, namespace, name)["metadata"]["uid"])
        if running is None or running.process is None:
            return []
        return podinit.descendants(running.process.pid)

    def power_off(self, node: str) -> None:
        """End all processes of a node at once and say nothing: its pods stay as they are."""
        for running in self._pods.values():
            if running.node == node:
                running.powered = False
                _let_go(running)

    async def aclose(self) -> None:
        """End every pod and wait until all its processes have gone."""
        self._closed = True
        for running in self._pods.values():
            _let_go(running)
        while self._tasks:
            await asyncio.wait(self._tasks)

    # The scheduler.

    def _changed(self, resource: Resource, event: WatchEvent) -> None:
        # Called in the middle of a write: what follows from it comes after.
        if resource == PODS:
            asyncio.get_running_loop().call_soon(self._pod_changed, event)
        elif resource == NODES and event.type != "DELETED":
            asyncio.get_running_loop().call_soon(self._schedule_waiting)

    def _pod_changed(self, event: WatchEvent) -> None:
        meta = event.object["metadata"]
        running = self._pods.get(meta["uid"])
        if event.type == "ADDED":
            self._schedule_waiting()
        elif event.type == "DELETED":
            if running:
                _let_go(running)
            self._schedule_waiting()
        elif running and "deletionTimestamp" in meta:
            self._terminate(running, meta.get("deletionGracePeriodSeconds", DEFAULT_GRACE_S))

    def _schedule_waiting(self) -> None:
        for pod in self.objects(PODS):
            if not pod["spec"].get("nodeName") and not self._closed:
                self._schedule(pod)

    def _schedule(self, pod: Object) -> None:
        meta = pod["metadata"]
        node, why_not = self._place(pod)
        if why_not:
            self._say(pod, {"conditions": [_unscheduled(why_not)]})
            return
        self.bind_pod(meta["namespace"], meta["name"], node)
        free = self._free_gpus()
        running = _Running(node, tuple(free[: gpus_of(pod)]))
        self._pods[meta["uid"]] = running
        bound = self.get(PODS, meta["namespace"], meta["name"])
        task = asyncio.get_running_loop().create_task(self._run(bound, running))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _place(self, pod: Object) -> tuple[str, str]:
        """The node for a pod, or why there is none."""
        avoided = excluded_nodes(pod)
        names = {node["metadata"]["name"]: node for node in self.objects(NODES)}
        usable = [n for n, node in names.items() if _ready(node) and n not in avoided]
        if not usable:
            return "", f"0/{len(names)} nodes are available: none is ready and allowed"
        if gpus_of(pod) > len(self._free_gpus()):
            return "", (
                f"0/{len(names)} nodes are available: {len(names)} Insufficient nvidia.com/gpu "
                f"({gpus_of(pod)} asked, {len(self._free_gpus())} free on this machine)"
            )
        load = [running.node for running in self._pods.values()]
        return min(usable, key=load.count), ""

    def _free_gpus(self) -> list[int]:
        taken = {gpu for running in self._pods.values() for gpu in running.gpus}
        return [gpu for gpu in _machine_gpus() if gpu not in taken]

    # The kubelet.

    async def _run(self, pod: Object, running: _Running) -> None:
        try:
            code = await self._run_to_end(pod, running)
        except CannotStart as error:
            self._say(pod, _waiting(pod, "CreateContainerConfigError", str(error)))
            return
        finally:
            del self._pods[pod["metadata"]["uid"]]
            if running.grace:
                running.grace.cancel()
        if not running.powered or self._closed:
            return  # a dead node says nothing
        self._say(pod, _finished(pod, code))
        self._drop_if_deleted(pod)
        self._schedule_waiting()

    async def _run_to_end(self, pod: Object, running: _Running) -> int:
        meta = pod["metadata"]
        launch = launch_of(
            pod, volumes=self.volumes, secret=lambda name: self._secret(meta["namespace"], name)
        )
        folder = self.log(meta["name"]).parent
        folder.mkdir(parents=True, exist_ok=True)
        self.volumes.mkdir(parents=True, exist_ok=True)
        environment = {**_outside(), **self._environment, **launch.environment}
        if running.gpus:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, running.gpus))
        with (folder / LOG_NAME).open("ab") as log:
            running.process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-I", "-S", podinit.__file__, *launch.command),
                stdin=asyncio.subprocess.PIPE,
                stdout=log,
                stderr=asyncio.subprocess.STDOUT,
                env=environment,
                start_new_session=True,  # Ctrl-C in the terminal is for the runner
            )
        if self._gone(pod) or self._closed:
            _let_go(running)
        else:
            self._say(pod, _started(pod))
            if running.grace is not None:  # deleted while it was being started
                running.process.terminate()
        return await running.process.wait()

    def _terminate(self, running: _Running, grace_s: float) -> None:
        if running.grace is not None:
            return
        running.grace = asyncio.get_running_loop().call_later(grace_s, _let_go, running)
        if running.process is not None and running.process.returncode is None:
            running.process.terminate()

    def _drop_if_deleted(self, pod: Object) -> None:
        meta = pod["metadata"]
        if not self._gone(pod):
            stored = self.get(PODS, meta["namespace"], meta["name"])
            if "deletionTimestamp" in stored["metadata"]:
                self.finish_deletion(meta["namespace"], meta["name"])

    def _gone(self, pod: Object) -> bool:
        meta = pod["metadata"]
        try:
            stored = self.get(PODS, meta["namespace"], meta["name"])
        except NotFound:
            return True
        return bool(stored["metadata"]["uid"] != meta["uid"])

    def _say(self, pod: Object, status: Mapping[str, Any]) -> None:
        if not self._gone(pod):
            self.set_pod_status(pod["metadata"]["namespace"], pod["metadata"]["name"], status)

    def _secret(self, namespace: str, name: str) -> Mapping[str, Any]:
        try:
            return self.get(SECRETS, namespace, name)
        except NotFound as error:
            raise KeyError(name) from error


def _let_go(running: _Running) -> None:
    """Close the pipe: `podinit` ends the pod's processes."""
    if running.process is not None and running.process.stdin is not None:
        running.process.stdin.close()


def _outside() -> dict[str, str]:
    """The runner's environment, without what belongs to another gang; this Python comes first."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(_FOREIGN) and name not in _RANKS
    }
    programs = Path(sys.executable).parent  # torchrun of this environment
    kept["PATH"] = os.pathsep.join([str(programs), kept.get("PATH", os.defpath)])
    kept["PYTHONUNBUFFERED"] = "1"
    return kept


def _machine_gpus() -> list[int]:
    return sorted(int(device.name[len("nvidia") :]) for device in Path("/dev").glob("nvidia[0-9]*"))


def _ready(node: Object) -> bool:
    conditions = {c["type"]: c["status"] for c in node["status"].get("conditions", ())}
    return conditions.get("Ready") == "True" and not node["spec"].get("unschedulable")


def _unscheduled(message: str) -> dict[str, str]:
    return {
        "type": "PodScheduled",
        "status": "False",
        "reason": "Unschedulable",
        "message": message,
    }


def _container(pod: Object, state: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [{"name": trainer_of(pod)["name"], "ready": "running" in state, "state": dict(state)}]


def _waiting(pod: Object, reason: str, message: str) -> dict[str, Any]:
    state = {"waiting": {"reason": reason, "message": message}}
    return {"containerStatuses": _container(pod, state)}


def _started(pod: Object) -> dict[str, Any]:
    return {
        "phase": "Running",
        "podIP": ADDRESS,
        "hostIP": ADDRESS,
        "containerStatuses": _container(pod, {"running": {}}),
    }


def _finished(pod: Object, code: int) -> dict[str, Any]:
    ended = {"exitCode": code, "reason": "Error" if code else "Completed"}
    return {
        "phase": TERMINAL_PHASES[1 if code else 0],
        "containerStatuses": _container(pod, {"terminated": ended}),
    }

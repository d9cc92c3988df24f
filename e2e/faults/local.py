"""Faults on processes of this machine: the same reconciler and the same torchrun agents as on a
cluster, without one.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from deepseek_operator.kube.port import PODS, TRAININGS, Resource, WatchEvent
from dstrain.local.folder import RunFolder
from dstrain.local.run import NAMESPACE, LocalRun
from dstrain.local.terminal import Terminal

from e2e.faults.drive import RealTime, Version
from e2e.faults.plan import Fault
from e2e.faults.processes import ranks


class LocalStage(RealTime):
    """One `dstrain run` on its own thread, with several names of nodes."""

    def __init__(self, training: dict[str, Any], folder: Path, *, nodes: int) -> None:
        self._versions: list[Version] = []
        self._lock = threading.Lock()
        self._loop = asyncio.new_event_loop()
        self._stopped = asyncio.Event()
        names = [f"node-{number}" for number in range(nodes)]
        self._local = LocalRun(training, RunFolder(folder), Terminal(sys.stderr), nodes=names)
        self._local.cluster.observe(self._observed)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Train; wait at the end of the block until the training has finished or was stopped."""
        thread = threading.Thread(target=self._loop.run_until_complete, args=(self._train(),))
        thread.start()
        try:
            yield
        finally:
            thread.join()
            self._loop.close()

    def stop(self) -> None:
        """End every process and with it the training, where it is."""
        self._loop.call_soon_threadsafe(self._stopped.set)

    def versions(self) -> list[Version]:
        """Every write of the status."""
        with self._lock:
            return list(self._versions)

    def node_of(self, slot: int) -> str:
        """Where the slot's running pod is; empty if there is none."""
        pod = self._pod(slot)
        return str(pod["spec"]["nodeName"]) if pod and self._processes(pod) else ""

    def inject(self, fault: Fault) -> float:
        """Raises ValueError for a kind that needs a real cluster."""
        pod = self._pod(fault.slot)
        assert pod is not None, f"no running pod in slot {fault.slot}"
        processes = self._processes(pod)
        at_s = time.monotonic()
        match fault.kind:
            case "kill-process":
                os.kill(ranks(processes)[0], signal.SIGKILL)
            case "freeze-process":
                os.kill(ranks(processes)[0], signal.SIGSTOP)
            case "kill-pod":
                os.kill(processes[0], signal.SIGKILL)
            case "delete-pod":
                name, uid = pod["metadata"]["name"], pod["metadata"]["uid"]
                self._call(self._local.cluster.delete(PODS, NAMESPACE, name, uid=uid))
            case "power-off":
                self._loop.call_soon_threadsafe(
                    self._local.cluster.power_off, pod["spec"]["nodeName"]
                )
            case "partition" | "kill-operator":
                raise ValueError(f"{fault.kind} needs a real cluster")
        return at_s

    def repair(self, fault: Fault, node: str) -> None:
        """A node here is a name: it takes new pods as soon as the operator gives it some."""

    async def _train(self) -> None:
        async with self._local.running():
            ends = (self._local.until_finished(), self._stopped.wait())
            tasks = [asyncio.ensure_future(end) for end in ends]
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in tasks:
                task.cancel()

    def _call(self, coroutine: Any) -> None:
        asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    def _observed(self, resource: Resource, event: WatchEvent) -> None:
        if resource == TRAININGS and event.object.get("status"):
            with self._lock:
                self._versions.append(Version(time.monotonic(), event.object["status"]))

    def _pod(self, slot: int) -> dict[str, Any] | None:
        for pod in self._local.cluster.objects(PODS):
            here = pod["metadata"]["labels"]["dstrain.dev/slot"] == str(slot)
            leaving = "deletionTimestamp" in pod["metadata"]
            if here and pod["status"]["phase"] == "Running" and not leaving:
                return pod
        return None

    def _processes(self, pod: dict[str, Any]) -> list[int]:
        return self._local.cluster.processes(NAMESPACE, pod["metadata"]["name"])

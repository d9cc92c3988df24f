"""A cluster in memory, an operator that can be replaced, and pods that talk."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from typing import Any

from deepseek_operator.core.model import Key, Settings
from deepseek_operator.kube.port import (
    PODS,
    TRAININGS,
    ClusterError,
    Manifest,
    Page,
    Refused,
    Resource,
    WatchEvent,
)
from deepseek_operator.local.memory import MemoryCluster
from deepseek_operator.runtime.controller import Controller
from deepseek_operator.runtime.coordinator import Coordinator, UnknownTraining
from deepseek_operator.runtime.trainings import put_object, relist, remove_object
from dstrain_api.protocol import Beat, Join

Run = Callable[[Coroutine[Any, Any, Any]], Any]
KEY = Key("team", "mini")


class FlakyCluster(MemoryCluster):
    """A cluster whose API server can be away, slow, or of another opinion."""

    away = False
    refusal = ""
    slow_s = 0.0
    writes = 0

    def _check(self) -> None:
        if self.away:
            raise ClusterError("connection refused")

    async def create(self, manifest: Manifest) -> dict[str, Any]:
        self._check()
        await asyncio.sleep(self.slow_s)
        if self.refusal and manifest["kind"] == "Pod":
            raise Refused(self.refusal)
        self.writes += 1
        return await super().create(manifest)

    async def replace_status(self, *args: Any, **named: Any) -> str:
        self._check()
        self.writes += 1
        return await super().replace_status(*args, **named)

    async def list_pages(self, resource: Resource, **where: Any) -> AsyncIterator[Page]:
        self._check()
        async for page in super().list_pages(resource, **where):
            yield page

    async def watch(self, resource: Resource, **where: Any) -> AsyncIterator[WatchEvent]:
        self._check()
        yield WatchEvent("BOOKMARK", {"metadata": {"resourceVersion": where["resource_version"]}})
        async for event in super().watch(resource, **where):
            self._check()
            yield event
        self._check()


class Bench:
    """A cluster in memory, an operator that can be replaced, and pods that talk."""

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        self.cluster = FlakyCluster(clock=loop.time)
        self.watching = True
        self.leads = True
        self.cluster.observe(self._observed)
        for name in ("node-0", "node-1"):
            self.cluster.put_node(name)
        self.coordinator: Coordinator
        self.controller: Controller
        self._task: asyncio.Task[None]

    @asynccontextmanager
    async def operator(self) -> AsyncIterator[None]:
        loop = asyncio.get_running_loop()
        self.coordinator = Coordinator(clock=loop.time)
        self.controller = Controller(
            cluster=self.cluster,
            coordinator=self.coordinator,
            settings=Settings(trainer_image="trainer", coordinator_url="http://operator:8080"),
            operator_key=b"key",
            clock=loop.time,
            jitter=lambda: 1.0,
            leads=lambda: self.leads,
        )
        self._task = asyncio.create_task(self.controller.run())
        if not self.cluster.away:
            await relist(self.controller, self.cluster, [""])
        try:
            yield
        finally:
            self.controller.stop()
            await self._task

    def _observed(self, resource: Resource, event: WatchEvent) -> None:
        if resource != TRAININGS or not self.watching or not hasattr(self, "controller"):
            return
        change = remove_object if event.type == "DELETED" else put_object
        change(self.controller, event.object)

    async def apply(self, name: str = "mini", **spec: Any) -> None:
        await self.cluster.create(
            {
                "apiVersion": "dstrain.dev/v1alpha1",
                "kind": "DeepSeekTraining",
                "metadata": {"namespace": "team", "name": name},
                "spec": {"entrypoint": {"module": "x"}, "workers": {"replicas": 2}, **spec},
            }
        )

    def pods(self, name: str = "mini") -> list[dict[str, Any]]:
        return self.cluster.objects(PODS, "team", f"dstrain.dev/training={name}")

    @property
    def status(self) -> dict[str, Any]:
        return dict(self.cluster.get(TRAININGS, "team", "mini").get("status", {}))

    @property
    def uid(self) -> str:
        return str(self.cluster.get(TRAININGS, "team", "mini")["metadata"]["uid"])

    def run_pods(self) -> None:
        """What scheduler and kubelets do."""
        for slot, pod in enumerate(self.pods()):
            name = pod["metadata"]["name"]
            self.cluster.bind_pod("team", name, f"node-{slot}")
            running = [{"name": "trainer", "state": {"running": {}}}]
            self.cluster.set_pod_status(
                "team", name, {"phase": "Running", "containerStatuses": running}
            )

    def find_no_node(self) -> None:
        """What the scheduler says where pods are kept away from the only node."""
        reason = "0/1 nodes are available: 1 node(s) didn't match Pod's node affinity/selector."
        waiting = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable"}
        for pod in self.pods():
            self.cluster.set_pod_status(
                "team",
                pod["metadata"]["name"],
                {"phase": "Pending", "conditions": [{**waiting, "message": reason}]},
            )

    def join(self) -> None:
        for slot, pod in enumerate(self.pods()):
            join = Join(
                pod=pod["metadata"]["name"],
                pod_uid=pod["metadata"]["uid"],
                slot=slot,
                node=f"node-{slot}",
                address=f"10.0.0.{slot}",
                port=29500,
                generation=0,
            )
            self.coordinator.join(self.uid, join)

    def beat(self, generation: int = 1) -> None:
        for slot, pod in enumerate(self.pods()):
            beat = Beat(
                pod=pod["metadata"]["name"],
                pod_uid=pod["metadata"]["uid"],
                slot=slot,
                node=f"node-{slot}",
                generation=generation,
                group_rank=slot,
                group_world_size=2,
                master_address="10.0.0.0",
                master_port=29500,
                state="running",
            )
            with suppress(UnknownTraining):  # a pod asks again
                self.coordinator.beat(self.uid, beat)

    async def train(self, seconds: int) -> None:
        for _ in range(seconds):
            self.beat()
            await asyncio.sleep(1)

    async def start(self) -> None:
        """Apply a training and bring it to its first generation."""
        await self.apply()
        await asyncio.sleep(1)
        self.run_pods()
        self.join()
        await asyncio.sleep(1)
        await self.train(1)

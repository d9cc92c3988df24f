"""Whether the operator's memory stays flat: controller and coordinator on a cluster in memory, with
trainings that come, fail, are suspended and go, for as long as asked.

`python -m benchmarks.soak_operator [MINUTES]`
"""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import sys
import time
from collections import Counter, deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from deepseek_operator.core.model import Settings
from deepseek_operator.kube.port import EVENTS, PODS, TRAININGS, NotFound, Resource, WatchEvent
from deepseek_operator.local.memory import MemoryCluster
from deepseek_operator.runtime.controller import Controller
from deepseek_operator.runtime.coordinator import Coordinator, Fenced, UnknownTraining
from deepseek_operator.runtime.trainings import put_object, remove_object
from dstrain_api.protocol import Beat, Join, ProgressReport, Report

NAMESPACE: Final = "soak"
WORKERS: Final = 2
NODES: Final = tuple(f"node-{number}" for number in range(8))
MINUTES: Final = 5.0
TRAININGS_AT_ONCE: Final = 50
WARM_UP_S: Final = 90.0  # until deleted trainings are forgotten as fast as others are made
REPORT_S: Final = 15.0
HISTORY: Final = 500  # changes that the cluster in memory keeps, so that it is flat itself

Object = dict[str, Any]


class Fleet:
    """An operator and the trainings it has. `clock` gives seconds since the epoch."""

    def __init__(self, chance: random.Random, clock: Callable[[], float] = time.time) -> None:
        self.ended: Counter[str] = Counter()  # lives that came to their end, by kind
        self.cluster = MemoryCluster(clock=clock, history=HISTORY)
        self.coordinator = Coordinator(clock=clock)
        self.controller = Controller(
            cluster=self.cluster,
            coordinator=self.coordinator,
            settings=Settings(trainer_image="trainer", coordinator_url="http://operator:8080"),
            operator_key=b"key",
            clock=clock,
            jitter=chance.random,
        )
        self._chance = chance
        self.cluster.observe(self._tell)
        for name in NODES:
            self.cluster.put_node(name)

    async def live(self, name: str) -> None:
        """One training from its creation to its deletion; chance says what happens to it."""
        kind = self._chance.choice(["completes", "fails once", "is suspended", "is deleted early"])
        await self.cluster.create(
            {
                "apiVersion": "dstrain.dev/v1alpha1",
                "kind": "DeepSeekTraining",
                "metadata": {"namespace": NAMESPACE, "name": name},
                "spec": {"entrypoint": {"module": "x"}, "workers": {"replicas": WORKERS}},
            }
        )
        life = Life(self, name)
        await life.until("Running")
        await life.train(self._chance.randrange(2, 8))
        if kind == "fails once":
            life.fail_one()
            await life.train(2)
            await life.until("Running")
        elif kind == "is suspended":
            life.suspend(True)
            await life.until("Suspended")
            life.suspend(False)
            await life.until("Running")
        if kind != "is deleted early":
            life.finish()
            await life.until("Complete")
        await life.delete()
        self.ended[kind] += 1

    def tables(self) -> dict[str, int]:
        """Entries in everything that the operator keeps, by name."""
        parts = (self.controller, self.controller.queue, self.coordinator)
        informers = {f"informer of {i.name}": len(i.items) for i in self.controller.informers}
        series = {"metrics": self.controller.metrics.expose().count(b'training="')}
        return {
            f"{type(part).__name__}.{name}": len(value)
            for part in parts
            for name, value in vars(part).items()
            if isinstance(value, dict | set | list | deque)
        } | {**informers, **series}

    def _tell(self, resource: Resource, event: WatchEvent) -> None:
        """What kopf's watch does; and events are not kept here."""
        if resource == TRAININGS:
            change = remove_object if event.type == "DELETED" else put_object
            change(self.controller, event.object)
        elif resource == EVENTS and event.type == "ADDED":
            meta = event.object["metadata"]
            asyncio.get_running_loop().call_soon(self._forget_event, meta["name"], meta["uid"])

    def _forget_event(self, name: str, uid: str) -> None:
        deletion = self.cluster.delete(EVENTS, NAMESPACE, name, uid=uid)
        with suppress(StopIteration):  # it waits for nothing
            deletion.send(None)


class Life:
    """What scheduler, kubelets, agents and a user do to one training."""

    def __init__(self, fleet: Fleet, name: str) -> None:
        self._cluster = fleet.cluster
        self._coordinator = fleet.coordinator
        self._name = name
        self._uid = str(self._stored["metadata"]["uid"])
        self._step = 0

    @property
    def _stored(self) -> Object:
        return self._cluster.get(TRAININGS, NAMESPACE, self._name)

    @property
    def _status(self) -> Object:
        return dict(self._stored.get("status") or {})

    def _pods(self) -> list[Object]:
        return self._cluster.objects(PODS, NAMESPACE, f"dstrain.dev/training={self._name}")

    async def until(self, phase: str) -> None:
        """Go on until the status says so."""
        while self._status.get("phase") != phase:
            await self.train(1)

    async def train(self, seconds: int) -> None:
        """Let the pods do what they do, once a second."""
        for _ in range(seconds):
            self._kubelets()
            for rank, pod in enumerate(self._running()):
                with suppress(UnknownTraining, Fenced):
                    self._agent(pod, rank)
            await asyncio.sleep(1)

    def fail_one(self) -> None:
        """The pod in slot 1 ends badly."""
        ended = {"exitCode": 1, "reason": "Error"}
        pod = self._running()[-1]["metadata"]["name"]
        container = {"name": "trainer", "state": {"terminated": ended}}
        self._cluster.set_pod_status(
            NAMESPACE, pod, {"phase": "Failed", "containerStatuses": [container]}
        )

    def suspend(self, suspended: bool) -> None:
        """`kubectl patch`."""
        self._cluster.edit(
            TRAININGS, NAMESPACE, self._name, lambda t: t["spec"].update(suspend=suspended)
        )

    def finish(self) -> None:
        """The program has reached its end."""
        generation = self._status["generation"]
        for pod in self._running():
            done = Report(pod_uid=pod["metadata"]["uid"], generation=generation, done=True)
            self._coordinator.report(self._uid, done)

    async def delete(self) -> None:
        """`kubectl delete`; its pods end with it."""
        await self._cluster.delete(TRAININGS, NAMESPACE, self._name, uid=self._uid)
        while self._pods():
            self._kubelets()
            await asyncio.sleep(1)

    def _running(self) -> list[Object]:
        return [
            pod
            for pod in self._pods()
            if pod["status"]["phase"] == "Running" and "deletionTimestamp" not in pod["metadata"]
        ]

    def _kubelets(self) -> None:
        for pod in self._pods():
            name = pod["metadata"]["name"]
            if "deletionTimestamp" in pod["metadata"]:
                with suppress(NotFound):
                    self._cluster.finish_deletion(NAMESPACE, name)
            elif pod["status"]["phase"] == "Pending":
                self._cluster.bind_pod(NAMESPACE, name, NODES[hash(name) % len(NODES)])
                container = {"name": "trainer", "state": {"running": {}}}
                self._cluster.set_pod_status(
                    NAMESPACE, name, {"phase": "Running", "containerStatuses": [container]}
                )

    def _agent(self, pod: Object, rank: int) -> None:
        meta = pod["metadata"]
        who: Object = {
            "pod": meta["name"],
            "pod_uid": meta["uid"],
            "slot": int(meta["labels"]["dstrain.dev/slot"]),
            "node": pod["spec"]["nodeName"],
        }
        membership = self._coordinator.snapshot(self._uid).membership
        if membership is None or meta["uid"] not in membership.pod_uids:
            join = Join(address="10.0.0.1", port=29500, generation=0, **who)
            self._coordinator.join(self._uid, join)
            return
        beat = Beat(
            generation=membership.generation,
            group_rank=rank,
            group_world_size=len(membership.pod_uids),
            master_address="10.0.0.1",
            master_port=29500,
            state="running",
            **who,
        )
        self._coordinator.beat(self._uid, beat)
        if rank == 0:
            self._step += 1
            progress = ProgressReport(step=self._step, loss=1.0)
            report = Report(
                pod_uid=meta["uid"], generation=membership.generation, progress=progress
            )
            self._coordinator.report(self._uid, report)


def rss_bytes() -> int:
    """Memory of this process that is in RAM now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


async def soak(seconds: float, at_once: int) -> list[str]:
    """Run; the lines of the report."""
    fleet = Fleet(random.Random(1))
    names = (f"t{number}" for number in itertools.count())
    controlling = asyncio.create_task(fleet.controller.run())

    async def keep_busy() -> None:
        while True:
            await fleet.live(next(names))

    busy = [asyncio.create_task(keep_busy()) for _ in range(at_once)]
    began_s = time.monotonic()
    seen: list[tuple[float, int, int]] = []
    while time.monotonic() - began_s < WARM_UP_S + seconds:
        await asyncio.sleep(REPORT_S)
        if broken := [task for task in (*busy, controlling) if task.done()]:
            await broken[0]
        at_s = time.monotonic() - began_s
        seen.append((at_s, rss_bytes(), fleet.ended.total()))
        print(f"{at_s:6.0f} s  {rss_bytes() / 2**20:6.1f} MiB  {fleet.ended.total():6} lives")
    for task in busy:
        task.cancel()
    fleet.controller.stop()
    await controlling
    first = next(s for s in seen if s[0] >= WARM_UP_S)
    last = seen[-1]
    return [
        f"{at_once} trainings at once of {WORKERS} workers, {last[2]} lives: {dict(fleet.ended)}",
        f"memory after {first[0]:.0f} s: {first[1] / 2**20:.1f} MiB; "
        f"after {last[0]:.0f} s: {last[1] / 2**20:.1f} MiB",
    ]


def main(minutes: float = MINUTES) -> None:
    """Print memory as time goes by, and what there is to say at the end."""
    for line in asyncio.run(soak(60 * minutes, TRAININGS_AT_ONCE)):
        print(line)


if __name__ == "__main__":
    main(*map(float, sys.argv[1:2]))

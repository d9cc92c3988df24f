"""The controller on the cluster in memory, in fake time: news, silence and errors."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest
from deepseek_operator.core.model import Key, Settings
from deepseek_operator.kube.port import (
    NODES,
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
from dstrain_api.protocol import Beat, Join, Report

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


def test_training_is_brought_from_apply_to_complete(run_in_fake_time: Run) -> None:
    async def main() -> None:
        bench = Bench()
        async with bench.operator():
            await bench.start()
            assert [p["metadata"]["name"] for p in bench.pods()] == ["mini-0-1", "mini-1-1"]
            assert bench.status["generation"] == 1
            assert bench.status["phase"] == "Running"
            done = Report(pod_uid=bench.pods()[0]["metadata"]["uid"], generation=1, done=True)
            bench.coordinator.report(bench.uid, done)
            await asyncio.sleep(1)
            assert bench.status["phase"] == "Complete"
            exposed = bench.controller.metrics.expose().decode()
            assert (
                'dstrain_training_phase{namespace="team",phase="Complete",training="mini"} 1.0'
            ) in exposed
            assert 'dstrain_trainings_finished_total{result="Complete"} 1.0' in exposed

    run_in_fake_time(main())


def test_quiet_training_costs_no_writes(run_in_fake_time: Run) -> None:
    async def main() -> None:
        bench = Bench()
        async with bench.operator():
            await bench.start()
            await bench.train(30)
            writes = bench.cluster.writes
            await bench.train(600)
            assert bench.cluster.writes == writes

    run_in_fake_time(main())


def test_operator_that_is_replaced_changes_no_pod_and_ends_no_generation(
    run_in_fake_time: Run,
) -> None:
    async def main() -> None:
        bench = Bench()
        async with bench.operator():
            await bench.start()
        before = [p["metadata"]["uid"] for p in bench.pods()]
        await asyncio.sleep(60)
        async with bench.operator():
            await bench.train(30)
            assert [p["metadata"]["uid"] for p in bench.pods()] == before
            assert bench.status["generation"] == 1
            assert bench.coordinator.snapshot(bench.uid).membership is not None

    run_in_fake_time(main())


def test_older_event_does_not_undo_what_was_written(run_in_fake_time: Run) -> None:
    async def main() -> None:
        bench = Bench()
        bench.watching = False  # as if the watch lagged behind
        await bench.apply()
        stale = dict(bench.cluster.get(TRAININGS, "team", "mini"))
        async with bench.operator():
            await asyncio.sleep(5)
            attempt = bench.status["attempt"]
            put_object(bench.controller, stale)
            await asyncio.sleep(5)
            assert bench.controller.trainings[KEY].status.attempt == attempt
            assert bench.status["attempt"] == attempt
            assert len(bench.pods()) == 2

    run_in_fake_time(main())


def test_what_follows_from_a_written_status_waits_for_no_event(run_in_fake_time: Run) -> None:
    """The event of a write may come before its answer is known, or after, and then says nothing."""

    async def main() -> None:
        bench = Bench()
        bench.watching = False
        broken = {"type": "GpuUnhealthy", "status": "True"}
        bench.cluster.edit(
            NODES, "", "node-0", lambda node: node["status"]["conditions"].append(broken)
        )
        await bench.apply()
        async with bench.operator():
            await asyncio.sleep(1)
            first = [p["metadata"]["uid"] for p in bench.pods()]
            bench.find_no_node()
            await asyncio.sleep(15)
            assert bench.status["nodes"][0]["tolerated"]
            assert not {p["metadata"]["uid"] for p in bench.pods()}.intersection(first)

    run_in_fake_time(main())


def test_edit_between_watch_and_write_is_looked_at_again(run_in_fake_time: Run) -> None:
    async def main() -> None:
        bench = Bench()
        async with bench.operator():
            bench.watching = False
            await bench.apply()
            seen = dict(bench.cluster.get(TRAININGS, "team", "mini"))
            bench.cluster.edit(TRAININGS, "team", "mini", lambda o: o["spec"].update(suspend=True))
            put_object(bench.controller, seen)
            await asyncio.sleep(3)
            assert bench.pods() == [], "the status was refused, so nothing followed"
            put_object(bench.controller, bench.cluster.get(TRAININGS, "team", "mini"))
            await asyncio.sleep(1)
            assert bench.status["phase"] == "Suspended"

    run_in_fake_time(main())


def test_nothing_is_decided_before_the_caches_are_complete(run_in_fake_time: Run) -> None:
    async def main() -> None:
        bench = Bench()
        await bench.apply()
        bench.cluster.away = True
        async with bench.operator():
            put_object(bench.controller, bench.cluster.get(TRAININGS, "team", "mini"))
            await asyncio.sleep(30)
            assert bench.cluster.writes == 1
            assert bench.controller.unready
            bench.cluster.away = False
            await asyncio.sleep(20)
            assert len(bench.pods()) == 2
            assert not bench.controller.unready

    run_in_fake_time(main())


def test_while_the_api_server_is_away_nothing_is_decided_and_silence_is_forgiven(
    run_in_fake_time: Run,
) -> None:
    async def main() -> None:
        bench = Bench()
        async with bench.operator():
            await bench.start()
            bench.cluster.away = True
            bench.cluster.disconnect()
            await bench.train(60)
            assert "API server" in bench.controller.blind
            assert not bench.controller.unhealthy, "a restart would not help"
            assert not bench.controller.unready, "the pods still need the coordinator"
            bench.cluster.away = False
            await bench.train(30)
            assert bench.controller.blind == ""
            assert bench.status["generation"] == 1
            assert [p["metadata"]["name"] for p in bench.pods()] == ["mini-0-1", "mini-1-1"]

    run_in_fake_time(main())


def test_who_does_not_lead_decides_nothing_and_takes_nobody_for_silent(
    run_in_fake_time: Run,
) -> None:
    async def main() -> None:
        bench = Bench()
        async with bench.operator():
            await bench.start()
            bench.leads = False
            writes = bench.cluster.writes
            victim = bench.pods()[1]["metadata"]
            await bench.cluster.delete(PODS, "team", victim["name"], uid=victim["uid"], grace_s=0)
            await asyncio.sleep(60)  # pods are sent away, so nobody is heard
            assert "Lease" in bench.controller.blind
            assert bench.cluster.writes == writes
            bench.leads = True
            await asyncio.sleep(2)
            assert len(bench.pods()) == 2
            reasons = [entry["reason"] for entry in bench.status["history"]]
            assert reasons == ["PodDeleted"], "the other was not silent"

    run_in_fake_time(main())


def test_pod_deleted_by_a_user_is_made_again(run_in_fake_time: Run) -> None:
    async def main() -> None:
        bench = Bench()
        async with bench.operator():
            await bench.start()
            pod = bench.pods()[1]["metadata"]
            await bench.cluster.delete(PODS, "team", pod["name"], uid=pod["uid"], grace_s=0)
            await asyncio.sleep(2)
            assert len(bench.pods()) == 2
            assert pod["uid"] not in [p["metadata"]["uid"] for p in bench.pods()]

    run_in_fake_time(main())


def test_refused_pod_is_told_in_the_status_and_tried_again(run_in_fake_time: Run) -> None:
    async def main() -> None:
        bench = Bench()
        async with bench.operator():
            bench.cluster.refusal = "exceeded quota: gpus"
            await bench.apply()
            await asyncio.sleep(5)
            assert "exceeded quota" in str(bench.status["conditions"])
            bench.cluster.refusal = ""
            await asyncio.sleep(120)
            assert len(bench.pods()) == 2
            assert "exceeded quota" not in str(bench.status["conditions"])

    run_in_fake_time(main())


def test_failing_writes_are_tried_again_with_back_off(run_in_fake_time: Run) -> None:
    async def main() -> None:
        bench = Bench()
        async with bench.operator():
            await asyncio.sleep(1)
            await bench.apply()
            bench.cluster.away = True
            await asyncio.sleep(8)
            assert bench.status == {}
            bench.cluster.away = False
            await asyncio.sleep(10)
            assert len(bench.pods()) == 2

    run_in_fake_time(main())


def test_slow_training_does_not_hold_up_another(run_in_fake_time: Run) -> None:
    async def main() -> None:
        bench = Bench()
        async with bench.operator():
            bench.cluster.slow_s = 20
            await bench.apply()
            await asyncio.sleep(1)
            bench.cluster.slow_s = 0
            await bench.apply("other")
            await asyncio.sleep(1)
            assert len(bench.pods("other")) == 2
            assert bench.pods() == []

    run_in_fake_time(main())


def test_defect_at_one_training_does_not_stop_the_others(run_in_fake_time: Run) -> None:
    async def main() -> None:
        bench = Bench()
        async with bench.operator():
            await bench.apply()
            await asyncio.sleep(1)
            broken = bench.controller.trainings[KEY]
            object.__setattr__(broken, "status", None)
            bench.controller.queue.add(KEY)
            await bench.apply("other")
            await asyncio.sleep(3)
            assert len(bench.pods("other")) == 2

    run_in_fake_time(main())


def test_deleted_training_is_forgotten_everywhere(run_in_fake_time: Run) -> None:
    async def main() -> None:
        bench = Bench()
        async with bench.operator():
            await bench.start()
            uid = bench.uid
            await bench.cluster.delete(TRAININGS, "team", "mini", uid=uid)
            await asyncio.sleep(1)
            assert bench.controller.trainings == {}
            await asyncio.sleep(90)  # until its pods have been silent for long
            assert bench.coordinator.snapshot(uid).members == ()
            assert 'training="mini"' not in bench.controller.metrics.expose().decode()

    run_in_fake_time(main())


def test_training_deleted_without_an_event_is_found_by_the_next_list(run_in_fake_time: Run) -> None:
    async def main() -> None:
        bench = Bench()
        async with bench.operator():
            await bench.start()
            bench.watching = False
            await bench.cluster.delete(TRAININGS, "team", "mini", uid=bench.uid)
            await relist(bench.controller, bench.cluster, [""])
            assert bench.controller.trainings == {}

    run_in_fake_time(main())


def test_training_of_the_same_name_is_another_one(run_in_fake_time: Run) -> None:
    async def main() -> None:
        bench = Bench()
        async with bench.operator():
            await bench.start()
            bench.watching = False
            await bench.cluster.delete(TRAININGS, "team", "mini", uid=bench.uid)
            for pod in bench.pods():
                bench.cluster.finish_deletion("team", pod["metadata"]["name"])
            bench.watching = True
            await bench.apply()
            await asyncio.sleep(5)
            assert bench.controller.trainings[KEY].uid == bench.uid
            assert bench.status["attempt"] == 1
            assert len(bench.pods()) == 2

    run_in_fake_time(main())


def test_stop_finishes_what_is_being_done(run_in_fake_time: Run) -> None:
    async def main() -> None:
        bench = Bench()
        async with bench.operator():
            bench.cluster.slow_s = 5
            await bench.apply()
            await asyncio.sleep(1)
            assert bench.pods() == []
        assert len(bench.pods()) == 2

    run_in_fake_time(main())


def test_object_whose_status_cannot_be_read_is_left_alone(
    run_in_fake_time: Run, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        bench = Bench()
        async with bench.operator():
            bench.watching = False
            await bench.apply()
            stored = dict(bench.cluster.get(TRAININGS, "team", "mini"))
            put_object(bench.controller, {**stored, "status": {"attempt": "three"}})
            await asyncio.sleep(5)
            assert bench.pods() == []
        assert "cannot be read" in caplog.text

    run_in_fake_time(main())

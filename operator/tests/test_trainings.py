"""What the controller is told of trainings, by events that come late, twice or never."""

from __future__ import annotations

import asyncio

import pytest
from controller_bench import KEY, Bench, Run
from deepseek_operator.kube.port import NODES, TRAININGS
from deepseek_operator.runtime.trainings import put_object, relist


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

"""The controller on the cluster in memory, in fake time: news, silence and errors."""

from __future__ import annotations

import asyncio

from controller_bench import KEY, Bench, Run
from deepseek_operator.kube.port import PODS, TRAININGS
from deepseek_operator.runtime.trainings import put_object
from dstrain_api.protocol import Report


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

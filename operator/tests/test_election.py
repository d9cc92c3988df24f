"""Replicas of the operator that compete for one Lease, on the cluster in memory, in fake time."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest
from deepseek_operator.core.lease import DEADLINE_S, DURATION_S, destination
from deepseek_operator.kube.port import LEASES, SERVICES, SLICES, ClusterError, Resource
from deepseek_operator.local.memory import MemoryCluster
from deepseek_operator.runtime.election import Election, Replica

Run = Callable[[Coroutine[Any, Any, Any]], Any]


class Reach(MemoryCluster):
    """What a replica's connection to the API server may do to it."""

    def __init__(self, cluster: MemoryCluster) -> None:
        self._cluster = cluster
        self.away = False
        self.slow_s = 0.0

    async def _pass(self) -> None:
        await asyncio.sleep(self.slow_s)
        if self.away:
            raise ClusterError("connection refused")

    async def read(self, resource: Resource, namespace: str, name: str) -> dict[str, Any]:
        await self._pass()
        return await self._cluster.read(resource, namespace, name)

    async def create(self, manifest: Any) -> dict[str, Any]:
        await self._pass()
        return await self._cluster.create(manifest)

    async def replace(self, manifest: Any) -> dict[str, Any]:
        await self._pass()
        return await self._cluster.replace(manifest)


class Contest:
    """A Service and replicas that campaign for its Lease."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.cluster = MemoryCluster(clock=self.loop.time)
        self.reach: dict[str, Reach] = {}
        self.replicas: dict[str, Election] = {}
        self.tasks: dict[str, asyncio.Task[None]] = {}

    async def start(self, *names: str) -> None:
        for name in names:
            self.reach[name] = Reach(self.cluster)
            replica = Replica(namespace="ns", pod=name, address=f"10.0.0.{name[-1]}", service="op")
            made = Election(
                self.reach[name], replica, clock=self.loop.time, monotonic=self.loop.time
            )
            self.replicas[name] = made
            self.tasks[name] = asyncio.create_task(made.run())

    def kill(self, name: str) -> None:
        self.tasks.pop(name).cancel()
        del self.replicas[name]

    async def give_up(self, name: str) -> None:
        self.tasks.pop(name).cancel()
        await self.replicas[name].release()

    @property
    def leaders(self) -> list[str]:
        return [name for name, replica in self.replicas.items() if replica.leads]

    async def leader(self, limit_s: float) -> tuple[str, float]:
        """Who leads next, and after how long."""
        began_s = self.loop.time()
        while not self.leaders:
            assert self.loop.time() - began_s < limit_s, "nobody leads"
            await asyncio.sleep(0.05)
        (name,) = self.leaders
        return name, self.loop.time() - began_s


@asynccontextmanager
async def contest(*names: str) -> AsyncIterator[Contest]:
    made = Contest()
    service = {"apiVersion": "v1", "kind": "Service", "metadata": {"namespace": "ns", "name": "op"}}
    await made.cluster.create(service)
    await made.start(*names)
    try:
        yield made
    finally:
        for task in made.tasks.values():
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task


def test_one_of_three_leads_and_stays(run_in_fake_time: Run) -> None:
    async def main() -> None:
        async with contest("op-1", "op-2", "op-3") as c:
            first, _ = await c.leader(5)
            for _ in range(600):
                await asyncio.sleep(0.5)
                assert c.leaders == [first]
            spec = c.cluster.get(LEASES, "ns", "op")["spec"]
            assert (spec["holderIdentity"], spec["leaseTransitions"]) == (first, 0)

    run_in_fake_time(main())


def test_a_killed_leader_is_followed_within_20_seconds(run_in_fake_time: Run) -> None:
    async def main() -> None:
        async with contest("op-1", "op-2") as c:
            first, _ = await c.leader(5)
            for lived_s in range(8):
                await asyncio.sleep(lived_s + 0.3)
                c.kill(first)
                second, took_s = await c.leader(20)
                assert second != first
                assert DURATION_S - 2 < took_s < DURATION_S + 2
                await c.start(first)
                first = second

    run_in_fake_time(main())


def test_a_leader_that_gives_the_lease_back_is_followed_within_2_seconds(
    run_in_fake_time: Run,
) -> None:
    async def main() -> None:
        async with contest("op-1", "op-2") as c:
            first, _ = await c.leader(5)
            await asyncio.sleep(30)
            await c.give_up(first)
            assert not c.leaders
            second, took_s = await c.leader(5)
            assert second != first
            assert took_s < 1.5

    run_in_fake_time(main())


def test_a_container_that_starts_again_in_its_pod_leads_at_once(run_in_fake_time: Run) -> None:
    async def main() -> None:
        async with contest("op-1") as c:
            await c.leader(5)
            await c.start("op-2")
            await asyncio.sleep(10)
            c.kill("op-1")
            await c.start("op-1")
            name, took_s = await c.leader(5)
            assert name == "op-1"
            assert took_s < 1

    run_in_fake_time(main())


def test_a_leader_cut_off_acts_no_more_before_another_one_leads_and_then_knows_it_lost(
    run_in_fake_time: Run,
) -> None:
    async def main() -> None:
        async with contest("op-1", "op-2") as c:
            first, _ = await c.leader(5)
            c.reach[first].away = True
            await asyncio.sleep(DEADLINE_S + 0.1)
            assert not c.leaders
            second, _ = await c.leader(20)
            assert second != first
            assert not c.tasks[first].done()
            c.reach[first].away = False
            await asyncio.sleep(5)
            assert c.tasks[first].done(), "it starts anew"
            assert c.leaders == [second]

    run_in_fake_time(main())


def test_when_the_api_server_was_away_for_all_the_same_one_leads_again(
    run_in_fake_time: Run,
) -> None:
    async def main() -> None:
        async with contest("op-1", "op-2") as c:
            first, _ = await c.leader(5)
            await asyncio.sleep(20)
            for reach in c.reach.values():
                reach.away = True
            await asyncio.sleep(60)
            assert c.leaders == []
            for reach in c.reach.values():
                reach.away = False
            again, took_s = await c.leader(5)
            assert again == first, "what it knows is still true"
            assert took_s < 2
            await asyncio.sleep(60)
            assert c.leaders == [first]

    run_in_fake_time(main())


def test_a_request_that_hangs_does_not_keep_a_leader_leading(run_in_fake_time: Run) -> None:
    async def main() -> None:
        async with contest("op-1", "op-2") as c:
            first, _ = await c.leader(5)
            c.reach[first].slow_s = 3600.0
            await asyncio.sleep(DEADLINE_S + 0.1)
            assert c.leaders == []
            second, _ = await c.leader(10)
            assert second != first

    run_in_fake_time(main())


@pytest.mark.parametrize("seed", range(20))
def test_never_two_at_once_whatever_the_connections_do(seed: int, run_in_fake_time: Run) -> None:
    chance = random.Random(seed)

    async def main() -> None:
        async with contest("op-1", "op-2", "op-3") as c:
            led = set()
            for _ in range(1500):
                if chance.random() < 0.05:
                    reach = c.reach[chance.choice(sorted(c.reach))]
                    reach.away = chance.random() < 0.5
                    reach.slow_s = chance.choice([0.0, 0.5, 3.0, 10.0])
                for name in [n for n, task in c.tasks.items() if task.done()]:
                    await c.start(name)  # as the kubelet does
                await asyncio.sleep(chance.uniform(0.05, 0.5))
                assert len(c.leaders) <= 1
                led.update(c.leaders)
            assert led

    run_in_fake_time(main())


def test_a_lease_that_a_person_deletes_is_made_again(run_in_fake_time: Run) -> None:
    async def main() -> None:
        async with contest("op-1") as c:
            await c.leader(5)
            lease = c.cluster.get(LEASES, "ns", "op")["metadata"]
            await c.cluster.delete(LEASES, "ns", "op", uid=lease["uid"])
            await asyncio.sleep(3)
            assert c.tasks["op-1"].done(), "somebody may have led in between"
            await c.start("op-1")
            assert (await c.leader(5))[0] == "op-1"

    run_in_fake_time(main())


def test_worker_pods_are_sent_to_the_leader_and_to_the_next_one(run_in_fake_time: Run) -> None:
    async def main() -> None:
        async with contest("op-1", "op-2") as c:
            for _ in range(2):
                name, _ = await c.leader(20)
                routing = asyncio.create_task(c.replicas[name].keep_routed(8080))
                await asyncio.sleep(0.1)
                slice_ = c.cluster.get(SLICES, "ns", "op")
                assert destination(slice_)[:2] == ([f"10.0.0.{name[-1]}"], [8080])
                routing.cancel()
                c.kill(name)

    run_in_fake_time(main())


def test_a_route_that_was_deleted_is_made_again_and_one_that_is_right_is_left(
    run_in_fake_time: Run,
) -> None:
    async def main() -> None:
        async with contest("op-1") as c:
            await c.leader(5)
            routing = asyncio.create_task(c.replicas["op-1"].keep_routed(8080))
            await asyncio.sleep(60)
            meta = c.cluster.get(SLICES, "ns", "op")["metadata"]
            assert c.cluster.get(SLICES, "ns", "op")["metadata"] == meta
            await c.cluster.delete(SLICES, "ns", "op", uid=meta["uid"])
            await asyncio.sleep(15)
            assert c.cluster.get(SLICES, "ns", "op")["metadata"]["uid"] != meta["uid"]
            routing.cancel()

    run_in_fake_time(main())


def test_what_an_uninstalled_release_left_is_taken_over_and_not_collected_with_it(
    run_in_fake_time: Run,
) -> None:
    async def main() -> None:
        async with contest("op-1") as c:
            await c.leader(5)
            routing = asyncio.create_task(c.replicas["op-1"].keep_routed(8080))
            await asyncio.sleep(1)
            routing.cancel()
            await c.give_up("op-1")
            old = c.cluster.get(SERVICES, "ns", "op")
            left = [c.cluster.get(kind, "ns", "op") for kind in (LEASES, SLICES)]
            await c.cluster.delete(SERVICES, "ns", "op", uid=old["metadata"]["uid"])
            for stored in left:  # the garbage collector is not that fast
                await c.cluster.create(stored)
            await c.cluster.create({k: old[k] for k in ("apiVersion", "kind", "metadata")})
            new = c.cluster.get(SERVICES, "ns", "op")["metadata"]["uid"]
            await c.start("op-2")
            await c.leader(5)
            routing = asyncio.create_task(c.replicas["op-2"].keep_routed(8080))
            await asyncio.sleep(1)
            for kind in (LEASES, SLICES):
                (owner,) = c.cluster.get(kind, "ns", "op")["metadata"]["ownerReferences"]
                assert owner["uid"] == new
            routing.cancel()

    run_in_fake_time(main())


def test_a_replica_that_leads_no_more_does_not_take_the_route_back(run_in_fake_time: Run) -> None:
    async def main() -> None:
        async with contest("op-1", "op-2") as c:
            first, _ = await c.leader(5)
            old = asyncio.create_task(c.replicas[first].keep_routed(8080))
            await asyncio.sleep(1)
            c.reach[first].away = True
            second, _ = await c.leader(20)
            new = asyncio.create_task(c.replicas[second].keep_routed(8080))
            await asyncio.sleep(1)
            c.reach[first].away = False
            await asyncio.sleep(60)
            assert destination(c.cluster.get(SLICES, "ns", "op"))[0] == [f"10.0.0.{second[-1]}"]
            for task in (old, new):
                task.cancel()

    run_in_fake_time(main())
